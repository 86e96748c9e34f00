//! Going before the machine's other work: the links are to be the limit, and not what else happens to run.

use std::io;
use std::mem::zeroed;

/// Has this process, and all that it starts from now on, run before everything of ordinary priority, sched(7). The links'
/// rate is chosen so that this takes a part of the processors only.
///
/// # Errors
/// The system does not let it, as in many containers.
pub fn raise() -> io::Result<()> {
    // SAFETY: a sched_param is integers, of which zero is a valid value.
    let mut parameters: libc::sched_param = unsafe { zeroed() };
    parameters.sched_priority = 1;
    // SAFETY: the parameters live until the call returns; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
