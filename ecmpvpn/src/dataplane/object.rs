//! Loads the embedded eBPF object: sizes its maps for a table and loads its programs into the kernel.

use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{Map, MapData};
use aya::programs::{ProgramError, ProgramType, SchedClassifier};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfError, EbpfLoader};
use ecmpvpn_common::arrivals::MAX_FOLLOWED;
use ecmpvpn_common::flow::fields;
use ecmpvpn_common::layout::{BUCKETS_PER_PEER, MAX_PEERS, MAX_TUNNELS_PER_PEER, globals, maps, programs};

use super::{DataplaneError, Hook, Pins};
use crate::fault;
use crate::plan::SteeringTable;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("ECMPVPN_EBPF_OBJECT"));

/// aya-log's global: statements above this level are pruned by the verifier.
const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
/// Number of tunnels that reloads may add. Arrivals of further tunnels are not counted.
const SPARE_TUNNELS: usize = 8;
/// Entries of the longest-prefix match: more than any configuration may have.
const PREFIXES: u32 = MAX_PEERS * 1024;
/// File that exists if the kernel has type information (BTF).
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Lines of the verifier's log that an error shows.
const LOG_LINES: usize = 12;

/// How the programs are loaded.
#[derive(Clone, Debug)]
pub struct Options {
    /// Fields of the flow hash; see [`fields`].
    pub hash_fields: u32,
    /// Both directions of a flow take the same bucket.
    pub symmetric: bool,
    /// Keep the programs' log statements, for aya-log to read.
    pub log: bool,
    /// How to attach; `None`: by tcx if the kernel has it, else by clsact.
    pub hook: Option<Hook>,
    /// Load for `BPF_PROG_TEST_RUN`.
    pub test_run: TestRun,
    /// See [`globals::FLOWS`].
    pub flows: u32,
    /// Object of another build, to compare it with this one's; `None`: this build's object.
    pub object: Option<Vec<u8>>,
}

/// See [`globals::TEST_RUN`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TestRun {
    /// Packets come from the network.
    #[default]
    No = 0,
    /// For measuring time: the program does the same as for packets from the network.
    Timed = 1,
    /// For reading from `skb->cb` what the program chose.
    Described = 2,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hash_fields: fields::FIVE_TUPLE,
            symmetric: false,
            log: false,
            hook: None,
            test_run: TestRun::No,
            flows: 0,
            object: None,
        }
    }
}

/// Programs and maps in the kernel, attached to nothing. Dropping this value removes them unless they are pinned.
#[derive(Debug)]
pub struct Loaded {
    ebpf: Ebpf,
}

