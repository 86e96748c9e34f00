//! A lab, and the methods that are compared in it.

use std::cell::Cell;
use std::path::Path as FsPath;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::netns::Netns;
use crate::sites::{Lab, Options, Overrides, Running, Underlay};
use crate::skip::Feature;
use crate::topology::Quality;
use crate::traffic::{Path, TcpLoad};

/// Number of members of the bond, and of tunnels, unless the links say otherwise.
pub const MEMBERS: u8 = 3;
/// The first UDP port of the recipe, at both ends. With the addresses of a lab, the bond then puts all tunnels on one
/// member.
const PORT: u16 = 5_000;
/// How long all links are filled before the first measurement, seconds. The policies learn what the links carry.
const WARM_UP: f64 = 1.5;
const WARM_UP_FLOWS: usize = 12;
/// How long a site may take until its tunnels carry traffic.
const PATIENCE: Duration = Duration::from_secs(60);

/// A way to carry the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// The first tunnel alone.
    OneTunnel,
    /// The published recipe: the kernel's ECMP over tunnels with equal ports at both ends, all on one member.
    EqualPorts,
    /// The kernel's ECMP over all tunnels, with a layer 4 hash and the same planned ports as ecmpvpn.
    Ecmp,
    /// The program under test.
    Ecmpvpn,
}

impl Method {
    /// The name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneTunnel => "one tunnel",
            Self::EqualPorts => "kernel ECMP, equal ports",
            Self::Ecmp => "kernel ECMP",
            Self::Ecmpvpn => "ecmpvpn",
        }
    }
}

/// Properties of the links.
#[derive(Clone, Debug)]
pub struct Links {
    /// Rate of each tunnel's link in each direction, 10^6 bits a second. There are as many links as rates.
    pub rates: Vec<f64>,
    /// Additional delay of each tunnel in each direction, compared with the fastest one, milliseconds. Empty: all are
    /// alike.
    pub delays: Vec<f64>,
    /// Random variation of the delay, up and down, milliseconds.
    pub jitter: f64,
    /// Packets that each tunnel's link loses in each direction, percent. Empty: none.
    pub losses: Vec<f64>,
    /// Delay of a link in each direction. `None`: the ports are joined directly.
    pub wire: Option<Duration>,
    /// Whether each tunnel has the same port at both ends.
    pub equal_ports: bool,
    /// Whether each flow has a queue of its own at the shaped ports. If not, all packets wait in one queue.
    pub fair_queues: bool,
    /// Whether site B is a gateway without ecmpvpn.
    pub plain_far_end: bool,
}

impl Links {
    /// [`MEMBERS`] links that all have the same rate, with a delay if time is simulated.
    pub fn alike(simulated: bool, rate: f64) -> Self {
        // Fast links have a delay as between sites in one town, because a longer delay would need large windows.
        let delay = Duration::from_micros(if rate < 500.0 { 2_000 } else { 500 });
        Self {
            rates: vec![rate; usize::from(MEMBERS)],
            delays: Vec::new(),
            jitter: 0.0,
            losses: Vec::new(),
            wire: simulated.then_some(delay),
            equal_ports: false,
            fair_queues: false,
            plain_far_end: false,
        }
    }

    /// Delay, jitter and loss of a tunnel's link.
    fn quality(&self, wire: Duration, tunnel: usize) -> Quality {
        let of = |each: &[f64]| each.get(tunnel).copied().unwrap_or(0.0);
        let milliseconds = |time: f64| Duration::from_secs_f64(time / 1e3);
        Quality {
            delay: wire + milliseconds(of(&self.delays)),
            jitter: milliseconds(self.jitter),
            loss: of(&self.losses),
        }
    }
}

/// Two sites, with `ecmpvpn run` at both, or at A only if the links say so.
#[derive(Debug)]
pub struct Comparison {
    pub lab: Lab,
    policy: Cell<&'static str>,
    running: Vec<Running>,
}

impl Comparison {
    /// Builds the sites, starts ecmpvpn, and lets it learn what the links carry.
    ///
    /// # Errors
    /// The sites cannot be built, or no traffic flows between them.
    pub fn new(program: &FsPath, policy: &'static str, links: &Links, overrides: &Overrides) -> Result<Self> {
        let comparison = Self::cold(program, policy, links, overrides)?;
        TcpLoad::timed(WARM_UP_FLOWS, WARM_UP)
            .run(comparison.lab.path_of_gateways_v4())
            .context("filling the links")?;
        Ok(comparison)
    }

