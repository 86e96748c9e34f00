//! Measures what the egress program costs for each packet, compared with a program that only redirects.
//!
//! The kernel runs a program many times on one packet. To make many flows, both programs themselves give the packet
//! another source address and port each time. The cost of that is the same for both, and is shown separately.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{TestRun as _, TestRunOptions};
use comfy_table::{Cell, CellAlignment, Table, presets};
use ecmpvpn::config::{InterfaceName, Policy, Rule};
use ecmpvpn::dataplane::{Loaded, Options, Pins, TestRun, View};
use ecmpvpn::plan::{PeerTable, SteeringTable};
use ecmpvpn_common::layout::{peer_flags, programs, test_run};
use lab::bpffs::Bpffs;
use serde_json::{Value, json};

use crate::output::{self, median};

const MANY: u32 = 1_000_000;
/// The return value of a program that redirects.
const TC_ACT_REDIRECT: u32 = 7;
/// That of one that leaves the packet where it is.
const TC_ACT_UNSPEC: u32 = u32::MAX;
/// Longest time that packets are held, in units of 4.1 us.
const BOUND: u32 = 24_000;
/// What the policy `adaptive` may cost, relative to only redirecting, while flows do not pause.
const TARGET: f64 = 2.0;

/// Time since the last packet of the same bucket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// So short that the bucket keeps its tunnel.
    Busy,
    /// So long that the bucket may move with every packet.
    Paused,
}

/// What a variant measures.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The program that only redirects.
    Redirects,
    /// The program that steers, with this policy.
    Steers(Policy),
    /// The same with `spray`, for a far end that restores order.
    Stamps,
    /// The program for packets that arrive, for packets without a stamp.
    Receives,
    /// The same for packets with a stamp, which the program writes itself: it takes their mark away.
    Restores,
}

impl Stage {
    fn policy(self) -> Option<Policy> {
        match self {
            Self::Redirects => None,
            Self::Steers(policy) => Some(policy),
            Self::Stamps | Self::Receives | Self::Restores => Some(Policy::Spray),
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Redirects => programs::BASELINE,
            Self::Steers(_) | Self::Stamps => programs::EGRESS,
            Self::Receives | Self::Restores => programs::INGRESS,
        }
    }
}

/// One program and the settings of its runs.
struct Variant {
    stage: Stage,
    tunnels: u8,
    /// Number of rules. The packets match the last one.
    rules: u16,
    flows: u32,
    pace: Pace,
    loaded: Loaded,
    /// The program is that of another build.
    is_other: bool,
    /// Instructions that the verifier processed. 0 if the kernel does not report it.
    verified: u32,
    /// Number of the flow of the first packet in the next round.
    next: u32,
    /// Nanoseconds for each packet, one value for each round.
    times: Vec<f64>,
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.stage {
            Stage::Redirects => write!(f, "only redirects, {} flows", self.flows),
            Stage::Stamps => write!(f, "spray and stamp, {} tunnels, {} flows", self.tunnels, self.flows),
            Stage::Receives => write!(f, "receive, no stamp"),
            Stage::Restores => write!(f, "receive, restore order (and make the stamp)"),
            Stage::Steers(policy) => {
                let pace = if self.pace == Pace::Paused { ", each after a pause" } else { "" };
                let rules = match self.rules {
                    0 => String::new(),
                    1 => ", 1 rule".to_owned(),
                    rules => format!(", {rules} rules"),
                };
                write!(f, "{}, {} tunnels{rules}, {} flows{pace}", policy.as_str(), self.tunnels, self.flows)
            }
        }
    }
}

impl Variant {
    /// Loads `object`, or the object of this build if there is none.
    fn new(object: Option<&[u8]>, stage: Stage, tunnels: u8, rules: u16, flows: u32, pace: Pace) -> Result<Self> {
        let name = |slot| InterfaceName::new(&format!("wg{slot}"));
        let names = (0..tunnels).map(name).collect::<Result<Vec<_>, _>>().map_err(anyhow::Error::msg)?;
        // Test runs have loopback, whose index is 1.
        let ifindexes: BTreeMap<InterfaceName, u32> = names.iter().cloned().zip(1..).collect();
        let table = SteeringTable {
            rules: (1..=rules).map(|number| rule(PORT + number - rules)).collect(),
            seed: 1,
            mss_clamp: true,
            flowlet_gap_us: (pace == Pace::Paused).then_some(1),
            peers: vec![PeerTable {
                name: "site-b".to_owned(),
                policy: stage.policy().unwrap_or(Policy::Hash),
                restore_order: true,
                prefixes: vec!["10.20.0.0/16".parse()?, "fd00:20::/48".parse()?],
                tunnels: names.into_iter().map(|name| (name, Some(1))).collect(),
            }],
        };
        let options = Options {
            test_run: TestRun::Timed,
            flows: if flows == 1 && stage != Stage::Restores { 0 } else { flows },
            object: object.map(<[u8]>::to_vec),
            ..Options::default()
        };
        let mut loaded = Loaded::new(&table, 100, &ifindexes, &options)?;
        if stage == Stage::Redirects {
            loaded.program_mut(programs::BASELINE)?.load().context("loading the program that only redirects")?;
        }
        if matches!(stage, Stage::Stamps | Stage::Receives | Stage::Restores) {
            agree_on_order(&mut loaded)?;
        }
        let verified = loaded.program_mut(stage.program())?.info()?.verified_instruction_count().unwrap_or(0);
        let is_other = object.is_some();
        Ok(Self { is_other, stage, tunnels, rules, flows, pace, loaded, verified, next: 0, times: Vec::new() })
    }