impl Loaded {
    /// Creates the object's maps, large enough for `table` and for `tunnels` tunnels.
    pub(super) fn maps(table: &SteeringTable, tunnels: usize, options: &Options) -> Result<Self, DataplaneError> {
        let peers = check_size(table)?;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).max(1);
        Ok(Self {
            ebpf: EbpfLoader::new()
                .override_global(globals::TEST_RUN, &(options.test_run as u8), true)
                .override_global(globals::FLOWS, &options.flows, true)
                .override_global(globals::RESTORES, &u8::from(restores()), false)
                .override_global(LOG_LEVEL, if options.log { &u8::MAX } else { &0 }, true)
                // Room for what a reload may add. The kernel allocates the memory per entry.
                .map_max_entries(maps::PREFIXES, PREFIXES)
                .map_max_entries(maps::COUNTERS, peers * MAX_TUNNELS_PER_PEER)
                .map_max_entries(maps::HEALTH, peers * MAX_TUNNELS_PER_PEER)
                .map_max_entries(maps::TUNNEL_IDS, peers * MAX_TUNNELS_PER_PEER)
                .map_max_entries(maps::BUCKETS, peers * BUCKETS_PER_PEER)
                .map_max_entries(maps::ARRIVALS, count(tunnels + SPARE_TUNNELS).saturating_mul(MAX_FOLLOWED))
                .load(options.object.as_deref().unwrap_or(OBJECT))
                .map_err(load_error)?,
        })
    }

    /// Has the kernel verify and load the programs.
    pub(super) fn load_programs(&mut self) -> Result<(), DataplaneError> {
        for name in programs::ALL {
            self.program_mut(name)?.load().map_err(|error| program_error(name, error))?;
        }
        Ok(())
    }

    /// A program of the object.
    ///
    /// # Errors
    /// The object has no such program.
    pub fn program_mut(&mut self, name: &str) -> Result<&mut SchedClassifier, DataplaneError> {
        let program = self.ebpf.program_mut(name).ok_or_else(|| missing("program", name))?;
        program.try_into().map_err(|error| DataplaneError::new(format!("looking at program {name}"), error))
    }

    pub(super) fn map_mut(&mut self, name: &str) -> Result<&mut Map, DataplaneError> {
        self.ebpf.map_mut(name).ok_or_else(|| missing("map", name))
    }

    /// A map's descriptor.
    pub(super) fn array_data(&self, name: &str) -> Result<&MapData, DataplaneError> {
        match self.ebpf.map(name) {
            Some(Map::Array(data)) => Ok(data),
            _ => Err(missing("array", name)),
        }
    }

    /// A map with a duplicated file descriptor.
    pub(super) fn duplicate(&self, name: &str) -> Result<MapData, DataplaneError> {
        let Some(Map::Array(data) | Map::HashMap(data) | Map::LpmTrie(data)) = self.ebpf.map(name) else {
            return Err(missing("map", name));
        };
        let failed = |error| DataplaneError::new(format!("looking at map {name}"), error);
        let descriptor = data.fd().as_fd().try_clone_to_owned().map_err(failed)?;
        MapData::from_fd(descriptor).map_err(|error| DataplaneError::new(format!("looking at map {name}"), error))
    }

    /// Pins maps and programs, so that they outlive this process. [`Pins::dir`] must exist.
    ///
    /// # Errors
    /// A pin cannot be created, or it exists already.
    pub fn pin(&mut self, pins: &Pins) -> Result<(), DataplaneError> {
        for name in maps::ALL {
            let path = pins.path(name);
            fault::point("pinning a map");
            let pinned = self.ebpf.map(name).ok_or_else(|| missing("map", name))?.pin(&path);
            pinned.map_err(|error| DataplaneError::new(format!("pinning map {name} at {}", path.display()), error))?;
        }
        for name in programs::ALL {
            let path = pins.path(name);
            fault::point("pinning a program");
            let pinned = self.program_mut(name)?.pin(&path);
            pinned.map_err(|error| DataplaneError::new(format!("pinning {name} at {}", path.display()), error))?;
        }
        Ok(())
    }
}

/// The programs, opened from their pins.
pub(super) struct Programs {
    /// Egress of the steering device.
    pub egress: SchedClassifier,
    /// Ingress of the tunnels.
    pub ingress: SchedClassifier,
    /// Ingress of the bond members.
    pub arrival: SchedClassifier,
}

/// Suffix of the pins of programs that are about to replace others.
const NEXT: &str = "+next";

impl Programs {
    fn named(pins: &Pins, suffix: &str) -> Result<Self, DataplaneError> {
        let open = |name: &str| pins.program(&format!("{name}{suffix}"));
        Ok(Self {
            egress: open(programs::EGRESS)?,
            ingress: open(programs::INGRESS)?,
            arrival: open(programs::ARRIVAL)?,
        })
    }

    /// The programs that are attached now.
    pub fn pinned(pins: &Pins) -> Result<Self, DataplaneError> {
        Self::named(pins, "")
    }

    /// Renames the pins of the programs that [`replace_programs`] loaded, so that they replace the former ones.
    pub fn keep(pins: &Pins) -> Result<(), DataplaneError> {
        for name in programs::ALL {
            let (from, to) = (pins.path(&format!("{name}{NEXT}")), pins.path(name));
            fault::point("renaming a pin");
            let renamed = std::fs::rename(&from, &to);
            renamed.map_err(|error| DataplaneError::new(format!("renaming {}", from.display()), error))?;
        }
        Ok(())
    }
}

