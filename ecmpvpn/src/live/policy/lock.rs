//! The lock of a site's maps: whoever reads a record and writes it back holds it meanwhile.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tokio::time::{Instant, sleep};

use crate::dataplane::Pins;

/// How often a lock that another process holds is tried again.
const AGAIN: Duration = Duration::from_millis(20);

/// The lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("locking {}", dir.display())]
    Io {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "another process has held the lock of {} for {seconds} s: see which `ecmpvpn policy` still runs, and end it",
        dir.display()
    )]
    Held { dir: PathBuf, seconds: u64 },
}

/// Held until dropped.
#[derive(Debug)]
pub struct MapsLock {
    _dir: File,
}

impl MapsLock {
    /// Waits for the lock. Blocks: not for the daemon.
    ///
    /// # Errors
    /// The pins' directory cannot be opened or locked.
    pub fn wait(pins: &Pins) -> Result<Self, LockError> {
        Self::take(pins, FlockOperation::LockExclusive)
    }

    /// Tries to take the lock for `patience`, without blocking the thread.
    ///
    /// # Errors
    /// As [`Self::wait`], or another process still holds it.
    pub async fn within(pins: &Pins, patience: Duration) -> Result<Self, LockError> {
        let until = Instant::now() + patience;
        loop {
            match Self::take(pins, FlockOperation::NonBlockingLockExclusive) {
                Err(LockError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= until {
                        return Err(LockError::Held { dir: pins.dir().to_owned(), seconds: patience.as_secs() });
                    }
                    sleep(AGAIN).await;
                }
                taken => return taken,
            }
        }
    }

    fn take(pins: &Pins, operation: FlockOperation) -> Result<Self, LockError> {
        let taken = File::open(pins.dir()).and_then(|dir| {
            if dir.metadata()?.mode() & 0o077 != 0 {
                // An earlier version made it so.
                dir.set_permissions(Permissions::from_mode(0o700))?;
            }
            flock(&dir, operation)?;
            Ok(Self { _dir: dir })
        });
        taken.map_err(|source| LockError::Io { dir: pins.dir().to_owned(), source })
    }
}
