//! Ctrl-C as a flag, so that guards still run: whatever takes long looks at it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

static REQUESTED: AtomicBool = AtomicBool::new(false);

extern "C" fn handler(_signal: libc::c_int) {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP only set the flag.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let action: extern "C" fn(libc::c_int) = handler;
        // SAFETY: the handler has the signature that the kernel calls, and does nothing but store to an atomic.
        unsafe { libc::signal(signal, action as libc::sighandler_t) };
    }
}

/// Whether somebody wants this to end.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// An error if somebody wants this to end.
pub fn check() -> Result<()> {
    ensure!(!requested(), "interrupted");
    Ok(())
}

/// Sleeps, but not past an interruption.
pub fn sleep(time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero() && !requested()) {
        thread::sleep(left.min(Duration::from_millis(50)));
    }
}
