//! Fault points: places where a test ends this process, or makes a write of a file fail. A build without debug
//! assertions, as the release, has none: these functions are empty there.
//!
//! The environment variable `ECMPVPN_FAULT` names a folder. The file `order` in it says what to do: `count`, `kill N`
//! (SIGKILL at the Nth point) or `full N ERRNO` (the Nth write of a file and all later ones fail). Points count from the
//! moment the order is there, and again from 1 when it changes. Each is appended to the file `points`.

use std::io;
use std::path::Path;

#[cfg(debug_assertions)]
mod armed;

/// A place at which the process may be killed: before or after a change. `what` names it for the list of points.
#[inline]
pub fn point(what: &str) {
    #[cfg(debug_assertions)]
    armed::point(what);
    #[cfg(not(debug_assertions))]
    let _ = what;
}

/// A place before a file is written. Also a [`point`].
///
/// # Errors
/// A test ordered it.
#[inline]
pub fn write(what: &str) -> io::Result<()> {
    #[cfg(debug_assertions)]
    return armed::write(what);
    #[cfg(not(debug_assertions))]
    {
        let _ = what;
        Ok(())
    }
}

/// The folder that a test named, which this process must be able to write.
pub fn folder() -> Option<&'static Path> {
    #[cfg(debug_assertions)]
    return armed::folder();
    #[cfg(not(debug_assertions))]
    None
}
