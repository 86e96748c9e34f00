//! A lab, and who competes in it.

use std::path::Path as FsPath;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::netns::Netns;
use lab::sites::{Lab, Options, Running, Underlay};
use lab::skip::Feature;
use lab::traffic::Path;
use serde_json::Value;

/// Members of the bond, and tunnels.
pub const MEMBERS: u8 = 3;

/// Who carries the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// The first tunnel by itself.
    OneTunnel,
    /// The kernel's ECMP over all tunnels, with a layer 4 hash and the same planned ports.
    Ecmp,
    /// The program under test.
    Ecmpvpn,
}

impl Contestant {
    /// In tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneTunnel => "one tunnel",
            Self::Ecmp => "kernel ECMP",
            Self::Ecmpvpn => "ecmpvpn",
        }
    }
}

/// Two sites with `ecmpvpn run` at both.
pub struct Contest {
    pub lab: Lab,
    _running: [Running; 2],
}

impl Contest {
    /// Builds it with each member limited to its rate, and each tunnel made slower by its delay at site A.
    pub fn new(program: &FsPath, policy: &'static str, rates: &[f64], delays: &[f64], extra: &str) -> Result<Self> {
        let real = [Feature::WireGuard, Feature::Bonding].iter().all(|feature| feature.missing().is_none());
        let (underlay, backend) = if real { (Underlay::Bonded, "kernel") } else { (Underlay::Routed, "userspace") };
        let options = Options {
            underlay,
            backend,
            policy,
            members: MEMBERS,
            tunnels: usize::from(MEMBERS),
            extra: extra.to_owned(),
            ..Options::default()
        };
        let lab = Lab::new(options, program)?;
        for site in &lab.sites {
            // The kernel's ECMP takes a local socket's random hash for the flow's, and TCP draws it anew after a timeout.
            // Flows that come through a network card keep theirs.
            for end in [&site.host, &site.gateway] {
                end.sysctl("net/core/txrehash", "0")?;
            }
        }
        let running = lab.run()?;
        lab.shape_each(rates)?;
        for (tunnel, delay) in lab.tunnels.iter().zip(delays).filter(|(_, delay)| **delay > 0.0) {
            // Before the tunnel, so that the member's shaper still comes last and sets the rate. The limit is far above
            // what is on its way at once.
            let netem = format!("qdisc add dev {} root netem delay {delay}ms limit 10000", tunnel.name);
            lab.sites[0].gateway.tc(&netem)?;
        }
        Ok(Self { lab, _running: running })
    }

    /// Runs `work` with the traffic on its way over `who`.
    pub fn with<T>(&self, who: Contestant, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let tunnels: Vec<usize> = match who {
            Contestant::OneTunnel => vec![0],
            Contestant::Ecmp => (0..self.lab.tunnels.len()).collect(),
            Contestant::Ecmpvpn => return work(),
        };
        self.lab.bypass(&tunnels)?;
        let result = work();
        self.lab.end_bypass()?;
        result
    }
}

impl Drop for Contest {
    /// Detaching programs changes the kernel's code, of which an emulated machine can die: by then what was printed is to
    /// be outside.
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Counters that tell how a transfer went.
#[derive(Clone, Debug, Default)]
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
