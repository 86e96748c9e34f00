//! The BPF file system, where maps and programs are pinned.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::statfs;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::error::{HostError, Lacks};
use super::journal::Journal;
use super::record::Undo;
use crate::fault;

/// The standard mount point of the BPF file system.
pub const BPFFS: &str = "/sys/fs/bpf";
/// Source: include/uapi/linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// Files that the kernel itself may put into a BPF file system. Source: `populate_bpffs()`, kernel/bpf/inode.c.
const PRELOADED: [&str; 2] = ["maps.debug", "progs.debug"];

/// Whether a BPF file system is mounted at `path`.
pub fn is_mounted(path: &Path) -> bool {
    // The type of `f_type` differs between architectures; the magic fits all of them.
    statfs(path).is_ok_and(|fs| u64::try_from(fs.f_type).is_ok_and(|magic| magic & 0xffff_ffff == BPF_FS_MAGIC))
}

/// Mounts a BPF file system at `path`, with a journal record.
pub fn mount_at(path: &Path, journal: &mut Journal) -> Result<(), HostError> {
    journal.record(Undo::Unmount { path: path.to_owned() })?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    fault::point("mounting bpffs");
    mount("bpf", path, "bpf", flags, c"mode=0700")
        .map_err(|e| Lacks::BpfFs { path: path.to_owned(), source: e.into() })?;
    fault::point("mounted bpffs");
    Ok(())
}

/// Unmounts the BPF file system at `path`, unless somebody has put something there.
pub fn unmount_if_empty(path: &Path) -> io::Result<()> {
    if !is_mounted(path) {
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        if !PRELOADED.iter().any(|name| entry.as_ref().is_ok_and(|entry| entry.file_name() == *name)) {
            return Ok(());
        }
    }
    fault::point("unmounting bpffs");
    match unmount(path, UnmountFlags::NOFOLLOW) {
        // Some process uses it, for example as its working directory.
        Err(rustix::io::Errno::BUSY | rustix::io::Errno::INVAL) => Ok(()),
        other => other.map_err(Into::into),
    }
}
