//! Repeats writes to maps that allocate memory per entry.
//!
//! Maps without preallocation (`BPF_F_NO_PREALLOC`, and every longest-prefix match) allocate an entry's memory from a
//! per-CPU store that a kernel worker refills. A write that finds the store empty fails with ENOMEM and succeeds a
//! moment later. Source: `alloc_bulk()` and `unit_alloc()`, kernel/bpf/memalloc.c.

use std::thread::sleep;
use std::time::Duration;

use aya::maps::MapError;

use super::error::os_error;
use crate::fault;

/// How often a failed write is repeated, and the pause between two tries. Together this is half a second: after that,
/// memory really is short.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(5);

/// Calls `write`, and repeats it while the kernel is short of memory.
///
/// # Errors
/// The last error of `write`.
pub(super) fn retried(mut write: impl FnMut() -> Result<(), MapError>) -> Result<(), MapError> {
    fault::point("map write");
    for _ in 0..TRIES {
        match write() {
            Err(error) if code(&error) == Some(libc::ENOMEM) => sleep(PAUSE),
            done => return done,
        }
    }
    write()
}

/// The kernel's error code.
fn code(error: &MapError) -> Option<i32> {
    match error {
        // The source chain does not include the error that this variant wraps.
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

    /// The result if the kernel gives `answers`, and how often the write was tried.
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
