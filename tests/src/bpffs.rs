//! A BPF file system of one's own, for pins that nobody else sees.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A separate bpffs, so that the host's is not touched.
pub struct Bpffs {
    dir: tempfile::TempDir,
}

impl Bpffs {
    pub fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        mount("bpf", dir.path(), "bpf", MountFlags::empty(), None)?;
        Ok(Self { dir })
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("ecmpvpn")
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.dir.path(), UnmountFlags::DETACH) {
            eprintln!("unmounting {}: {error}", self.dir.path().display());
        }
    }
}
