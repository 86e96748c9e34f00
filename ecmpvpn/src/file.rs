//! Writes files in one step: whoever reads a file finds the former content or the new one, also after a crash or on a
//! full disk.
//!
//! The new content is written into a draft beside the file. A draft is locked while somebody writes it. So a draft that
//! nobody has locked was left by a process that was killed, and the next one that writes into the folder removes it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{FlockOperation, flock, fstat};
use tempfile::NamedTempFile;

use crate::fault;

/// The names of drafts begin with this.
const PREFIX: &str = ".ecmpvpn-";
/// The names of the folders that `init` drafts begin with this.
pub const INIT: &str = ".ecmpvpn-init-";
/// The names of drafts of files end with this.
const SUFFIX: &str = ".new";

/// A file that is being written. Only its owner can read it (mode 0600). Dropping it removes it.
#[derive(Debug)]
pub struct Draft(NamedTempFile);

impl Draft {
    /// Makes an empty draft in the folder of `path`.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn beside(path: &Path) -> io::Result<Self> {
        let folder = folder(path);
        sweep(folder);
        loop {
            fault::write("drafting a file").map_err(advised)?;
            let made = tempfile::Builder::new().prefix(PREFIX).suffix(SUFFIX).tempfile_in(folder);
            let draft = made.map_err(advised)?;
            // Nobody waits here: only `sweep` takes the lock, for a moment.
            flock(draft.as_file(), FlockOperation::LockExclusive)?;
            // Between the two steps another process may have taken it for a draft that was left.
            if fstat(draft.as_file())?.st_nlink > 0 {
                fault::point("drafted a file");
                return Ok(Self(draft));
            }
        }
    }

    /// The open file.
    pub fn file(&mut self) -> &mut File {
        self.0.as_file_mut()
    }

    /// Writes a part of the content.
    pub fn write(&mut self, content: &[u8]) -> io::Result<()> {
        fault::write("filling a file").and_then(|()| self.file().write_all(content)).map_err(advised)
    }

    /// Writes the content to the disk, for a file that must outlive a loss of power.
    pub fn sync(&self) -> io::Result<()> {
        fault::write("writing a file to the disk").and_then(|()| self.0.as_file().sync_all()).map_err(advised)
    }

    /// Gives the draft the name `path`. A file of this name is replaced.
    pub fn replace(self, path: &Path) -> io::Result<()> {
        self.finish(|draft| draft.persist(path).map(drop).map_err(|error| error.error))
    }

    /// As [`Draft::replace`], but a file of this name is an error.
    pub fn create(self, path: &Path) -> io::Result<()> {
        self.finish(|draft| draft.persist_noclobber(path).map(drop).map_err(|error| error.error))
    }

    fn finish(self, name: impl FnOnce(NamedTempFile) -> io::Result<()>) -> io::Result<()> {
        fault::write("naming a file").and_then(|()| name(self.0)).map_err(advised)?;
        fault::point("named a file");
        Ok(())
    }
}

/// Writes the file at `path`, or replaces it, in one step. It has mode 0600. A loss of power may lose it.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    filled(path, content)?.replace(path)
}

/// As [`replace`], but writes a new file.
///
/// # Errors
/// Also if there is a file already.
pub fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    filled(path, content)?.create(path)
}

fn filled(path: &Path, content: &[u8]) -> io::Result<Draft> {
    let mut draft = Draft::beside(path)?;
    draft.write(content)?;
    Ok(draft)
}

/// Whether ecmpvpn gives a draft this name; `is_folder`: a draft of `init`. Six letters or digits are drawn at random.
fn is_draft(name: &str, is_folder: bool) -> bool {
    let drawn = if is_folder { name.strip_prefix(INIT) } else { name.strip_prefix(PREFIX) };
    let drawn = drawn.and_then(|drawn| if is_folder { Some(drawn) } else { drawn.strip_suffix(SUFFIX) });
    drawn.is_some_and(|drawn| drawn.len() == 6 && drawn.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// Removes the drafts in `folder` that killed processes left. What cannot be removed stays.
pub fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        let is_draft = entry.file_name().to_str().is_some_and(|name| is_draft(name, kind.is_dir()));
        if !is_draft || !(kind.is_dir() || kind.is_file()) {
            continue;
        }
        // Others may write into the folder, as into /tmp, and put a FIFO or a link there meanwhile.
        let open = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(&path);
        let is_left = open.is_ok_and(|draft| flock(&draft, FlockOperation::NonBlockingLockExclusive).is_ok());
        if is_left {
            let _ = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// The error with what to do about it, if that is known: the disk is full or read-only.
pub fn advised(error: io::Error) -> io::Error {
    let advice = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space there",
        io::ErrorKind::ReadOnlyFilesystem => "mount it writable",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}: {advice}, then try again"))
}

/// The folder of a file; `.` if `path` has none.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_a_new_one_replaces_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        create(&path, b"one").unwrap();
        assert_eq!(create(&path, b"two").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        replace(&path, b"three").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn drafts_that_were_left_are_removed_and_those_that_are_written_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(folder.path().join(".ecmpvpn-left01.new"), "half").unwrap();
        fs::create_dir(folder.path().join(".ecmpvpn-init-left01")).unwrap();
        fs::write(folder.path().join(".ecmpvpn-init-left01/key"), "half").unwrap();
        let (files, folders) = ([".ecmpvpn-my-copy.new", ".other.new"], [".ecmpvpn-init-of-mine", ".ecmpvpn-left01"]);
        for name in files {
            fs::write(folder.path().join(name), "mine").unwrap();
        }
        for name in folders {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let draft = Draft::beside(&path).unwrap();
        replace(&folder.path().join("another"), b"").unwrap();
        assert_eq!(names(folder.path()).len(), 6, "{:?}", names(folder.path()));
        draft.replace(&path).unwrap();
        let mut expected = [&files[..], &folders, &["another", "file"]].concat();
        expected.sort_unstable();
        assert_eq!(names(folder.path()), expected);
    }
}