/// Loads this version's programs, which use the pinned maps. They are not attached yet.
pub(super) fn replace_programs(pins: &Pins, options: &Options) -> Result<Programs, DataplaneError> {
    let (test_run, level) = (options.test_run as u8, if options.log { u8::MAX } else { 0 });
    let mut loader = EbpfLoader::new();
    loader.override_global(globals::TEST_RUN, &test_run, true).override_global(LOG_LEVEL, &level, true);
    let restores = u8::from(restores());
    loader.override_global(globals::RESTORES, &restores, false);
    for name in maps::ALL {
        loader.map_pin_path(name, pins.path(name));
    }
    let mut object = Loaded { ebpf: loader.load(OBJECT).map_err(load_error)? };
    for name in programs::ALL {
        let path = pins.path(&format!("{name}{NEXT}"));
        // Left by an earlier process that was killed here.
        Pins::forget(&path)?;
        let program = object.program_mut(name)?;
        program.load().map_err(|error| program_error(name, error))?;
        fault::point("pinning a program");
        let pinned = program.pin(&path);
        pinned.map_err(|error| DataplaneError::new(format!("pinning {name} at {}", path.display()), error))?;
    }
    Programs::named(pins, NEXT)
}

/// Whether programs may set the time at which a packet leaves (from Linux 5.18): needed to restore order.
pub fn restores() -> bool {
    is_helper_supported(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_skb_set_tstamp).unwrap_or(false)
}

/// Period of the kernel's tick, nanoseconds: the resolution of the coarse monotonic clock.
pub fn tick_ns() -> u32 {
    let tick = rustix::time::clock_getres(rustix::time::ClockId::MonotonicCoarse);
    u32::try_from(tick.tv_sec * 1_000_000_000 + tick.tv_nsec).unwrap_or(0)
}

fn check_size(table: &SteeringTable) -> Result<u32, DataplaneError> {
    let mismatch = |text: String| Err(DataplaneError::Mismatch(text));
    for peer in &table.peers {
        if peer.tunnels.len() > MAX_TUNNELS_PER_PEER as usize {
            return mismatch(format!(
                "peer {} has {} tunnels; at most {MAX_TUNNELS_PER_PEER} fit",
                peer.name,
                peer.tunnels.len()
            ));
        }
    }
    match u32::try_from(table.peers.len()) {
        Ok(peers @ 1..=MAX_PEERS) => Ok(peers),
        _ => mismatch(format!("there are {} peers; 1 to {MAX_PEERS} fit", table.peers.len())),
    }
}

fn missing(kind: &str, name: &str) -> DataplaneError {
    DataplaneError::Mismatch(format!(
        "the eBPF object has no {kind} {name}; build it again with `cargo xtask build-ebpf`"
    ))
}

fn load_error(error: EbpfError) -> DataplaneError {
    DataplaneError::new("loading the eBPF maps", error)
}

/// What the kernel lacks, derived from the verifier's `log` and from whether the kernel has type information
/// (`has_btf`). `None` if the cause is not a known one.
fn missing_feature(log: &str, has_btf: bool) -> Option<&'static str> {
    if !has_btf && log.contains("invalid args into func#") {
        return Some(
            "this kernel has no type information, which programs with global functions need: use one that was built with \
             CONFIG_DEBUG_INFO_BTF=y, as the kernels of all common distributions are",
        );
    }
    log.contains("misaligned packet access").then_some(
        "this kernel refuses unaligned loads of packet data: use one of an architecture with efficient unaligned access \
         (CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS), as x86-64 and arm64 have",
    )
}

fn program_error(name: &str, error: ProgramError) -> DataplaneError {
    match error {
        // EPERM means that a capability is missing. EACCES and EINVAL come from the verifier.
        ProgramError::LoadError { io_error, verifier_log } if io_error.raw_os_error() != Some(libc::EPERM) => {
            let log = verifier_log.to_string();
            if let Some(lack) = missing_feature(&log, Path::new(BTF).exists()) {
                return DataplaneError::Lacks { program: name.to_owned(), lack, source: io_error };
            }
            let lines: Vec<&str> = log.trim_end().lines().collect();
            let log = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            DataplaneError::Refused { program: name.to_owned(), log, source: io_error }
        }
        error => DataplaneError::new(format!("loading program {name}"), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_feature_is_found_in_the_verifiers_log() {
        let btf = "0: R1=ctx() R10=fp0\nCaller passes invalid args into func#8 ('decide')\nprocessed 60 insns";
        assert!(missing_feature(btf, false).is_some_and(|lack| lack.contains("CONFIG_DEBUG_INFO_BTF")));
        assert_eq!(missing_feature(btf, true), None);
        let aligned = "misaligned packet access off 0+14+2 size 4\nprocessed 9 insns";
        assert!(missing_feature(aligned, true).is_some_and(|lack| lack.contains("UNALIGNED")));
        assert_eq!(missing_feature("invalid access to packet, off=0 size=4", false), None);
    }
}
