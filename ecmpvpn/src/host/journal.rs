//! What must be undone, on disk before it is done.
//!
//! One JSON file, replaced as a whole at every record. It holds no secret. `record.rs` has the records, `undo.rs` carries
//! them out.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::links::Link;
use super::record::{LinkId, Undo};

/// Journals of another version are refused.
const VERSION: u32 = 1;

/// The journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file.
    #[error("{operation} the journal {}", .path.display())]
    Io {
        /// As `writing`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not a journal of ours.
    #[error("the journal {} cannot be read: undo its changes by hand, then remove it", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Of another version of the program.
    #[error("the journal {} was written by another version of ecmpvpn: run `ecmpvpn down` of that version", .path.display())]
    Version {
        /// The file.
        path: PathBuf,
    },
    /// Of another network namespace.
    #[error(
        "the changes in {} were made in another network namespace ({namespace}): run this command there; if that \
         namespace is gone, remove the file", .path.display()
    )]
    OtherNamespace {
        /// The file.
        path: PathBuf,
        /// As `net:[4026531840]`.
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
    /// What is on disk at `path`, or an empty journal of `site`. One that an earlier boot left behind is empty: nothing
    /// of what it records is there any more.
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

    /// What would be undone, the last change first.
    pub fn records(&self) -> impl Iterator<Item = &Undo> {
        self.contents.undo.iter().rev()
    }

    /// The site.
    pub fn site(&self) -> &str {
        &self.contents.site
    }

    /// Writes down how a change is undone. Call it before the change.
    pub fn record(&mut self, undo: Undo) -> Result<(), JournalError> {
        self.contents.undo.push(undo);
        self.save()
    }

    /// Takes the last record back: its change was not made.
    pub fn retract(&mut self) -> Result<(), JournalError> {
        self.contents.undo.pop();
        self.save()
    }

    /// Replaces the last record by one that knows more.
    pub fn amend(&mut self, undo: Undo) -> Result<(), JournalError> {
        self.contents.undo.pop();
        self.record(undo)
    }

    /// Whether a link is one that we made, and still the same.
    pub fn owns_link(&self, link: &Link) -> bool {
        self.contents.undo.iter().any(|undo| match undo {
            Undo::DeleteLink { link: ours, .. } => {
                ours.ifindex == Some(link.ifindex) && ours.alias == link.alias && ours.name == link.name
            }
            _ => false,
        })
    }

    /// Addresses that we added to the link with this index.
    pub fn owned_addresses(&self, ifindex: u32) -> impl Iterator<Item = IpNet> + '_ {
        self.contents.undo.iter().filter_map(move |undo| match undo {
            Undo::DeleteAddress { link, address } if link.ifindex == Some(ifindex) => Some(*address),
            _ => None,
        })
    }

    /// Routes that we added: prefix and steering device.
    pub fn owned_routes(&self) -> impl Iterator<Item = (IpNet, &LinkId)> {
        self.contents.undo.iter().filter_map(|undo| match undo {
            Undo::DeleteRoute { prefix, device } => Some((*prefix, device)),
            _ => None,
        })
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

    /// Removes the file.
    pub(super) fn remove(&self) -> Result<(), JournalError> {
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Io { operation: "removing", path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }

    fn save(&self) -> Result<(), JournalError> {
        let write = || {
            let temporary = self.path.with_extension("json.new");
            let mut file = fs::File::create(&temporary)?;
            // No fsync: whatever loses the page cache loses the kernel state that this is about, too.
            file.write_all(serde_json::to_string_pretty(&self.contents)?.as_bytes())?;
            fs::rename(&temporary, &self.path)
        };
        write().map_err(|source| JournalError::Io { operation: "writing", path: self.path.clone(), source })
    }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// The calling thread's network namespace, as `net:[4026531840]`.
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
