//! A lab, and who competes in it.

use std::cell::Cell;
use std::path::Path as FsPath;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::netns::Netns;
use lab::sites::{Lab, Options, Running, Underlay};
use lab::skip::Feature;
use lab::topology::Quality;
use lab::traffic::{Path, TcpLoad};
use serde_json::Value;

use crate::Arguments;

/// Members of the bond, and tunnels.
pub const MEMBERS: u8 = 3;
/// The first UDP port of the recipe, at both ends: with a lab's addresses the bond then has all tunnels on one member.
const PORT: u16 = 5_000;
/// Before anything is measured all links are filled for so long, seconds: policies learn what links carry.
const WARM_UP: f64 = 1.5;
const WARM_UP_FLOWS: usize = 12;

/// Who carries the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contestant {
    /// The first tunnel by itself.
    OneTunnel,
    /// The published recipe: the kernel's ECMP over tunnels with equal ports at both ends, all on one member of the bond.
    EqualPorts,
    /// The kernel's ECMP over all tunnels, with a layer 4 hash and the same planned ports as ecmpvpn.
    Ecmp,
    /// The program under test.
    Ecmpvpn,
}

impl Contestant {
    /// In tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneTunnel => "one tunnel",
            Self::EqualPorts => "kernel ECMP, equal ports",
            Self::Ecmp => "kernel ECMP",
            Self::Ecmpvpn => "ecmpvpn",
        }
    }
}

/// How the links are.
#[derive(Clone, Debug)]
pub struct Links {
    /// Of each tunnel's link in each direction, 10^6 bits a second.
    pub rates: Vec<f64>,
    /// By so much each tunnel's way there, and back, is longer than the quickest's, milliseconds; none: all are alike.
    pub delays: Vec<f64>,
    /// By so much packets take longer or shorter, milliseconds.
    pub jitter: f64,
    /// Percent of the packets that get lost in each direction.
    pub loss: f64,
    /// What a link takes each way; `None`: the ports are joined directly.
    pub wire: Option<Duration>,
    /// Whether each tunnel has the same port at both ends.
    pub equal_ports: bool,
}

impl Links {
    /// Links of one rate.
    pub fn alike(arguments: &Arguments, rate: f64) -> Self {
        // As short as with cables in one town where links are fast, and windows would have to be large.
        let delay = Duration::from_micros(if rate < 500.0 { 2_000 } else { 500 });
        Self {
            rates: vec![rate; usize::from(MEMBERS)],
            delays: Vec::new(),
            jitter: 0.0,
            loss: 0.0,
            wire: arguments.simulated.then_some(delay),
            equal_ports: false,
        }
    }

    /// What happens on the link of a tunnel.
    fn quality(&self, wire: Duration, tunnel: usize) -> Quality {
        let more = self.delays.get(tunnel).copied().unwrap_or(0.0);
        let milliseconds = |time: f64| Duration::from_secs_f64(time / 1e3);
        Quality { delay: wire + milliseconds(more), jitter: milliseconds(self.jitter), loss: self.loss }
    }
}

/// Two sites with `ecmpvpn run` at both.
pub struct Contest {
    pub lab: Lab,
    policy: Cell<&'static str>,
    _running: [Running; 2],
}

impl Contest {
    /// Builds it, and lets it learn what the links carry.
    pub fn new(program: &FsPath, policy: &'static str, links: &Links, extra: &str) -> Result<Self> {
        let real = [Feature::WireGuard, Feature::Bonding].iter().all(|feature| feature.missing().is_none());
        let (underlay, backend) = if real { (Underlay::Bonded, "kernel") } else { (Underlay::Routed, "userspace") };
        let options = Options {
            underlay,
            backend,
            policy,
            members: MEMBERS,
            tunnels: usize::from(MEMBERS),
            wires: links.wire.map(Quality::delayed),
            ports: links.equal_ports.then(|| (PORT..).take(usize::from(MEMBERS)).map(|port| [port; 2]).collect()),
            extra: extra.to_owned(),
            ..Options::default()
        };
        let lab = Lab::new(options, program)?;
        if links.equal_ports {
            let on_one = lab.tunnels.iter().all(|tunnel| tunnel.members == lab.tunnels[0].members);
            ensure!(on_one, "the recipe's tunnels are not all on one member: {:?}", lab.tunnels);
        }
        for site in &lab.sites {
            // The kernel's ECMP takes a local socket's random hash for the flow's, and TCP draws it anew after a timeout.
            // Flows that come through a network card keep theirs.
            for end in [&site.host, &site.gateway] {
                end.sysctl("net/core/txrehash", "0")?;
            }
        }
        if let Some(wire) = links.wire {
            for (number, tunnel) in lab.tunnels.iter().enumerate() {
                let quality = links.quality(wire, number);
                // A tunnel may come back by another member than it leaves by.
                lab.wires()?.set_all(&[(tunnel.members[0], 0, quality), (tunnel.members[1], 1, quality)])?;
            }
        }
        let running = lab.run()?;
        lab.shape_each(&of_members(&lab, links)?)?;
        if links.wire.is_none() {
            without_wires(&lab, links)?;
        }
        TcpLoad::timed(WARM_UP_FLOWS, WARM_UP).run(lab.path_of_gateways_v4()).context("filling the links")?;
        Ok(Self { lab, policy: Cell::new(policy), _running: running })
    }

