//! Makes TCP transfers, and counts the bytes that tunnels and links really carried.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::interrupt;
use lab::sites::Lab;
use lab::traffic::TcpLoad;

use crate::measured::{Row, Transfer, Way, flows};
use crate::plan::{FLOWS, MEMBERS, Plan};
use crate::say;

/// Pause between two transfers, so that queues and acknowledgements of one do not count for the next.
const PAUSE: Duration = Duration::from_millis(300);
/// Bytes that are sent through a tunnel to see which link carries it. Far more than probes and handshakes.
const TRACER: u64 = 300_000;

/// Bytes that devices at site A have sent.
struct Sent {
    tunnels: Vec<u64>,
    links: Vec<u64>,
}

impl Sent {
    /// Reads the counters.
    fn read(lab: &Lab) -> Result<Self> {
        let sent = |name: &str| lab.sites[0].device(name).map(|device| device.tx_bytes);
        Ok(Self {
            tunnels: lab.tunnels.iter().map(|tunnel| sent(&tunnel.name)).collect::<Result<_>>()?,
            links: (0..MEMBERS).map(|member| sent(&format!("u{member}"))).collect::<Result<_>>()?,
        })
    }

    /// The bytes since `before`.
    fn since(self, before: &Self) -> Self {
        let gained = |now: Vec<u64>, then: &[u64]| now.iter().zip(then).map(|(now, then)| now - then).collect();
        Self { tunnels: gained(self.tunnels, &before.tunnels), links: gained(self.links, &before.links) }
    }
}

/// Sends a little through each tunnel alone. Returns the link that carried it, from the links' own counters.
pub fn links_of_tunnels(lab: &Lab) -> Result<Vec<usize>> {
    let mut found = Vec::with_capacity(lab.tunnels.len());
    for (number, tunnel) in lab.tunnels.iter().enumerate() {
        interrupt::check()?;
        lab.bypass(&[number])?;
        let before = Sent::read(lab)?;
        TcpLoad::bytes(1, TRACER).run(lab.path_v4()).with_context(|| format!("{} carried nothing", tunnel.name))?;
        let sent = Sent::read(lab)?.since(&before);
        lab.end_bypass()?;
        ensure!(sent.tunnels[number] >= TRACER, "{} carried {} bytes of {TRACER}", tunnel.name, sent.tunnels[number]);
        let carried = sent.links.iter().position(|bytes| *bytes >= TRACER);
        let link = carried.with_context(|| format!("no link carried what {} sent: {:?}", tunnel.name, sent.links))?;
        let [a, b] = tunnel.ports;
        say::note(&format!("{}: UDP port {a} to {b}, leaves by link {link}", tunnel.name));
        let expected = usize::from(tunnel.members[0]);
        ensure!(link == expected, "{} leaves by link {link} where the bond's hash gives {expected}", tunnel.name);
        found.push(link);
    }
    Ok(found)
}

/// Measures what one way carries, by the number of flows.
pub fn row(lab: &Lab, way: Way, plan: &Plan) -> Result<Row> {
    interrupt::check()?;
    say::step(&format!("{}, {} s each", way.name(), plan.seconds));
    let tunnels: Vec<usize> = match way {
        Way::OneTunnel => vec![0],
        Way::UsualRecipe | Way::Ecmp => (0..lab.tunnels.len()).collect(),
        Way::Ecmpvpn => Vec::new(),
    };
    if !tunnels.is_empty() {
        lab.bypass(&tunnels)?;
    }
    let transfers = FLOWS.iter().map(|flows| transfer(lab, way, plan, *flows)).collect::<Result<_>>()?;
    if !tunnels.is_empty() {
        lab.end_bypass()?;
    }
    Ok(Row { way, transfers })
}

fn transfer(lab: &Lab, way: Way, plan: &Plan, count: usize) -> Result<Transfer> {
    interrupt::check()?;
    let what = || format!("\"{}\" with {}", way.name(), flows(count));
    if let Some(bytes) = plan.receive_buffer(count) {
        lab.sites[1].host.sysctl("net/ipv4/tcp_rmem", &format!("4096 {bytes} {bytes}"))?;
    }
    let load = plan.transfer(way, count);
    let before = Sent::read(lab)?;
    let report = load.run(lab.path_v4()).with_context(|| format!("{} did not get its data across", what()))?;
    interrupt::check()?;
    let goodput = report.goodput();
    ensure!(goodput > 0.0, "{} carried nothing", what());
    interrupt::sleep(PAUSE);
    let sent = Sent::read(lab)?.since(&before);
    // A full queue may drop packets, so a tunnel may send more than its link.
    let received = report.received();
    let (tunnels, links) = (sent.tunnels.iter().sum::<u64>(), sent.links.iter().sum::<u64>());
    ensure!(
        received <= tunnels && received <= links,
        "{} brought {received} bytes across, but the tunnels sent {tunnels} and the links {links}",
        what()
    );
    say::note(&format!("{}: {goodput:.1} Mbit/s, from {} s on", flows(count), load.warm_up.as_secs_f64()));
    Ok(Transfer { flows: count, lead: load.warm_up, goodput, tunnels: sent.tunnels, links: sent.links })
}