    /// Runs `packets` packets twice and measures the second time. While the other variants ran, every flow has paused,
    /// so the first packet of each flow chooses a tunnel again.
    fn round(&mut self, packets: u32) -> Result<()> {
        self.run(packets)?;
        let time = self.run(packets)?;
        self.times.push(time.as_secs_f64() * 1e9 / f64::from(packets));
        Ok(())
    }

    /// Runs `packets` packets. Returns the time that they took.
    fn run(&mut self, packets: u32) -> Result<Duration> {
        let frame = frame(self.next);
        self.next = if self.flows == 1 { 0 } else { (self.next + packets) % self.flows };
        let program = self.loaded.program_mut(self.stage.program())?;
        let options = TestRunOptions { data_in: Some(&frame), repeat: packets, ..TestRunOptions::default() };
        // The kernel's own figure is not used, because it is truncated to whole nanoseconds.
        let since = Instant::now();
        let result = program.test_run(options)?;
        let time = since.elapsed();
        let expected = if self.stage == Stage::Receives { TC_ACT_UNSPEC } else { TC_ACT_REDIRECT };
        // An earlier build's program makes no stamps itself.
        let is_earlier = self.is_other && self.stage == Stage::Restores;
        ensure!(is_earlier || result.return_value == expected, "{self} returned {}", result.return_value);
        Ok(time)
    }

    fn median(&self) -> f64 {
        median(self.times.clone())
    }
}

/// Sets what both ends would agree on, so that order is restored.
fn agree_on_order(loaded: &mut Loaded) -> Result<()> {
    let bpffs = Bpffs::new()?;
    let pins = Pins::below(&bpffs.root(), "micro");
    std::fs::create_dir_all(pins.dir())?;
    loaded.pin(&pins)?;
    // The maps stay without the pins.
    let view = View::open(&pins)?;
    view.peer(0).context("a peer")?.flags.set(peer_flags::STAMP | peer_flags::UNMARK);
    let order = view.order(0).context("a peer")?;
    order.bound.set(BOUND);
    order.device.set(1);
    Ok(())
}

/// Destination port of all packets.
const PORT: u16 = 5201;

/// A rule that changes only the cost.
fn rule(port: u16) -> Rule {
    Rule {
        src: None,
        dst: None,
        proto: Some(6),
        src_ports: Vec::new(),
        dst_ports: vec![(port, port)],
        dscp: None,
        fwmark: None,
        policy: Some(Policy::Adaptive),
        tunnels: Vec::new(),
        pin: false,
    }
}