    /// As [`Comparison::new`], but ecmpvpn does not know yet what the links carry.
    ///
    /// # Errors
    /// The sites cannot be built, or no traffic flows between them.
    pub fn cold(program: &FsPath, policy: &'static str, links: &Links, overrides: &Overrides) -> Result<Self> {
        let real = [Feature::WireGuard, Feature::Bonding].iter().all(|feature| feature.missing().is_none());
        let (underlay, backend) = if real { (Underlay::Bonded, "kernel") } else { (Underlay::Routed, "userspace") };
        let options = Options {
            underlay,
            backend,
            policy,
            members: u8::try_from(links.rates.len())?,
            tunnels: links.rates.len(),
            wires: links.wire.map(Quality::delayed),
            ports: links.equal_ports.then(|| (PORT..).take(links.rates.len()).map(|port| [port; 2]).collect()),
            overrides: overrides.clone(),
            ..Options::default()
        };
        let lab = Lab::new(options, program)?;
        if links.equal_ports {
            let on_one = lab.tunnels.iter().all(|tunnel| tunnel.members == lab.tunnels[0].members);
            ensure!(on_one, "the recipe's tunnels are not all on one member: {:?}", lab.tunnels);
        }
        for site in &lab.sites {
            // For a local socket, the kernel's ECMP uses the random hash of the socket, which TCP changes after a
            // timeout. Flows that come through a network card keep their hash.
            for end in [&site.host, &site.gateway] {
                end.sysctl("net/core/txrehash", "0")?;
            }
        }
        if let Some(wire) = links.wire {
            for (number, tunnel) in lab.tunnels.iter().enumerate() {
                let quality = links.quality(wire, number);
                // A tunnel may use different members in the two directions.
                lab.wires()?.set_all(&[(tunnel.members[0], 0, quality), (tunnel.members[1], 1, quality)])?;
            }
        }
        let running = if links.plain_far_end {
            lab.plain(1)?;
            let mut near = lab.start(0)?;
            near.wait_until_up()?;
            lab.wait_until_reachable(PATIENCE)?;
            lab.wait_until_none_is_down(0, PATIENCE)?;
            vec![near]
        } else {
            lab.run()?.into()
        };
        lab.shape_each(&of_members(&lab, links))?;
        if links.fair_queues {
            lab.queue_fairly()?;
        }
        if links.wire.is_some() {
            // Until LACP had put all members to use, tunnels left by other members. Their least round trips count for
            // up to 20 s.
            std::thread::sleep(Duration::from_secs(20));
        }
        if links.wire.is_none() {
            without_wires(&lab, links)?;
        }
        Ok(Self { lab, policy: Cell::new(policy), running })
    }

    /// Sets the policy at the sites that run ecmpvpn.
    ///
    /// # Errors
    /// A site refuses.
    pub fn set_policy(&self, policy: &'static str) -> Result<()> {
        if self.policy.replace(policy) == policy {
            return Ok(());
        }
        for site in 0..self.running.len() {
            let (code, _, complaint) = self.lab.ecmpvpn(site, &["policy", "set", policy])?;
            ensure!(code == 0, "`ecmpvpn policy set {policy}` ended with {code}: {complaint}");
        }
        Ok(())
    }

    /// Runs `work` while the method `who` carries the traffic.
    ///
    /// # Errors
    /// Routes cannot be set, or `work` fails.
    pub fn with<T>(&self, who: Method, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let tunnels: Vec<usize> = match who {
            Method::OneTunnel => vec![0],
            Method::Ecmp | Method::EqualPorts => (0..self.lab.tunnels.len()).collect(),
            Method::Ecmpvpn => return work(),
        };
        self.lab.bypass(&tunnels)?;
        let result = work();
        self.lab.end_bypass()?;
        result
    }
}

/// The rate of each member, such that the tunnels' links have the rates of `links`.
fn of_members(lab: &Lab, links: &Links) -> Vec<f64> {
    let mut rates = links.rates.clone();
    if !links.equal_ports {
        for (tunnel, rate) in lab.tunnels.iter().zip(&links.rates) {
            rates[usize::from(tunnel.members[0])] = *rate;
        }
    }
    rates
}

/// Adds delay and loss at the tunnel devices of site A. They act before the tunnel, so that the shaper of the member
/// still comes last and sets the rate.
fn without_wires(lab: &Lab, links: &Links) -> Result<()> {
    for (number, tunnel) in lab.tunnels.iter().enumerate() {
        let quality = links.quality(Duration::ZERO, number);
        if quality != Quality::default() {
            lab.sites[0].gateway.tc(&format!("qdisc add dev {} root {}", tunnel.name, quality.discipline()))?;
        }
    }
    Ok(())
}

