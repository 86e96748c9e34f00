//! The demonstration: two sites on this machine, the same transfer over one tunnel, over kernel ECMP, and by ecmpvpn.
//!
//! Everything is real but the distance: the program, its tunnels, the links' rates. `cargo xtask demo` builds and
//! starts it, on the running kernel or in the virtual machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use comfy_table::{Cell, CellAlignment, Row, Table, presets};
use lab::dump::{Dump, idle_shared_things};
use lab::interrupt;
use lab::netns::Netns;
use lab::sites::{Lab, Options, Running, Underlay, binary};
use lab::skip::Feature;
use lab::traffic::TcpLoad;
use rustix::process::Signal;
use serde_json::Value;

/// How long the host may take to look as before.
const SETTLE: Duration = Duration::from_secs(20);

/// The links' rate where the machine can fill it, Mbit/s.
const MAX_RATE: f64 = 20.0;
/// Share of what the machine can carry that the links together may ask of it.
const USABLE: f64 = 0.4;
/// With so many flows a tunnel, none is left out but once in a million runs.
const FLOWS_PER_TUNNEL: u16 = 5;

/// Shows ecmpvpn at work between two sites in network namespaces, and cleans up.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The program to show; the one beside this program unless given.
    #[arg(long, value_name = "PATH")]
    ecmpvpn: Option<PathBuf>,
    /// Rate of each link between the sites, in each direction, Mbit/s [default: 20, or what this machine can fill].
    #[arg(long, value_name = "MBIT")]
    rate: Option<f64>,
    /// Length of each of the three transfers, seconds.
    #[arg(long, default_value_t = 6.0, value_name = "N")]
    seconds: f64,
    /// Links between the sites, and tunnels.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u8).range(2..=8))]
    members: u8,
    /// TCP connections at once.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    flows: u16,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !rustix::process::geteuid().is_root() {
        eprintln!("error: network namespaces need root: run this with sudo");
        return ExitCode::from(3);
    }
    interrupt::catch();
    match show(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupt::requested() => {
            eprintln!("interrupted; everything is taken down");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn step(text: &str) {
    eprintln!("==> {text}");
}

fn show(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    let program = match &arguments.ecmpvpn {
        Some(path) => fs::canonicalize(path).with_context(|| format!("--ecmpvpn {}", path.display()))?,
        None => binary()?,
    };
    let host = Netns::current()?;
    let before = (Dump::take(&host, &[])?, idle_shared_things()?);
    let (left_behind, result) = perform(arguments, &program);
    // The lab is gone here, whatever became of it.
    step("looking for anything left behind");
    left_behind.check(&host, &before)?;
    result?;
    eprintln!("    nothing is left: no interface, address, route, rule, sysctl, pin, namespace or process");
    eprintln!("    done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// What must not be there afterwards.
#[derive(Default)]
struct LeftBehind {
    sites: Vec<String>,
    namespaces: Vec<String>,
    processes: Vec<u32>,
}

impl LeftBehind {
    fn check(&self, host: &Netns, (before, idle_before): &(Dump, Vec<String>)) -> Result<()> {
        for name in &self.namespaces {
            ensure!(!Path::new("/run/netns").join(name).exists(), "network namespace {name} is left");
        }
        for pid in &self.processes {
            ensure!(!Path::new("/proc").join(pid.to_string()).exists(), "process {pid} is left");
        }
        let idle = idle_shared_things()?;
        let left: Vec<&String> = idle.iter().filter(|thing| !idle_before.contains(thing)).collect();
        ensure!(left.is_empty(), "left: {left:?}");
        // Before there were no sites, so whatever is theirs now is too much.
        let sites: Vec<&str> = self.sites.iter().map(String::as_str).collect();
        match before.wait_for_same(SETTLE, || Dump::take(host, &sites))? {
            None => Ok(()),
            Some(difference) => bail!("the host is not as it was before:\n{difference}"),
        }
    }
}

fn options(arguments: &Arguments) -> Options {
    let missing: Vec<String> = [Feature::WireGuard, Feature::Bonding]
        .into_iter()
        .filter(|feature| feature.missing().is_some())
        .map(|feature| feature.to_string())
        .collect();
    let (underlay, backend) = if missing.is_empty() {
        step("this kernel has WireGuard and bonding: using both, with a real LACP bond at each site");
        (Underlay::Bonded, "kernel")
    } else {
        step(&format!("this kernel has no {}:", missing.join(" and no ")));
        eprintln!("    tunnels are WireGuard in ecmpvpn's own process, on TUN devices;");
        eprintln!(
            "    the bond is emulated: routing rules put each tunnel on the link that the bond's hash would choose."
        );
        eprintln!("    `cargo xtask demo --vm` shows the same with kernel WireGuard and a real bond.");
        (Underlay::Routed, "userspace")
    };
    Options {
        underlay,
        backend,
        members: arguments.members,
        tunnels: usize::from(arguments.members),
        rate: None,
        ..Options::default()
    }
}

/// Builds the lab, measures, and takes it down again.
fn perform(arguments: &Arguments, program: &Path) -> (LeftBehind, Result<()>) {
    let mut left_behind = LeftBehind::default();
    let result = (|| {
        let options = options(arguments);
        step(&format!("building two sites joined by {} links", arguments.members));
        let lab = Lab::new(options, program)?;
        left_behind.sites = lab.sites.iter().map(|site| site.name.clone()).collect();
        let namespaces = lab.sites.iter().flat_map(|site| [&site.gateway, &site.host]);
        left_behind.namespaces = namespaces.map(|ns| ns.name().to_owned()).collect();
        let before = [lab.sites[0].dump()?, lab.sites[1].dump()?];
        interrupt::check()?;
        step("starting `ecmpvpn run` at both sites");
        let running = lab.run()?;
        left_behind.processes = running.iter().map(Running::pid).collect();
        for tunnel in &lab.tunnels {
            let [a, b] = tunnel.ports;
            let [there, back] = tunnel.members;
            eprintln!("    {}: UDP {a} <-> {b}, on link {there} there and link {back} back", tunnel.name);
        }
        let measured = shape(arguments, &lab).and_then(|rate| {
            let measured = measure(arguments, &lab, rate);
            lab.unshape().and(measured)
        });
        step("stopping `ecmpvpn run` at both sites");
        for (site, one) in running.into_iter().enumerate() {
            let output = one.output();
            let status = one.stop(Signal::INT)?;
            ensure!(status.success(), "`ecmpvpn run` ended with {status}:\n{output}");
            let left = before[site].wait_for_same(SETTLE, || lab.sites[site].dump())?;
            ensure!(left.is_none(), "`ecmpvpn run` left at {}:\n{}", lab.sites[site].name, left.unwrap_or_default());
        }
        measured
    })();
    (left_behind, result)
}

/// One row of the result.
struct Outcome {
    name: &'static str,
    goodput: f64,
    /// What each tunnel's device sent at site A, bytes.
    sent: Vec<u64>,
    /// What it received: acknowledgements.
    received: Vec<u64>,
}

/// Gives the links their rate. Unless one was asked for, they must be the limit and not this machine's processors, which
/// do the work of both sites.
fn shape(arguments: &Arguments, lab: &Lab) -> Result<f64> {
    let rate = if let Some(rate) = arguments.rate {
        rate
    } else {
        step("finding out what this machine can carry without limits");
        // Few flows: without limits many would fight for the processors, and lose more than they carry.
        let capacity = TcpLoad::timed(usize::from(arguments.members), 3.0).run(lab.path_v4())?.goodput();
        eprintln!("    {capacity:.0} Mbit/s");
        (capacity * USABLE / f64::from(arguments.members)).floor().clamp(2.0, MAX_RATE)
    };
    step(&format!("limiting each of the {} links to {rate} Mbit/s in each direction", arguments.members));
    lab.shape(rate)?;
    Ok(rate)
}

fn measure(arguments: &Arguments, lab: &Lab, rate: f64) -> Result<()> {
    let mut outcomes = Vec::new();
    let mut stats_before = Vec::new();
    let every: Vec<usize> = (0..lab.tunnels.len()).collect();
    for (name, tunnels) in [("one tunnel", Some(&every[..1])), ("kernel ECMP", Some(&every[..])), ("ecmpvpn", None)] {
        interrupt::check()?;
        step(&format!("{name}: {} TCP flows for {} s", arguments.flows, arguments.seconds));
        if let Some(tunnels) = tunnels {
            lab.bypass(tunnels)?;
        }
        stats_before = vec![lab.stats(0)?, lab.stats(1)?];
        let outcome = transfer(arguments, lab, name);
        if tunnels.is_some() {
            lab.end_bypass()?;
        }
        let outcome = outcome?;
        eprintln!("    {:.1} Mbit/s", outcome.goodput);
        outcomes.push(outcome);
    }
    interrupt::check()?;
    println!("\n{}\n", results(arguments, lab, rate, &outcomes));
    for (site, (title, before)) in ["site A, the sender", "site B, the receiver"].iter().zip(&stats_before).enumerate()
    {
        println!("`ecmpvpn stats --json` at {title}, the last transfer:\n{}\n", counters(before, &lab.stats(site)?));
    }
    let last = outcomes.last().context("three outcomes")?;
    // Two hundred packets: probes and handshakes would not make that.
    let unused = (0..lab.tunnels.len()).find(|slot| last.sent[*slot] + last.received[*slot] < 10_000);
    match unused {
        None => eprintln!("    all {} tunnels carried traffic", lab.tunnels.len()),
        Some(slot) => {
            let text = format!("{} carried no traffic under ecmpvpn", lab.tunnels[slot].name);
            ensure!(arguments.flows < FLOWS_PER_TUNNEL * u16::from(arguments.members), text);
            eprintln!("    {text}: {} flows need not meet all tunnels", arguments.flows);
        }
    }
    Ok(())
}

fn transfer(arguments: &Arguments, lab: &Lab, name: &'static str) -> Result<Outcome> {
    let bytes = || -> Result<Vec<(u64, u64)>> {
        let device = |name: &str| lab.sites[0].device(name).map(|device| (device.tx_bytes, device.rx_bytes));
        lab.tunnels.iter().map(|tunnel| device(&tunnel.name)).collect()
    };
    let before = bytes()?;
    let report = TcpLoad::timed(usize::from(arguments.flows), arguments.seconds).run(lab.path_v4())?;
    let gained = bytes()?.into_iter().zip(before).map(|(after, before)| (after.0 - before.0, after.1 - before.1));
    let (sent, received) = gained.unzip();
    Ok(Outcome { name, goodput: report.goodput(), sent, received })
}

fn right(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

fn megabytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let megabytes = bytes as f64 / 1e6;
    format!("{megabytes:.1} MB")
}

fn results(arguments: &Arguments, lab: &Lab, rate: f64, outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let mut header = Row::from(vec![
        Cell::new(format!("{} TCP flows, {} links of {} Mbit/s", arguments.flows, arguments.members, rate)),
        right("goodput".to_owned()),
        right("ratio".to_owned()),
    ]);
    for tunnel in &lab.tunnels {
        header.add_cell(right(tunnel.name.clone()));
    }
    table.set_header(header);
    for outcome in outcomes {
        let mut row = Row::from(vec![
            Cell::new(outcome.name),
            right(format!("{:.1} Mbit/s", outcome.goodput)),
            right(format!("{:.2}", outcome.goodput / outcomes[0].goodput)),
        ]);
        for sent in &outcome.sent {
            row.add_cell(right(megabytes(*sent)));
        }
        table.add_row(row);
    }
    table
}

/// What `after` has counted since `before`.
fn counters(before: &Value, after: &Value) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let fields = ["tx_packets", "tx_bytes", "rx_packets", "rx_bytes"];
    let mut header = Row::from(vec![Cell::new("tunnel"), Cell::new("state"), Cell::new("member")]);
    for field in fields {
        header.add_cell(right(field.to_owned()));
    }
    table.set_header(header);
    for (slot, tunnel) in after["tunnels"].as_array().into_iter().flatten().enumerate() {
        let mut row = Row::new();
        for field in ["name", "state", "member"] {
            row.add_cell(Cell::new(tunnel[field].as_str().unwrap_or("-")));
        }
        for field in fields {
            let count = |value: &Value| value[field].as_u64();
            let gained = count(tunnel).zip(count(&before["tunnels"][slot])).map(|(after, before)| after - before);
            row.add_cell(right(gained.map_or("-".to_owned(), |count| count.to_string())));
        }
        table.add_row(row);
    }
    table
}