/// A TCP packet of flow `number` behind an Ethernet header.
fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0; test_run::ETHERNET_HEADER as usize];
    // An Ethernet type for experiments. The program looks only at the IP version.
    frame[12..].copy_from_slice(&[0x88, 0xb5]);
    frame.extend([0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend((0x0a00_0000 | number).to_be_bytes());
    frame.extend([10, 20, 0, 10]);
    frame.extend([number.to_be_bytes()[2], number.to_be_bytes()[3]]);
    frame.extend(PORT.to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.resize(test_run::ETHERNET_HEADER as usize + 60, 0);
    frame
}

fn variants(object: Option<&[u8]>) -> Result<Vec<Variant>> {
    let mut variants = Vec::new();
    for flows in [1, MANY] {
        variants.push(Variant::new(object, Stage::Redirects, 2, 0, flows, Pace::Busy)?);
    }
    for policy in [Policy::Hash, Policy::Flowlet, Policy::Adaptive, Policy::Spray] {
        for tunnels in [2, 32] {
            for (flows, pace) in [(1, Pace::Busy), (MANY, Pace::Busy), (MANY, Pace::Paused)] {
                // Pauses change nothing if every packet chooses a tunnel, or if none does.
                if pace == Pace::Busy || matches!(policy, Policy::Flowlet | Policy::Adaptive) {
                    variants.push(Variant::new(object, Stage::Steers(policy), tunnels, 0, flows, pace)?);
                }
            }
        }
    }
    for rules in [1, 64] {
        for flows in [1, MANY] {
            variants.push(Variant::new(object, Stage::Steers(Policy::Adaptive), 2, rules, flows, Pace::Busy)?);
        }
    }
    for tunnels in [2, 32] {
        for flows in [1, MANY] {
            variants.push(Variant::new(object, Stage::Stamps, tunnels, 0, flows, Pace::Busy)?);
        }
    }
    for stage in [Stage::Receives, Stage::Restores] {
        variants.push(Variant::new(object, stage, 2, 0, 1, Pace::Busy)?);
    }
    Ok(variants)
}

/// Measures every variant in each round, and prints medians. `other` is the object of another build.
pub fn measure(rounds: u32, packets: u32, only: &str, other: Option<&[u8]>) -> Result<()> {
    eprintln!("==> loading the programs");
    let load = |object| -> Result<Vec<Variant>> {
        let mut variants = variants(object).context("loading the programs needs root")?;
        variants.retain(|variant| variant.stage == Stage::Redirects || variant.to_string().contains(only));
        Ok(variants)
    };
    let mut variants = load(None)?;
    let mut others = other.map(|object| load(Some(object))).transpose()?.unwrap_or_default();
    eprintln!("==> {rounds} rounds of {packets} packets each for {} variants", variants.len() + others.len());
    for round in 0..rounds as usize {
        // Another variant begins each time, so that none always follows the same one.
        let count = variants.len();
        for at in (0..count).map(|at| (at + round) % count) {
            let mut pair: Vec<&mut Variant> = others.get_mut(at).into_iter().chain([&mut variants[at]]).collect();
            if round % 2 == 0 {
                pair.reverse();
            }
            pair.into_iter().try_for_each(|variant| variant.round(packets))?;
        }
    }

    println!(
        "\nBPF_PROG_TEST_RUN, medians of {rounds} rounds of {packets} packets; ratios to the program that only redirects"
    );
    let rows = print_costs(&variants);
    print_comparison(&variants, &others);
    output::print(&json!({
        "series": "steering",
        "making_flows_ns": making_flows(&variants),
        "rounds": rounds,
        "rows": rows,
        "other_ns": others.iter().map(Variant::median).collect::<Vec<_>>(),
    }));
    Ok(())
}

/// The cost of giving each packet another flow, nanoseconds.
fn making_flows(variants: &[Variant]) -> f64 {
    variants[1].median() - variants[0].median()
}

/// Prints the cost of every variant, and returns it as JSON.
fn print_costs(variants: &[Variant]) -> Vec<Value> {
    let base = [variants[0].median(), variants[1].median()];
    let varying = making_flows(variants);
    let mut table = new_table(&["program", "ns a packet", "ratio", "without making flows", "target"]);
    let mut rows = Vec::new();
    for variant in variants {
        let many = variant.flows > 1;
        let time = variant.median();
        let ratio = time / base[usize::from(many)];
        let alone = if many { (time - varying) / base[0] } else { ratio };
        let has_target =
            variant.stage == Stage::Steers(Policy::Adaptive) && variant.rules == 0 && variant.pace == Pace::Busy;
        let target = has_target.then_some(ratio <= TARGET && alone <= TARGET);
        let verdict = target.map_or("", |met| if met { "<= 2.0: met" } else { "<= 2.0: MISSED" });
        let mut cells = vec![Cell::new(variant)];
        let numbers = [format!("{time:.1}"), format!("{ratio:.2}"), format!("{alone:.2}")];
        cells.extend(numbers.map(right_aligned));
        cells.push(Cell::new(verdict));
        table.add_row(cells);
        rows.push(json!({
            "program": variant.to_string(),
            "policy": variant.stage.policy().map(Policy::as_str),
            "tunnels": variant.tunnels,
            "rules": variant.rules,
            "flows": variant.flows,
            "paused": variant.pace == Pace::Paused,
            "ns": time,
            "ratio": ratio,
            "ratio_without_making_flows": alone,
            "target_met": target,
            "verified_instructions": variant.verified,
        }));
    }
    println!("making each packet another flow's costs {varying:.1} ns\n{table}\n");
    rows
}

/// Prints both builds side by side, if there are two. The ratio is the median over the rounds, because a disturbance of
/// the machine affects both builds of a round alike.
fn print_comparison(variants: &[Variant], others: &[Variant]) {
    if others.is_empty() {
        return;
    }
    let mut table = new_table(&["program", "other build, ns", "this build, ns", "ratio", "verified instructions"]);
    for (variant, other) in variants.iter().zip(others) {
        let ratio = median(variant.times.iter().zip(&other.times).map(|(this, other)| this / other).collect());
        let numbers = [format!("{:.1}", other.median()), format!("{:.1}", variant.median()), format!("{ratio:.3}")];
        let mut cells = vec![Cell::new(variant)];
        cells.extend(numbers.map(right_aligned));
        cells.push(right_aligned(format!("{} -> {}", other.verified, variant.verified)));
        table.add_row(cells);
    }
    println!("{table}\n");
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(header.iter().copied());
    table
}

fn right_aligned(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}