impl Drop for Comparison {
    /// Waits before the programs are detached. Detaching changes the kernel's code, which can crash an emulated
    /// machine. Until then, the output must have left the machine.
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Counters that describe a transfer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that each tunnel's device sent at site A.
    pub sent: Vec<u64>,
    /// Segments that the sender retransmitted.
    pub retransmitted: u64,
    /// Segments that the receiver received.
    pub segments: u64,
    /// Segments that the receiver received out of order.
    pub out_of_order: u64,
    /// Buckets that the program moved at a flowlet gap, and while busy.
    pub moves: [u64; 2],
    /// Packets that site B put back in order, that came too late for it, and that it gave up. 0 if it does not restore
    /// the order.
    pub restored: [u64; 3],
    /// Packets that the queues of each gateway dropped.
    pub dropped: [u64; 2],
}

impl Counters {
    /// Reads the counters for traffic over `path`.
    ///
    /// # Errors
    /// A counter is missing.
    pub fn read(lab: &Lab, path: Path<'_>) -> Result<Self> {
        let a = &lab.sites[0];
        let sent = lab.tunnels.iter().map(|tunnel| Ok(a.device(&tunnel.name)?.tx_bytes)).collect::<Result<_>>()?;
        let stats = lab.stats(0)?;
        let moves = |field: &str| {
            let tunnels = stats["tunnels"].as_array().into_iter().flatten();
            tunnels.filter_map(|tunnel: &Value| tunnel[field].as_u64()).sum()
        };
        // A site without ecmpvpn has no such counters.
        let far = lab.stats(1).unwrap_or_default();
        let restored = ["restored", "late", "given_up"].map(|field| far["order"][0][field].as_u64().unwrap_or(0));
        Ok(Self {
            sent,
            retransmitted: kernel_counter(path.from, "snmp", "Tcp:", "RetransSegs")?,
            segments: kernel_counter(path.to, "snmp", "Tcp:", "InSegs")?,
            out_of_order: kernel_counter(path.to, "netstat", "TcpExt:", "TCPOFOQueue")?,
            moves: [moves("flowlet_moves"), moves("rebalance_moves")],
            restored,
            dropped: [dropped(&a.gateway)?, dropped(&lab.sites[1].gateway)?],
        })
    }

    /// The difference since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            sent: self.sent.iter().zip(&before.sent).map(|(now, then)| now - then).collect(),
            retransmitted: self.retransmitted - before.retransmitted,
            segments: self.segments - before.segments,
            out_of_order: self.out_of_order - before.out_of_order,
            moves: [self.moves[0] - before.moves[0], self.moves[1] - before.moves[1]],
            restored: [0, 1, 2].map(|at| self.restored[at] - before.restored[at]),
            dropped: [0, 1].map(|at| self.dropped[at] - before.dropped[at]),
        }
    }

    /// Each tunnel's share of the bytes sent, percent.
    pub fn shares(&self) -> Vec<f64> {
        let sum = self.sent.iter().sum::<u64>().max(1);
        #[expect(clippy::cast_precision_loss, reason = "shown as whole percents")]
        self.sent.iter().map(|sent| *sent as f64 / sum as f64 * 100.0).collect()
    }
}

/// Packets that the queues of a namespace dropped since they were made.
fn dropped(ns: &Netns) -> Result<u64> {
    let queues: Value = serde_json::from_str(&ns.query("tc", "-s -j qdisc show")?)?;
    Ok(queues.as_array().into_iter().flatten().filter_map(|queue| queue["drops"].as_u64()).sum())
}

/// Reads a kernel counter of a namespace from `/proc/net/FILE`. Its lines come in pairs: names and values.
fn kernel_counter(ns: &Netns, file: &str, group: &str, name: &str) -> Result<u64> {
    let text = ns.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")))?;
    let mut lines = text.lines().filter(|line| line.starts_with(group)).map(str::split_whitespace);
    let (names, values) = lines.next().zip(lines.next()).with_context(|| format!("{file} has no {group}"))?;
    let value = names.zip(values).find(|(found, _)| *found == name).with_context(|| format!("{file} has no {name}"))?;
    value.1.parse().with_context(|| format!("{name} is {}", value.1))
}

/// Pause between two transfers, so that queues and acknowledgements of one do not count for the next.
pub const PAUSE: Duration = Duration::from_millis(300);
