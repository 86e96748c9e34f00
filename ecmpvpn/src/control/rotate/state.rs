//! A renewal of keys on disk, beside the configuration: what is to be changed, and how far it is. It names key files and
//! holds no secret.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

/// Of another version: refused.
const VERSION: u32 = 1;

/// Which end of it this site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It has new private keys, and says when which tunnel is changed.
    Leads,
    /// It has the other end's new public keys, and follows.
    Follows,
}

/// How far a tunnel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// It has its former keys.
    Waiting,
    /// Its keys are being changed.
    Changing,
    /// It works with its new keys, and the configuration names them.
    Done,
}

/// One tunnel's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name here.
    pub tunnel: String,
    /// This site's new key, relative to the configuration; where it leads.
    pub private_key_file: Option<String>,
    /// The far end's new key; where it follows.
    pub public_key: Option<String>,
    /// The new key that both share, relative to the configuration.
    pub preshared_key_file: String,
    /// How far it is.
    pub stage: Stage,
}

impl Part {
    /// The key files that are new with it.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.private_key_file.iter().map(String::as_str).chain([self.preshared_key_file.as_str()])
    }
}

/// A renewal of keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    /// Tells it from others, at both ends; not 0.
    pub id: u32,
    /// This site's.
    pub role: Role,
    /// The other site.
    pub peer: String,
    /// Whether tunnels may be changed now.
    pub going: bool,
    /// Why it stopped.
    pub stopped: Option<String>,
    /// In the order in which they are changed.
    pub parts: Vec<Part>,
}

/// It cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file.
    #[error("{operation} {}", path.display())]
    Io {
        /// As `writing`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Not of this program.
    #[error("{} cannot be read: `ecmpvpn rotate --abort` removes it", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Of another version.
    #[error("{} was written by another version of ecmpvpn: `ecmpvpn rotate --abort` removes it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
    },
}

impl State {
    /// One that has not begun.
    pub fn new(id: u32, role: Role, peer: &str, parts: Vec<Part>) -> Self {
        let going = role == Role::Follows;
        Self { version: VERSION, id, role, peer: peer.to_owned(), going, stopped: None, parts }
    }

    /// Whether every tunnel has its new keys.
    pub fn is_done(&self) -> bool {
        self.parts.iter().all(|part| part.stage == Stage::Done)
    }

    /// The part of a tunnel.
    pub fn part_mut(&mut self, tunnel: &str) -> Option<&mut Part> {
        self.parts.iter_mut().find(|part| part.tunnel == tunnel)
    }

    /// Its file beside the configuration `config`.
    pub fn path(config: &Path) -> PathBuf {
        // A link to the configuration: the files are where it leads to.
        let config = fs::canonicalize(config).unwrap_or_else(|_| config.to_owned());
        config.with_extension("rotation.json")
    }

    /// What is under way; `None`: nothing.
    pub fn read(path: &Path) -> Result<Option<Self>, StateError> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|source| StateError::Io { operation: "reading", path: path.to_owned(), source })?,
        };
        let state: Self =
            serde_json::from_slice(&text).map_err(|source| StateError::Malformed { path: path.to_owned(), source })?;
        if state.version == VERSION { Ok(Some(state)) } else { Err(StateError::Version { path: path.to_owned() }) }
    }

    /// Writes it, in one step.
    pub fn write(&self, path: &Path) -> Result<(), StateError> {
        let write = || -> io::Result<()> {
            // Nobody else may read a new one of these.
            let mut file = NamedTempFile::new_in(folder(path))?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(|source| StateError::Io { operation: "writing", path: path.to_owned(), source })
    }

    /// Changes what is there, unless nothing is; one process at a time. What is there now.
    pub fn update(path: &Path, change: impl FnOnce(&mut Self)) -> Result<Option<Self>, StateError> {
        let locked = || -> io::Result<File> {
            let folder = File::open(folder(path))?;
            flock(&folder, FlockOperation::LockExclusive)?;
            Ok(folder)
        };
        let _lock =
            locked().map_err(|source| StateError::Io { operation: "locking", path: path.to_owned(), source })?;
        let Some(mut state) = Self::read(path)? else { return Ok(None) };
        change(&mut state);
        state.write(path)?;
        Ok(Some(state))
    }
}

/// The folder of a file.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Name of a key file that a renewal makes.
pub fn key_file(tunnel: &str, id: u32, kind: &str) -> String {
    format!("{tunnel}-{id:08x}.{kind}")
}

/// Whether a renewal made the file for this tunnel: then nobody else needs it.
pub fn is_ours(tunnel: &str, file: &str) -> bool {
    let rest = file.strip_prefix(tunnel).and_then(|rest| rest.strip_prefix('-'));
    let id = rest.and_then(|rest| rest.strip_suffix(".key").or_else(|| rest.strip_suffix(".psk")));
    id.is_some_and(|id| id.len() == 8 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(tunnel: &str) -> Part {
        Part {
            tunnel: tunnel.to_owned(),
            private_key_file: Some(key_file(tunnel, 7, "key")),
            public_key: None,
            preshared_key_file: key_file(tunnel, 7, "psk"),
            stage: Stage::Waiting,
        }
    }

    #[test]
    fn it_is_written_whole_changed_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = State::path(&folder.path().join("ecmpvpn.toml"));
        assert_eq!(State::read(&path).unwrap(), None);
        assert_eq!(State::update(&path, |_| {}).unwrap(), None);
        let state = State::new(7, Role::Leads, "site-b", vec![part("wg0"), part("wg1")]);
        state.write(&path).unwrap();
        let changed = State::update(&path, |state| state.part_mut("wg1").unwrap().stage = Stage::Done).unwrap();
        assert_eq!(State::read(&path).unwrap(), changed);
        assert!(!changed.as_ref().unwrap().is_done() && !changed.unwrap().going);
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        fs::write(&path, "{").unwrap();
        assert!(State::read(&path).unwrap_err().to_string().contains("--abort"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_files_that_a_renewal_made_are_its_own() {
        assert!(is_ours("wg0", &key_file("wg0", 0xab, "key")) && is_ours("wg0", &key_file("wg0", 1, "psk")));
        for other in ["wg0.key", "site-a.key", "wg00-000000ab.key", "wg0-000000ab.pem", "wg0-00000xab.key", "wg0-.key"]
        {
            assert!(!is_ours("wg0", other), "{other}");
        }
    }
}
