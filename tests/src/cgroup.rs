//! Control groups (version 2) that end what runs in them, and clean up after themselves.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::netns::unique;

/// How long killed processes may take to leave their group.
const PATIENCE: Duration = Duration::from_secs(10);

/// A control group of this machine. Dropping this value kills every process in it and in its subgroups, and removes all
/// of them.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes an empty group `PREFIX-PID-COUNTER` at the top of the hierarchy.
    ///
    /// # Errors
    /// The hierarchy is not mounted, or is read-only, as in most containers.
    pub fn new(prefix: &str) -> Result<Self> {
        let path = root()?.join(unique(prefix));
        fs::create_dir(&path).with_context(|| format!("making control group {}", path.display()))?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Kills every process in the group and in its subgroups.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1")
    }

    /// The processes of a subgroup, as pids of this process's namespace. None if there is no such group.
    pub fn processes(&self, subgroup: &str) -> Vec<u32> {
        let text = fs::read_to_string(self.0.join(subgroup).join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let start = Instant::now();
        let killed = self.kill();
        let mut removed = remove(&self.0);
        // A killed process leaves its group a moment later.
        while removed.is_err() && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
            removed = remove(&self.0);
        }
        if let Err(error) = killed.and(removed) {
            eprintln!("removing control group {}: {error}", self.0.display());
        }
    }
}

/// Where the hierarchy is mounted.
fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mounts")?;
    let fields = mounts.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut of_kind = fields.filter_map(|fields| (fields.get(2) == Some(&"cgroup2")).then(|| fields[1].to_owned()));
    Ok(of_kind.next().context("no cgroup2 file system is mounted")?.into())
}

/// Removes a group and its subgroups.
fn remove(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
