//! A BPF array in this process's memory: reading or writing an entry costs no system call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::slice;

use aya::maps::MapData;
use ecmpvpn_common::layout::{Bucket, Health, Load, MAX_TUNNELS_PER_PEER, Peer, Rule, RuleSet, State, TunnelSet, maps};

use super::DataplaneError;

/// A record whose words are all shared: others may change them at any time.
///
/// # Safety
/// Every field that is written after the map was filled is a `Shared`, and any bytes are a valid value.
pub unsafe trait Record {}

// SAFETY: the fields that change are `Shared` or `Whole`. The rest is written before any program is attached.
unsafe impl Record for State {}
// SAFETY: its fields are shared, except the padding.
unsafe impl Record for Bucket {}
// SAFETY: its fields are shared.
unsafe impl Record for Health {}
// SAFETY: its fields are shared.
unsafe impl Record for Rule {}
// SAFETY: its field is shared.
unsafe impl Record for RuleSet {}
// SAFETY: its field is shared, except the padding.
unsafe impl Record for TunnelSet {}

/// An array of `T` that is mapped into memory.
#[derive(Debug)]
pub struct Mapped<T> {
    entries: *mut T,
    count: usize,
}

// SAFETY: the memory belongs to no thread, and `Record` says that shared access is sound.
unsafe impl<T: Record> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T: Record> Sync for Mapped<T> {}

impl<T: Record> Mapped<T> {
    /// The kernel places entries at multiples of 8 bytes (`array_map_alloc()`, kernel/bpf/arraymap.c).
    const FITS: () = assert!(size_of::<T>().is_multiple_of(8));

    /// Maps an array that was created with `BPF_F_MMAPABLE`.
    pub fn new(name: &str, map: &MapData) -> Result<Self, DataplaneError> {
        let () = Self::FITS;
        let info = map.info().map_err(|error| DataplaneError::new(format!("looking at map {name}"), error))?;
        if info.value_size() as usize != size_of::<T>() {
            let found = info.value_size();
            return Err(DataplaneError::Mismatch(format!(
                "map {name} has values of {found} bytes; `ecmpvpn down` removes it"
            )));
        }
        let count = info.max_entries() as usize;
        let entries = Self::map(map.fd().as_fd(), count)
            .map_err(|error| DataplaneError::new(format!("mapping {name} into memory"), error))?;
        Ok(Self { entries, count })
    }

    fn map(map: BorrowedFd<'_>, count: usize) -> io::Result<*mut T> {
        let (length, access) = (count * size_of::<T>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the kernel chooses the address, so that nothing else is overwritten.
        let at = unsafe { libc::mmap(ptr::null_mut(), length, access, libc::MAP_SHARED, map.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
    }

    pub fn entries(&self) -> &[T] {
        // SAFETY: the mapping is that long and lives as long as `self`; `Record` says that others may write to it.
        unsafe { slice::from_raw_parts(self.entries, self.count) }
    }

    /// All entries, to fill them before any program is attached.
    pub fn entries_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { slice::from_raw_parts_mut(self.entries, self.count) }
    }
}

impl Mapped<State> {
    /// The only entry.
    pub fn state(&self) -> &State {
        &self.entries()[0]
    }

    /// The peers that are in use.
    pub fn peers(&self) -> &[Peer] {
        let peers = &self.state().peers;
        &peers[..peers.len().min(self.state().peer_count.get() as usize)]
    }

    /// The loads of these peers' tunnels.
    pub fn loads(&self) -> &[Load] {
        &self.state().loads[..self.peers().len() * MAX_TUNNELS_PER_PEER as usize]
    }
}

/// Maps the pinned state.
pub fn state(open: impl FnOnce(&str) -> Result<MapData, DataplaneError>) -> Result<Mapped<State>, DataplaneError> {
    Mapped::new(maps::STATE, &open(maps::STATE)?)
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.entries.cast(), self.count * size_of::<T>()) };
    }
}
