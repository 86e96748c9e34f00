//! `run` is started, killed, started again and taken down many times. Nothing may grow.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::loaded_maps;
use aya::programs::loaded_programs;
use lab::kind::Kind;
use lab::sites::Lab;
use rustix::process::Signal;

use super::stage::lab;

/// Number of cycles in the ordinary test.
const FEW: usize = 6;
/// Number of cycles in the test that must be named, unless [`CYCLES`] sets another one.
const MANY: usize = 500;
const CYCLES: &str = "ECMPVPN_CYCLES";
/// How much memory unrelated processes may allocate or free meanwhile, KiB.
const MEMORY: u64 = 64 << 10;

pub fn cycles_leave_nothing_behind(kind: Kind) -> Result<()> {
    cycle(kind, FEW)
}

pub fn cycles_five_hundred(kind: Kind) -> Result<()> {
    let count = std::env::var(CYCLES).ok().map(|text| text.parse()).transpose().context(CYCLES)?;
    cycle(kind, count.unwrap_or(MANY))
}

/// Number of maps and programs of ecmpvpn in the kernel, found by name.
fn in_kernel() -> usize {
    let ours = ["ecmpvpn_egress", "ecmpvpn_ingress", "ecmpvpn_arrival"];
    let programs = loaded_programs().flatten().filter(|p| ours.iter().any(|name| p.name_as_str() == Some(*name)));
    let maps = loaded_maps().flatten().filter(|map| matches!(map.name_as_str(), Some("BUCKETS" | "TUNNEL_IDS")));
    programs.count() + maps.count()
}

/// Memory of the kernel's slabs, per-CPU areas and vmalloc areas, KiB. A leak of links, routes or maps would show
/// there.
fn kernel_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Option<u64> {
        text.lines().find(|line| line.starts_with(name))?.split_whitespace().nth(1)?.parse().ok()
    };
    let fields = ["SUnreclaim:", "Percpu:", "VmallocUsed:"].map(field);
    fields.into_iter().sum::<Option<u64>>().context("meminfo lacks a field")
}

fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

fn once(lab: &Lab) -> Result<usize> {
    let mut first = lab.start(0)?;
    first.wait_until_said("is up:")?;
    ensure!(first.stop(Signal::KILL)?.code().is_none());
    let mut again = lab.start(0)?;
    again.wait_until_said("is up:")?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(code == 0, "`reload` ended with {code}: {complaint}");
    // By then the reload has closed the descriptors that it needed.
    std::thread::sleep(Duration::from_millis(200));
    let open = descriptors(again.pid())?;
    ensure!(again.stop(Signal::KILL)?.code().is_none());
    let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
    ensure!(code == 0, "`down` ended with {code}: {complaint}");
    Ok(open)
}

fn cycle(kind: Kind, count: usize) -> Result<()> {
    let lab = lab(kind, 3)?;
    // The far site stays up. Otherwise each start would wait for the bond's partner.
    let mut far = lab.start(1)?;
    far.wait_until_said("is up:")?;
    let before = lab.sites[0].dump()?;
    let objects = in_kernel();
    // The first cycle loads modules and fills caches.
    let descriptors = once(&lab)?;
    let memory = kernel_memory()?;
    let since = Instant::now();
    for number in 1..count {
        if number % 10 == 0 {
            let (took, memory) = (since.elapsed().as_secs(), kernel_memory()?);
            eprintln!("{number} of {count} cycles, {took} s; kernel memory {memory} KiB");
        }
        let open = once(&lab)?;
        ensure!(open <= descriptors + 2, "cycle {number} has {open} descriptors open, the first had {descriptors}");
    }
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "after {count} cycles:\n{}", left.unwrap_or_default());
    if kind == Kind::Userspace {
        // Other programs may use this kernel at the same time. The checks below are only valid in a virtual machine.
        return Ok(());
    }
    // The kernel frees programs and maps a moment after the last reference to them.
    for _ in 0..50 {
        if in_kernel() <= objects {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(in_kernel() <= objects, "{objects} programs and maps before, {} after", in_kernel());
    let now = kernel_memory()?;
    eprintln!("kernel memory {memory} KiB after the first cycle, {now} KiB after {count}");
    ensure!(now <= memory + MEMORY, "the kernel held {memory} KiB after the first cycle, {now} KiB after {count}");
    Ok(())
}
