//! The journal: how to undo each change, on disk before the change is made.
//!
//! One JSON file, replaced as a whole for every record. It has no secrets. `record.rs` defines the records, `undo.rs`
//! executes them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::links::Link;
use super::record::{LinkId, Undo};
use crate::{fault, file};

/// How long to wait for another site that changes shared settings, and how often to look. It takes milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// Journals of another version are refused.
const VERSION: u32 = 1;

/// The journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{operation} the journal {}", .path.display())]
    Io {
        /// For example `writing`.
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the journal {} cannot be read: undo its changes by hand, then remove it", .path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the journal {} was written by another version of ecmpvpn: run `ecmpvpn down` of that version", .path.display())]
    Version { path: PathBuf },
    #[error(
        "the changes in {} were made in another network namespace ({namespace}): run this command there; if that \
         namespace is gone, remove the file", .path.display()
    )]
    OtherNamespace {
        path: PathBuf,
        /// For example `net:[4026531840]`.
        namespace: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    version: u32,
    site: String,
    boot_id: String,
    netns: String,
    undo: Vec<Undo>,
}

/// The records of one site.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    contents: Contents,
}

impl Journal {
    /// Reads the journal at `path`. If there is none, returns an empty one for `site`. A journal of an earlier boot
    /// counts as empty: nothing that it records exists any more.
    pub fn open(path: &Path, site: &str) -> Result<Self, JournalError> {
        let empty =
            Contents { version: VERSION, site: site.to_owned(), boot_id: boot_id(), netns: netns(), undo: Vec::new() };
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { path: path.to_owned(), contents: empty });
            }
            Err(source) => return Err(JournalError::Io { operation: "reading", path: path.to_owned(), source }),
        };
        let malformed = |source| JournalError::Malformed { path: path.to_owned(), source };
        let header: serde_json::Value = serde_json::from_slice(&text).map_err(malformed)?;
        if header.get("boot_id").and_then(|id| id.as_str()).is_some_and(|id| id != empty.boot_id) {
            return Ok(Self { path: path.to_owned(), contents: empty });
        }
        if header.get("version").and_then(serde_json::Value::as_u64) != Some(u64::from(VERSION)) {
            return Err(JournalError::Version { path: path.to_owned() });
        }
        let contents: Contents = serde_json::from_value(header).map_err(malformed)?;
        if contents.netns != empty.netns {
            return Err(JournalError::OtherNamespace { path: path.to_owned(), namespace: contents.netns });
        }
        Ok(Self { path: path.to_owned(), contents })
    }

    /// Whether there is nothing to undo.
    pub fn is_empty(&self) -> bool {
        self.contents.undo.is_empty()
    }

    /// The records, the last change first: the order of undoing.
    pub fn records(&self) -> impl DoubleEndedIterator<Item = &Undo> {
        self.contents.undo.iter().rev()
    }

    pub fn site(&self) -> &str {
        &self.contents.site
    }

    /// Records how to undo a change. Call it before the change.
    pub fn record(&mut self, undo: Undo) -> Result<(), JournalError> {
        self.contents.undo.push(undo);
        self.save()
    }

    /// As [`Self::record`], unless the journal has the same record already: the change is made again after somebody else
    /// took it back. Returns whether the record is new.
    pub fn record_once(&mut self, undo: Undo) -> Result<bool, JournalError> {
        if self.contents.undo.contains(&undo) {
            return Ok(false);
        }
        self.record(undo).map(|()| true)
    }

    /// Removes the last record: its change was not made, or is undone.
    pub fn retract(&mut self) -> Result<(), JournalError> {
        self.contents.undo.pop();
        self.save()
    }

    /// Replaces the last record by a more complete one.
    pub fn amend(&mut self, undo: Undo) -> Result<(), JournalError> {
        self.contents.undo.pop();
        self.record(undo)
    }

    /// Whether ecmpvpn made this link for the site. Name, index and alias must be those of the record.
    pub fn owns_link(&self, link: &Link) -> bool {
        self.contents.undo.iter().any(|undo| match undo {
            Undo::DeleteLink { link: ours, .. } => {
                ours.ifindex == Some(link.ifindex) && ours.alias == link.alias && ours.name == link.name
            }
            _ => false,
        })
    }

    /// The addresses that ecmpvpn added to the link with this index.
    pub fn owned_addresses(&self, ifindex: u32) -> impl Iterator<Item = IpNet> + '_ {
        self.contents.undo.iter().filter_map(move |undo| match undo {
            Undo::DeleteAddress { link, address } if link.ifindex == Some(ifindex) => Some(*address),
            _ => None,
        })
    }

    /// The routes that ecmpvpn added: prefix and steering device.
    pub fn owned_routes(&self) -> impl Iterator<Item = (IpNet, &LinkId)> {
        self.contents.undo.iter().filter_map(|undo| match undo {
            Undo::DeleteRoute { prefix, device } => Some((*prefix, device)),
            _ => None,
        })
    }

    /// The prefixes to which ecmpvpn added unreachable routes.
    pub fn owned_unreachable(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.contents.undo.iter().filter_map(|undo| match undo {
            Undo::DeleteUnreachable { prefix } => Some(*prefix),
            _ => None,
        })
    }

    /// Whether the journal knows the former value of the setting `key`.
    pub fn has_sysctl(&self, key: &str) -> bool {
        self.contents.undo.iter().any(|undo| match undo {
            Undo::WriteSysctls { values } => values.iter().any(|(known, _)| known == key),
            _ => false,
        })
    }

    /// Keeps other sites of the same run root from changing what [`Self::others`] finds, until the result is dropped.
    /// Without the lock (`None`) two sites that act at the same instant may miss each other. Waits for the lock at most
    /// [`LOCK_PATIENCE`]: a process that is stopped may hold it.
    pub(super) fn lock_others(&self) -> Option<fs::File> {
        // Only its owner can open it.
        let path = self.root()?;
        let root = fs::File::open(path).ok()?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        while let Err(error) = flock(&root, FlockOperation::NonBlockingLockExclusive) {
            if error != Errno::WOULDBLOCK || Instant::now() >= deadline {
                tracing::warn!(
                    "the lock of {} is not taken ({error}): look for another ecmpvpn that is stopped (`ps -C ecmpvpn`), \
                     and do not change two sites of this host at the same moment",
                    path.display()
                );
                return None;
            }
            sleep(LOCK_POLL);
        }
        Some(root)
    }

    /// The journals of other sites in the same run root, of this boot and network namespace. Those that cannot be read
    /// are left out.
    pub(super) fn others(&self) -> Vec<Self> {
        let own = self.path.parent();
        let entries = self.root().and_then(|root| fs::read_dir(root).ok()).into_iter().flatten().flatten();
        let directories = entries.map(|entry| entry.path()).filter(|path| Some(path.as_path()) != own);
        let read = |directory: PathBuf| {
            let path = directory.join(self.path.file_name()?);
            let contents: Contents = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
            let (here, there) = (&self.contents, &contents);
            let same = here.version == there.version && here.boot_id == there.boot_id && here.netns == there.netns;
            same.then_some(Self { path, contents })
        };
        directories.filter_map(read).collect()
    }

    /// The run root: the journal is in the site's directory below.
    fn root(&self) -> Option<&Path> {
        self.path.parent()?.parent()
    }

    /// Removes the records of changes that are undone already.
    pub fn forget(&mut self, is_undone: impl Fn(&Undo) -> bool) -> Result<(), JournalError> {
        let before = self.contents.undo.len();
        self.contents.undo.retain(|undo| !is_undone(undo));
        if self.contents.undo.len() == before { Ok(()) } else { self.save() }
    }

    /// Replaces all records, the oldest first.
    pub(super) fn replace(&mut self, records: Vec<Undo>) -> Result<(), JournalError> {
        self.contents.undo = records;
        self.save()
    }

    /// Removes the record at `index`, counted from the oldest: its change is undone.
    pub(super) fn remove_record(&mut self, index: usize) -> Result<(), JournalError> {
        self.contents.undo.remove(index);
        self.save()
    }

    pub(super) fn remove(&self) -> Result<(), JournalError> {
        fault::point("removing the journal");
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Io { operation: "removing", path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn save(&self) -> Result<(), JournalError> {
        // Whatever loses the page cache also loses the kernel state that the journal is about.
        let write = || file::replace(&self.path, &serde_json::to_vec_pretty(&self.contents)?);
        write().map_err(|source| JournalError::Io { operation: "writing", path: self.path.clone(), source })
    }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// The calling thread's network namespace, for example `net:[4026531840]`.
fn netns() -> String {
    fs::read_link("/proc/thread-self/ns/net").map(|ns| ns.display().to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Undo {
        let link = LinkId { name: "eth0".into(), ifindex: Some(2), alias: None };
        Undo::DeleteAddress { link, address: text.parse().unwrap() }
    }

    #[test]
    fn another_process_reads_what_was_recorded_and_not_what_was_retracted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.json");
        let mut journal = Journal::open(&path, "site-a").unwrap();
        assert!(journal.is_empty());
        for text in ["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24"] {
            journal.record(address(text)).unwrap();
        }
        journal.retract().unwrap();
        journal.amend(address("fd00::2/64")).unwrap();
        let other = Journal::open(&path, "site-a").unwrap();
        let records: Vec<_> = other.records().cloned().collect();
        assert_eq!(records, [address("fd00::2/64"), address("10.0.0.1/24")]);
    }

    #[test]
    fn the_lock_of_the_sites_is_not_waited_for_for_ever() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("site-a");
        fs::create_dir(&folder).unwrap();
        let journal = Journal::open(&folder.join("journal.json"), "site-a").unwrap();
        let held = journal.lock_others().expect("nobody holds it");
        let since = Instant::now();
        // It is a lock of the open file, so that this process itself can stand for another one.
        assert!(journal.lock_others().is_none());
        assert!((LOCK_PATIENCE..2 * LOCK_PATIENCE).contains(&since.elapsed()), "{:?}", since.elapsed());
        drop(held);
        assert!(journal.lock_others().is_some());
    }

    #[test]
    fn a_journal_of_another_boot_is_empty_and_one_of_another_namespace_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.json");
        Journal::open(&path, "site-a").unwrap().record(address("10.0.0.1/24")).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(&boot_id(), "another")).unwrap();
        assert!(Journal::open(&path, "site-a").unwrap().is_empty());
        fs::write(&path, text.replace(&netns(), "net:[1]")).unwrap();
        let message = Journal::open(&path, "site-a").unwrap_err().to_string();
        assert!(message.contains("another network namespace (net:[1])"), "{message}");
        fs::write(&path, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        assert!(matches!(Journal::open(&path, "site-a"), Err(JournalError::Version { .. })));
        fs::write(&path, "{").unwrap();
        assert!(matches!(Journal::open(&path, "site-a"), Err(JournalError::Malformed { .. })));
    }
}
