//! `run` keeps few capabilities, and keeps its memory to itself. It can still do all that it has to.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use lab::kind::Kind;
use lab::sites::{Lab, Running, binary};
use lab::traffic::TcpLoad;
use rustix::process::Signal;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::stage::{lab, rewrite};

const SETTLE: Duration = Duration::from_secs(5);
/// A user that owns nothing: `nobody`.
const NOBODY: u32 = 65534;
const ALWAYS: CapabilitySet =
    CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW).union(CapabilitySet::BPF).union(CapabilitySet::PERFMON);
const FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::CHOWN).union(CapabilitySet::FOWNER);

fn field<'t>(status: &'t str, name: &str) -> Result<&'t str> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.map(str::trim).with_context(|| format!("no {name} in {status}"))
}

/// Checks that every thread of `run` has `kept` and no other capability, and cannot gain one.
fn has_only(run: &Running, kept: CapabilitySet) -> Result<()> {
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{}/task", run.pid()))? {
        // A thread may have ended since.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
        threads += 1;
        let thread = field(&status, "Name")?;
        for (set, expected) in [
            ("CapPrm", kept),
            ("CapEff", kept),
            ("CapBnd", kept),
            ("CapInh", CapabilitySet::empty()),
            ("CapAmb", CapabilitySet::empty()),
        ] {
            let found = CapabilitySet::from_bits_retain(u64::from_str_radix(field(&status, set)?, 16)?);
            ensure!(found == expected, "{set} of thread {thread} is {found:?}, expected {expected:?}");
        }
        ensure!(field(&status, "NoNewPrivs")? == "1", "thread {thread} could gain privileges");
    }
    ensure!(threads >= 3, "it has only {threads} threads");
    Ok(())
}

/// Whether a thread without `CAP_SYS_PTRACE`, which otherwise has more capabilities than `run`, may open its memory.
fn is_memory_open(pid: u32) -> Result<bool> {
    let open = move || -> Result<bool> {
        let sets = capabilities(None)?;
        let effective = sets.effective - CapabilitySet::SYS_PTRACE;
        set_capabilities(None, CapabilitySets { effective, ..sets })?;
        Ok(File::open(format!("/proc/{pid}/mem")).is_ok())
    };
    thread::spawn(open).join().map_err(|_| anyhow!("the thread panicked"))?
}

fn reload(lab: &Lab) -> Result<()> {
    rewrite(lab, 0, |text| text.replacen("weight = ", "weight = 2", 1))?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(code == 0, "`reload` ended with {code}: {complaint}");
    Ok(())
}

pub fn run_keeps_few_privileges(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let [mut a, b] = lab.run()?;
    has_only(&a, ALWAYS)?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", a.pid()))?;
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).context("no limit")?;
    ensure!(core.split_whitespace().take(2).eq(["0", "0"]), "core dumps are limited to {core}");
    ensure!(is_memory_open(std::process::id())? && !is_memory_open(a.pid())?, "others can read its memory");
    reload(&lab)?;
    lab.sites[0].gateway.ip("link del ecmp0")?;
    a.wait_until_said("it is mended: ecmp0 was deleted")?;
    lab.sites[0].gateway.ip("link del wg1")?;
    a.wait_until_said("it is mended: wg1 was deleted")?;
    let mut running = [a, b];
    lab.warm_up(&mut running)?;
    ensure!(TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received() == 400_000);
    let [a, _b] = running;
    has_only(&a, ALWAYS)?;
    let output = a.output();
    ensure!(a.stop(Signal::INT)?.success(), "{output}");
    let left = before.wait_for_same(SETTLE, || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    Ok(())
}

/// The files of a user who is trusted like root: `run` continues to read them, and a reload finds them.
pub fn run_keeps_what_files_of_others_need(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let folder = lab.sites[0].config.parent().context("no folder")?;
    for entry in fs::read_dir(folder)? {
        chown(entry?.path(), Some(NOBODY), Some(NOBODY))?;
    }
    chown(folder, Some(NOBODY), Some(NOBODY))?;
    let mut a = lab.start(0)?;
    a.wait_until_up()?;
    has_only(&a, ALWAYS | FILES)?;
    reload(&lab)?;
    let output = a.output();
    ensure!(a.stop(Signal::INT)?.success(), "{output}");
    Ok(())
}

/// Where `run` mounts the BPF file system, it can unmount it.
pub fn run_keeps_what_a_mount_needs(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let program = lab.dir().join("without-bpffs");
    let inner = format!("while umount -l /sys/fs/bpf 2> /dev/null; do :; done; exec {} \"$@\"", binary()?.display());
    fs::write(&program, format!("#!/bin/sh\nexec unshare --mount sh -c '{inner}' ecmpvpn \"$@\"\n"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let mut a = lab.start_program(0, &program, &[])?;
    a.wait_until_said("is up:")?;
    has_only(&a, ALWAYS | CapabilitySet::SYS_ADMIN)?;
    let mounts = Path::new("/proc").join(a.pid().to_string()).join("mounts");
    ensure!(fs::read_to_string(mounts)?.contains(" /sys/fs/bpf bpf "), "it is not mounted");
    a.signal(Signal::INT)?;
    let status = a.wait()?;
    ensure!(status.success() && a.output().contains("the host is as it was"), "{status}: {}", a.output());
    Ok(())
}
