//! Reads key files, and refuses files that other users can read or that belong to them.

use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Maximum file size, bytes. A key file is one line of 44 bytes.
const MAX_LEN: usize = 4096;

/// Why a key file cannot be used: a phrase that continues `private_key_file in [site]`. Keys are never shown.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("names {0}, which does not exist: write it with `ecmpvpn init` or `wg genkey`, mode 0600")]
    Missing(PathBuf),
    #[error("names {0}, which this user may not read: run the command with sudo")]
    Forbidden(PathBuf),
    #[error("names {path}, which cannot be read: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    /// Root without `CAP_DAC_OVERRIDE`, as under the systemd unit, cannot read files of other users.
    #[error(
        "names {0}, which belongs to another user, and this process may read only root's files (it lacks \
         CAP_DAC_OVERRIDE, as under the systemd unit): run `chown root {0}`"
    )]
    OfAnotherUser(PathBuf),
    /// A directory, device, pipe or socket.
    #[error("names {0}, which is not a regular file: name a file that holds one key")]
    NotAFile(PathBuf),
    /// Group or others have access.
    #[error("names {path}, which others than its owner can use (mode {mode:04o}): run `chmod 600 {path}`")]
    Exposed { path: PathBuf, mode: u32 },
    /// The owner is none of root, the running user and the owner of the configuration.
    #[error("names {path}, which belongs to another user (uid {uid}): run `chown root {path}`")]
    Stranger {
        path: PathBuf,
        /// The owner's user id.
        uid: u32,
    },
    #[error("names {0}, which is too large for a key file: name a file that holds one key")]
    TooLarge(PathBuf),
    /// The content is not UTF-8.
    #[error("names {0}, which does not hold a key: a key is 44 characters of base64, as `wg genkey` prints")]
    NotText(PathBuf),
}

/// Reads the key file at `path`; see [`read_secret`].
pub(super) fn read(path: &Path, config_owner: u32) -> Result<Zeroizing<String>, KeyFileError> {
    read_secret(path, config_owner, MAX_LEN)
}

/// Whether root runs this, and the file at `path` is not root's.
fn belongs_to_another(path: &Path) -> bool {
    rustix::process::geteuid().is_root() && std::fs::metadata(path).is_ok_and(|metadata| metadata.uid() != 0)
}

/// Reads a file with keys, at most `max_len` bytes. `config_owner` is the user id that owns the configuration. Its
/// owner chooses the key file anyway, so a key file of this user is accepted like one of root.
pub fn read_secret(path: &Path, config_owner: u32, max_len: usize) -> Result<Zeroizing<String>, KeyFileError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing(path.to_owned()),
        io::ErrorKind::PermissionDenied if belongs_to_another(path) => KeyFileError::OfAnotherUser(path.to_owned()),
        io::ErrorKind::PermissionDenied => KeyFileError::Forbidden(path.to_owned()),
        _ => KeyFileError::Unreadable { path: path.to_owned(), source },
    };
    // Without `O_NONBLOCK`, opening a pipe would wait for its writer.
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    // Check the open file and not the path: the path may name another file by now.
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
    // Reserve the whole size at once: a buffer that grows leaves copies of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(max_len + 1));
    match file.take(max_len as u64).read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(KeyFileError::NotText(path.to_owned())),
        Err(error) => Err(unreadable(error)),
    }
}
