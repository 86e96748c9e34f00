//! Turns Ctrl-C into a flag, so that destructors still run. Everything that takes long looks at the flag.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

static REQUESTED: AtomicBool = AtomicBool::new(false);

extern "C" fn handler(_signal: libc::c_int) {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// Makes SIGINT, SIGTERM and SIGHUP set the flag and do nothing else.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let action: extern "C" fn(libc::c_int) = handler;
        // SAFETY: the handler has the signature that the kernel calls, and does nothing but store to an atomic.
        unsafe { libc::signal(signal, action as libc::sighandler_t) };
    }
}

/// Whether a signal has asked this program to end.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// Fails if a signal has asked this program to end.
pub fn check() -> Result<()> {
    ensure!(!requested(), "interrupted");
    Ok(())
}

/// Sleeps for `time`, or until a signal asks this program to end.
pub fn sleep(time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero() && !requested()) {
        thread::sleep(left.min(Duration::from_millis(50)));
    }
}
