//! Gives up what this process does not need: its memory stays out of core dumps, and `run` keeps few capabilities.

use std::io;
use std::path::Path;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

use super::bpffs;
use super::journal::Journal;
use super::record::Undo;

/// What a running site always needs; SECURITY.md says for what.
const ALWAYS: CapabilitySet =
    CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW).union(CapabilitySet::BPF).union(CapabilitySet::PERFMON);
/// To read and write files of other users, and to give a replaced file its former owner and mode.
const FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::CHOWN).union(CapabilitySet::FOWNER);

/// Keeps the memory of this process, which may hold keys, out of core dumps. Processes that lack `CAP_SYS_PTRACE` can no
/// longer read it, even as the same user.
///
/// # Errors
/// The kernel refuses.
pub fn protect_memory() -> io::Result<()> {
    // Since a child that executes a program is dumpable again, it inherits the limit.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// What `run` needs besides [`ALWAYS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Mount the BPF file system, or unmount it.
    pub mount: bool,
    /// Use configuration and key files of another user.
    pub files_of_others: bool,
}

impl Needs {
    /// What to keep of the capabilities `permitted`.
    fn of(self, permitted: CapabilitySet) -> CapabilitySet {
        let mut keep = ALWAYS;
        let stands_in = !permitted.contains(CapabilitySet::BPF | CapabilitySet::PERFMON);
        keep.set(CapabilitySet::SYS_ADMIN, self.mount || stands_in);
        keep.set(FILES, self.files_of_others);
        keep & permitted
    }
}

/// Whether the site with the journal at `journal` mounts the BPF file system, or has mounted it before.
pub fn mounts_bpffs(journal: &Path, site: &str) -> bool {
    let has_mounted = |journal: Journal| journal.records().any(|undo| matches!(undo, Undo::Unmount { .. }));
    // The session reports a journal that cannot be read.
    !bpffs::is_mounted(Path::new(bpffs::BPFFS)) || Journal::open(journal, site).is_ok_and(has_mounted)
}

/// Calls `attempt` with the capabilities that this thread would keep for `needs`. Restores the others afterwards.
///
/// # Errors
/// The kernel refuses.
pub fn as_if_confined<T>(needs: Needs, attempt: impl FnOnce() -> T) -> io::Result<T> {
    let sets = capabilities(None)?;
    set_capabilities(None, CapabilitySets { effective: sets.effective & needs.of(sets.permitted), ..sets })?;
    let done = attempt();
    set_capabilities(None, sets)?;
    Ok(done)
}

/// Gives up every capability that is not needed, for good, also for programs that this process executes. Threads of this
/// process may still have the nice value `nice`.
///
/// Capabilities belong to threads: call this before there is another thread.
///
/// # Errors
/// The kernel refuses.
pub fn confine(needs: Needs, nice: i32) -> io::Result<()> {
    allow_nice(nice);
    let sets = capabilities(None)?;
    let keep = needs.of(sets.permitted);
    // Without it the bounding set stays. `no_new_privs` keeps executed programs from gaining what is left in it.
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << number);
            match capability_is_in_bounding_set(one) {
                Ok(true) if !keep.contains(one) => remove_capability_from_bounding_set(one)?,
                Ok(_) => {}
                // The kernel knows no more.
                Err(_) => break,
            }
        }
    }
    // The kernel takes out of the ambient set what is no longer permitted or inheritable.
    let kept =
        CapabilitySets { effective: sets.effective & keep, permitted: keep, inheritable: sets.inheritable & keep };
    set_capabilities(None, kept)?;
    set_no_new_privs(true)?;
    Ok(())
}

/// Raises the limit so that `nice` needs no `CAP_SYS_NICE`. Without the privilege the limit stays, and so does the
/// priority.
fn allow_nice(nice: i32) {
    // Source: setrlimit(2), RLIMIT_NICE.
    let desired = u64::try_from(20 - nice).ok();
    let now = getrlimit(Resource::Nice);
    // `None` is no limit at all, in both.
    let at_least = |limit: Option<u64>| limit.and_then(|limit| Some(limit.max(desired?)));
    let raised = Rlimit { current: at_least(now.current), maximum: at_least(now.maximum) };
    let _ = setrlimit(Resource::Nice, raised);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_is_kept() {
        let (all, neither) = (CapabilitySet::all(), Needs { mount: false, files_of_others: false });
        assert_eq!(neither.of(all), ALWAYS);
        assert_eq!(Needs { mount: true, ..neither }.of(all), ALWAYS | CapabilitySet::SYS_ADMIN);
        assert_eq!(Needs { files_of_others: true, ..neither }.of(all), ALWAYS | FILES);
        // It stands in for what is missing. Nothing is gained.
        let former = CapabilitySet::NET_ADMIN | CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_TIME;
        assert_eq!(neither.of(former), CapabilitySet::NET_ADMIN | CapabilitySet::SYS_ADMIN);
        assert_eq!(Needs { mount: true, files_of_others: true }.of(ALWAYS), ALWAYS);
    }
}
