//! The state of a renewal of keys, on disk beside the configuration: what to change, and the progress. It names key
//! files, and has no secret itself.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::file::Draft;

/// State files of another version are refused.
const VERSION: u32 = 1;

/// How long to wait for another process that changes the state. It takes milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// This site's role in the renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It has new private keys, and decides when each tunnel is changed.
    Leads,
    /// It has the other site's new public keys, and follows.
    Follows,
}

/// The progress of a tunnel.
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

/// One tunnel in a renewal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The tunnel's name at this site.
    pub tunnel: String,
    /// File of this site's new private key, relative to the configuration; only if this site leads.
    pub private_key_file: Option<String>,
    /// The far end's new public key; only if this site follows.
    pub public_key: Option<String>,
    /// File of the new pre-shared key, relative to the configuration.
    pub preshared_key_file: String,
    pub stage: Stage,
}

impl Part {
    /// The new key files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.private_key_file.iter().map(String::as_str).chain([self.preshared_key_file.as_str()])
    }
}

/// A renewal of keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    /// Identifies the renewal at both sites; not 0.
    pub id: u32,
    pub role: Role,
    pub peer: String,
    /// Whether tunnels may be changed now. At the leading site `ecmpvpn rotate` sets it.
    pub going: bool,
    /// Why it stopped.
    pub stopped: Option<String>,
    /// The tunnels, in the order in which they are changed.
    pub parts: Vec<Part>,
    /// At the leading site: the absolute path of the file for the other site.
    #[serde(default)]
    pub carried: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum RotationStateError {
    #[error("{operation} {}", path.display())]
    Io {
        /// For example `writing`.
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} cannot be read: `ecmpvpn rotate --abort` removes it", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{} was written by another version of ecmpvpn: `ecmpvpn rotate --abort` removes it", path.display())]
    Version { path: PathBuf },
}

impl State {
    /// A renewal of which no tunnel is changed yet.
    pub fn new(id: u32, role: Role, peer: &str, parts: Vec<Part>) -> Self {
        let going = role == Role::Follows;
        Self { version: VERSION, id, role, peer: peer.to_owned(), going, stopped: None, parts, carried: None }
    }

    /// Whether every tunnel has its new keys.
    pub fn is_done(&self) -> bool {
        self.stopped.is_none() && self.parts.iter().all(|part| part.stage == Stage::Done)
    }

    /// Forgets the tunnels whose change has not begun. The renewal never counts as done then.
    pub fn begin_no_more(&mut self) {
        self.parts.retain(|part| part.stage != Stage::Waiting);
        self.stopped = Some("it is being given up".to_owned());
    }

    pub fn part_mut(&mut self, tunnel: &str) -> Option<&mut Part> {
        self.parts.iter_mut().find(|part| part.tunnel == tunnel)
    }

    /// The path of the state file, beside the configuration `config`.
    pub fn path(config: &Path) -> PathBuf {
        // If `config` is a symbolic link, the files are beside its target.
        let config = fs::canonicalize(config).unwrap_or_else(|_| config.to_owned());
        config.with_extension("rotation.json")
    }

    /// Reads the state file. `None`: there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, RotationStateError> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => {
                read.map_err(|source| RotationStateError::Io { operation: "reading", path: path.to_owned(), source })?
            }
        };
        let state: Self = serde_json::from_slice(&text)
            .map_err(|source| RotationStateError::Malformed { path: path.to_owned(), source })?;
        if state.version == VERSION {
            Ok(Some(state))
        } else {
            Err(RotationStateError::Version { path: path.to_owned() })
        }
    }

    /// Writes the state file, in one step.
    pub fn write(&self, path: &Path) -> Result<(), RotationStateError> {
        let write = || -> io::Result<()> {
            // A new file of this kind has mode 0600.
            let mut draft = Draft::beside(path)?;
            draft.write(&serde_json::to_vec_pretty(self)?)?;
            draft.sync()?;
            draft.replace(path)
        };
        write().map_err(|source| RotationStateError::Io { operation: "writing", path: path.to_owned(), source })
    }

    /// Changes the state on disk, if there is one, under a lock. Returns the new state. Waits for the lock at most
    /// [`LOCK_PATIENCE`].
    pub fn update(path: &Path, change: impl FnOnce(&mut Self)) -> Result<Option<Self>, RotationStateError> {
        let failed = |source| RotationStateError::Io { operation: "locking", path: path.to_owned(), source };
        let Some(_lock) = lock(path).map_err(failed)? else { return Ok(None) };
        let Some(mut state) = Self::read(path)? else { return Ok(None) };
        change(&mut state);
        state.write(path)?;
        Ok(Some(state))
    }
}

/// Locks the state file itself. Its folder is not locked: others may open that, and whoever can open it can hold a lock
/// on it. `None`: there is no such file.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Each writer replaces the file. Then the lock is on a file that nobody reads any more.
            Ok(()) if fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|ours| ours.ino() == now.ino())) => {
                return Ok(Some(file));
            }
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The name of a key file that a renewal makes.
pub fn key_file(tunnel: &str, id: u32, kind: &str) -> String {
    format!("{tunnel}-{id:08x}.{kind}")
}

/// Whether a renewal made this key file for this tunnel. Then nobody else needs it.
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

    /// Finding A4: the folder was locked, which every user can do, and the daemon waited for ever.
    #[test]
    fn a_lock_on_the_folder_stops_nobody_and_a_lock_on_the_file_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = State::path(&folder.path().join("ecmpvpn.toml"));
        State::new(7, Role::Leads, "site-b", vec![part("wg0")]).write(&path).unwrap();
        let held = File::open(folder.path()).unwrap();
        flock(&held, FlockOperation::LockExclusive).unwrap();
        assert!(State::update(&path, |state| state.going = true).unwrap().unwrap().going);
        let held = File::open(&path).unwrap();
        flock(&held, FlockOperation::LockExclusive).unwrap();
        assert!(State::update(&path, |_| {}).unwrap_err().to_string().starts_with("locking"));
        drop(held);
        // Each writer counts on what the one before it has written.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..25).for_each(|_| drop(State::update(&path, |state| state.id += 1).unwrap())));
            }
        });
        assert_eq!(State::read(&path).unwrap().unwrap().id, 107);
    }

    #[test]
    fn one_that_is_given_up_keeps_what_has_begun_and_is_never_done() {
        let mut parts = ["wg0", "wg1", "wg2"].map(part);
        (parts[0].stage, parts[1].stage) = (Stage::Done, Stage::Changing);
        let mut state = State::new(7, Role::Leads, "site-b", parts.to_vec());
        state.begin_no_more();
        assert_eq!(state.parts, parts[..2]);
        state.part_mut("wg1").unwrap().stage = Stage::Done;
        assert!(!state.is_done());
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
