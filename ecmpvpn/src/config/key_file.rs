//! Reads key files, and refuses those whose key is no secret.

use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// A key file holds one line of 44 bytes; far above that it is something else.
const MAX_LEN: usize = 4096;

/// Why a key file cannot be used: a phrase that goes on from `private_key_file in [site]`. Keys are never shown.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file does not exist.
    #[error("names {0}, which does not exist: write it with `ecmpvpn init` or `wg genkey`, mode 0600")]
    Missing(PathBuf),
    /// The file cannot be opened or read.
    #[error("names {path}, which cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, device, pipe or socket.
    #[error("names {0}, which is not a regular file: name a file that holds one key")]
    NotAFile(PathBuf),
    /// Group or others have some access.
    #[error("names {path}, which others than its owner can use (mode {mode:04o}): run `chmod 600 {path}`")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The owner is neither root, nor the running user, nor the configuration's owner.
    #[error("names {path}, which belongs to another user (uid {uid}): run `chown root {path}`")]
    Stranger {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// Larger than any key file.
    #[error("names {0}, which is too large for a key file: name a file that holds one key")]
    TooLarge(PathBuf),
    /// Bytes that are no text.
    #[error("names {0}, which does not hold a key: a key is 44 characters of base64, as `wg genkey` prints")]
    NotText(PathBuf),
}

/// The text of the key file at `path`; see [`read_secret`].
pub(super) fn read(path: &Path, config_owner: u32) -> Result<Zeroizing<String>, KeyFileError> {
    read_secret(path, config_owner, MAX_LEN)
}

/// The text of a file of keys at `path`, of so many bytes at most. `config_owner`: the user id that owns the configuration; whoever may write that
/// chooses the key anyway, so their own file is as good as root's.
pub fn read_secret(path: &Path, config_owner: u32, max_len: usize) -> Result<Zeroizing<String>, KeyFileError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing(path.to_owned()),
        _ => KeyFileError::Unreadable { path: path.to_owned(), source },
    };
    // Opening a pipe would otherwise wait for its writer.
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    // Everything is asked of the open file: the path may name another one by now.
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(KeyFileError::NotAFile(path.to_owned()));
    }
    let (mode, uid) = (metadata.mode() & 0o7777, metadata.uid());
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode });
    }
    if ![0, config_owner, rustix::process::geteuid().as_raw()].contains(&uid) {
        return Err(KeyFileError::Stranger { path: path.to_owned(), uid });
    }
    if metadata.len() > max_len as u64 {
        return Err(KeyFileError::TooLarge(path.to_owned()));
    }
    // All room at once: a buffer that grows leaves copies of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(max_len + 1));
    match file.take(max_len as u64).read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(KeyFileError::NotText(path.to_owned())),
        Err(error) => Err(unreadable(error)),
    }
}