    /// Has both sites steer by another policy.
    pub fn set_policy(&self, policy: &'static str) -> Result<()> {
        if self.policy.replace(policy) == policy {
            return Ok(());
        }
        for site in [0, 1] {
            let (code, _, complaint) = self.lab.ecmpvpn(site, &["policy", "set", policy])?;
            ensure!(code == 0, "`ecmpvpn policy set {policy}` ended with {code}: {complaint}");
        }
        Ok(())
    }

    /// Runs `work` with the traffic on its way over `who`.
    pub fn with<T>(&self, who: Contestant, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let tunnels: Vec<usize> = match who {
            Contestant::OneTunnel => vec![0],
            Contestant::Ecmp | Contestant::EqualPorts => (0..self.lab.tunnels.len()).collect(),
            Contestant::Ecmpvpn => return work(),
        };
        self.lab.bypass(&tunnels)?;
        let result = work();
        self.lab.end_bypass()?;
        result
    }
}

/// The members' rates, where the tunnels' links are to have these.
fn of_members(lab: &Lab, links: &Links) -> Result<Vec<f64>> {
    ensure!(links.rates.len() == usize::from(MEMBERS), "--rates has {} numbers, not {MEMBERS}", links.rates.len());
    let mut rates = links.rates.clone();
    if !links.equal_ports {
        for (tunnel, rate) in lab.tunnels.iter().zip(&links.rates) {
            rates[usize::from(tunnel.members[0])] = *rate;
        }
    }
    Ok(rates)
}

/// Delays and losses at site A's tunnels: before the tunnel, so that the member's shaper still comes last and sets the rate.
fn without_wires(lab: &Lab, links: &Links) -> Result<()> {
    for (number, tunnel) in lab.tunnels.iter().enumerate() {
        let quality = links.quality(Duration::ZERO, number);
        if quality != Quality::default() {
            lab.sites[0].gateway.tc(&format!("qdisc add dev {} root {}", tunnel.name, quality.discipline()))?;
        }
    }
    Ok(())
}

impl Drop for Contest {
    /// Detaching programs changes the kernel's code, of which an emulated machine can die: by then what was printed is to
    /// be outside.
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Counters that tell how a transfer went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// What each tunnel's device sent at site A, bytes.
    pub sent: Vec<u64>,
    /// Segments that the sending end sent again.
    pub retransmitted: u64,
    /// Segments that the receiving end received.
    pub segments: u64,
    /// Segments that the receiving end received after a gap.
    pub out_of_order: u64,
    /// Buckets that the program moved at a gap, and while busy.
    pub moves: [u64; 2],
}

impl Counters {
    /// What they are now, for traffic over `path`.
    pub fn read(lab: &Lab, path: Path<'_>) -> Result<Self> {
        let a = &lab.sites[0];
        let sent = lab.tunnels.iter().map(|tunnel| Ok(a.device(&tunnel.name)?.tx_bytes)).collect::<Result<_>>()?;
        let stats = lab.stats(0)?;
        let moves = |field: &str| {
            let tunnels = stats["tunnels"].as_array().into_iter().flatten();
            tunnels.filter_map(|tunnel: &Value| tunnel[field].as_u64()).sum()
        };
        Ok(Self {
            sent,
            retransmitted: kernel_counter(path.from, "snmp", "Tcp:", "RetransSegs")?,
            segments: kernel_counter(path.to, "snmp", "Tcp:", "InSegs")?,
            out_of_order: kernel_counter(path.to, "netstat", "TcpExt:", "TCPOFOQueue")?,
            moves: [moves("flowlet_moves"), moves("rebalance_moves")],
        })
    }

    /// What they have gained since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            sent: self.sent.iter().zip(&before.sent).map(|(now, then)| now - then).collect(),
            retransmitted: self.retransmitted - before.retransmitted,
            segments: self.segments - before.segments,
            out_of_order: self.out_of_order - before.out_of_order,
            moves: [self.moves[0] - before.moves[0], self.moves[1] - before.moves[1]],
        }
    }

    /// Each tunnel's share of what was sent, percent.
    pub fn shares(&self) -> Vec<f64> {
        let sum = self.sent.iter().sum::<u64>().max(1);
        #[expect(clippy::cast_precision_loss, reason = "shown as whole percents")]
        self.sent.iter().map(|sent| *sent as f64 / sum as f64 * 100.0).collect()
    }
}

/// A counter of a namespace's kernel: from `/proc/net/FILE`, whose lines come in pairs, names and values.
fn kernel_counter(ns: &Netns, file: &str, group: &str, name: &str) -> Result<u64> {
    let text = ns.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")))?;
    let mut lines = text.lines().filter(|line| line.starts_with(group)).map(str::split_whitespace);
    let (names, values) = lines.next().zip(lines.next()).with_context(|| format!("{file} has no {group}"))?;
    let value = names.zip(values).find(|(found, _)| *found == name).with_context(|| format!("{file} has no {name}"))?;
    value.1.parse().with_context(|| format!("{name} is {}", value.1))
}

/// Between two transfers, so that queues and acknowledgements of one do not count for the next.
pub const PAUSE: Duration = Duration::from_millis(300);
