//! Gives this program priority over other work of the machine, so that only the links limit the transfers.

use std::io;
use std::mem::zeroed;

/// Gives this process, and all processes that it starts later, real-time priority: they run before everything of
/// ordinary priority, sched(7). The rate of the links is chosen so that this needs only a part of the processors.
///
/// # Errors
/// The system does not permit it, as in many containers.
pub fn raise() -> io::Result<()> {
    // SAFETY: a sched_param consists of integers, for which zero is a valid value.
    let mut parameters: libc::sched_param = unsafe { zeroed() };
    parameters.sched_priority = 1;
    // SAFETY: the parameters live until the call returns. 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
