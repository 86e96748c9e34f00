//! Writes to maps that take memory as entries come.
//!
//! Maps without preallocation (`BPF_F_NO_PREALLOC`, and every longest-prefix match) take an entry's memory from a per-CPU
//! store that the kernel fills from a worker. A write that finds it empty is refused with ENOMEM, and succeeds a moment
//! later; source: `alloc_bulk()` and `unit_alloc()`, kernel/bpf/memalloc.c.

use std::thread::sleep;
use std::time::Duration;

use aya::maps::MapError;

use super::error::os_error;

/// How often, and how long apart, a refused write is tried again: half a second in all, then memory is truly short.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(5);

/// Carries out `write`, again while the kernel has no memory at hand.
///
/// # Errors
/// What `write` said last.
pub(super) fn retried(mut write: impl FnMut() -> Result<(), MapError>) -> Result<(), MapError> {
    for _ in 0..TRIES {
        match write() {
            Err(error) if code(&error) == Some(libc::ENOMEM) => sleep(PAUSE),
            done => return done,
        }
    }
    write()
}

/// The kernel's answer.
fn code(error: &MapError) -> Option<i32> {
    match error {
        // What this variant wraps is not among its sources.
        MapError::IoError(error) => error.raw_os_error(),
        error => os_error(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use aya::sys::SyscallError;

    use super::*;

    fn refused(code: i32) -> MapError {
        let io_error = io::Error::from_raw_os_error(code);
        MapError::SyscallError(SyscallError { call: "bpf_map_update_elem", io_error })
    }

    /// What `answers` come to, and how often was asked.
    fn outcome(answers: &[i32]) -> (Result<(), MapError>, usize) {
        let mut asked = 0;
        let result = retried(|| {
            let code = answers.get(asked).copied().unwrap_or(0);
            asked += 1;
            if code == 0 { Ok(()) } else { Err(refused(code)) }
        });
        (result, asked)
    }

    #[test]
    fn only_a_momentary_lack_of_memory_is_waited_for() {
        let (result, asked) = outcome(&[libc::ENOMEM, libc::ENOMEM]);
        assert!(result.is_ok() && asked == 3);
        let (result, asked) = outcome(&[libc::E2BIG]);
        assert!(result.is_err() && asked == 1);
        let (result, asked) = outcome(&[libc::ENOMEM; 200]);
        assert!(result.is_err() && asked == TRIES as usize + 1);
        assert_eq!(super::code(&MapError::IoError(io::Error::from_raw_os_error(libc::ENOMEM))), Some(libc::ENOMEM));
    }
}
