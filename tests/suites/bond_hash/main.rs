//! A real bond sends each flow by the member that `plan::bond_hash` predicts.
//!
//! ```text
//!   namespace A                         namespace B
//!   bond0 (802.3ad) == a0 --veth-- b0 == bond0 (802.3ad)
//!                   == a1 --veth-- b1 ==
//!                   == ...            ==
//! ```
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{SocketAddr, UdpSocket};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ecmpvpn::config::XmitHashPolicy;
use ecmpvpn::plan::bond_hash::{Macs, Member, OuterFlow, member};
use lab::netns::Netns;
use lab::skip::{self, Feature, Tier, requires};

/// Number of datagrams of a flow, and payload of each. Far above what LACPDUs and neighbour discovery send meanwhile.
const DATAGRAMS: u64 = 24;
const PAYLOAD: usize = 1200;

/// How long a bond may take to come up.
const PATIENCE: Duration = Duration::from_secs(60);

const A: [&str; 7] =
    ["10.2.3.4", "10.2.3.77", "172.16.254.1", "192.168.1.200", "fd00:2::4", "fd00:2::77:1", "2001:db8:ab:cd::1"];
const B: [&str; 7] =
    ["10.2.3.5", "10.2.3.201", "172.16.254.9", "192.168.1.3", "fd00:2::5", "fd00:2::9:8", "2001:db8:ab:cd:ffff::2"];
const PORTS: [(u16, u16); 10] = [
    (5000, 5000),
    (5001, 5001),
    (5002, 5002),
    (5000, 5002),
    (5000, 5001),
    (51820, 51822),
    (51821, 51820),
    (1025, 65535),
    (33333, 44444),
    (60123, 2048),
];

/// The hash of several kernels. Attaching programs makes no difference.
const TIERS: [Tier; 3] = [Tier::Here, Tier::Simulated, Tier::Emulated];

fn main() {
    let features = [Feature::Bonding];
    let mut trials: Vec<_> = [2, 3, 4]
        .into_iter()
        .map(|members| {
            requires(
                &TIERS,
                &features,
                &format!("layer3+4 over {members} members: 70 flows, IPv4 and IPv6"),
                move || every_flow_takes_its_member(XmitHashPolicy::Layer34, members),
            )
        })
        .collect();
    for policy in [XmitHashPolicy::Layer2, XmitHashPolicy::Layer23, XmitHashPolicy::Encap23, XmitHashPolicy::VlanSrcmac]
    {
        trials.push(requires(
            &TIERS,
            &features,
            &format!("{} over 3 members, MACs known", policy.as_str()),
            move || every_flow_takes_its_member(policy, 3),
        ));
    }
    skip::run(trials);
}

fn every_flow_takes_its_member(policy: XmitHashPolicy, members: u8) -> Result<()> {
    let bonds = Bonds::new(policy, members)?;
    let macs = Macs { src: mac(&bonds.a)?, dst: mac(&bonds.b)?, vlan_tci: Some(0) };
    let mut used = vec![0; usize::from(members)];
    let mut wrong = Vec::new();
    for (from, to) in A.iter().zip(B) {
        let mut sockets = HashMap::new();
        for (sport, dport) in PORTS {
            let flow = OuterFlow { src: from.parse()?, dst: to.parse()?, sport, dport, macs: Some(macs) };
            let Member::Index(expected) = member(policy, &flow, members) else {
                bail!("{} with known MACs is not predicted", policy.as_str());
            };
            let carried = bonds.carrier_of(&flow, &mut sockets)?;
            used[usize::from(carried)] += 1;
            if carried != expected {
                wrong.push(format!("{from}:{sport} -> {to}:{dport}: member {carried}, predicted {expected}"));
            }
        }
    }
    eprintln!("{} over {members} members: flows a member {used:?}", policy.as_str());
    ensure!(wrong.is_empty(), "{} of {} flows:\n{}", wrong.len(), A.len() * PORTS.len(), wrong.join("\n"));
    // If ports count, all members must be used: a prediction that is always 0 would agree with a bond that always uses
    // member 0.
    ensure!(policy != XmitHashPolicy::Layer34 || used.iter().all(|n| *n > 0), "a member carried nothing: {used:?}");
    Ok(())
}

/// Two namespaces, joined by a real bond at each end.
struct Bonds {
    a: Netns,
    b: Netns,
    members: u8,
}

impl Bonds {
    fn new(policy: XmitHashPolicy, members: u8) -> Result<Self> {
        let bonds = Self { a: Netns::new("bond-a")?, b: Netns::new("bond-b")?, members };
        for ns in [&bonds.a, &bonds.b] {
            let policy = policy.as_str();
            ns.ip(&format!(
                "link add bond0 type bond mode 802.3ad xmit_hash_policy {policy} lacp_rate fast miimon 50"
            ))?;
        }
        for i in 0..members {
            bonds.a.ip(&format!("link add a{i} type veth peer name b{i} netns {}", bonds.b.name()))?;
            for (ns, side) in [(&bonds.a, 'a'), (&bonds.b, 'b')] {
                ns.ip(&format!("link set {side}{i} master bond0"))?;
            }
        }
        for (ns, addresses) in [(&bonds.a, &A), (&bonds.b, &B)] {
            ns.ip("link set bond0 up")?;
            for address in addresses {
                let (length, nodad) = if address.contains(':') { (64, "nodad") } else { (24, "") };
                ns.ip(&format!("addr add {address}/{length} dev bond0 {nodad}"))?;
            }
        }
        bonds.wait_for_lacp()?;
        Ok(bonds)
    }

    fn wait_for_lacp(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let desired = format!("Number of ports: {}", self.members);
        while ![&self.a, &self.b].iter().all(|ns| {
            let shown = ns.query("cat", "/proc/net/bonding/bond0").unwrap_or_default();
            shown.contains(&desired)
                && !shown.contains("Partner Mac Address: 00:00:00:00:00:00")
                // State 63: active, short timeout, aggregating, in sync, collecting, distributing.
                && shown.matches("port state: 63").count() == 2 * usize::from(self.members)
        }) {
            ensure!(Instant::now() < deadline, "LACP did not come up in {PATIENCE:?}");
            sleep(Duration::from_millis(100));
        }
        // Resolves the neighbours now, and not while a flow is measured.
        for to in B {
            self.a.exec("ping", ["-c", "1", "-w", "30", to])?;
        }
        Ok(())
    }

    /// The member, in enslave order, by which a flow's datagrams leave A. Sockets are kept for flows that share the
    /// source port.
    fn carrier_of(&self, flow: &OuterFlow, sockets: &mut HashMap<u16, UdpSocket>) -> Result<u8> {
        let socket = match sockets.entry(flow.sport) {
            Entry::Occupied(kept) => kept.into_mut(),
            Entry::Vacant(place) => {
                let from = SocketAddr::new(flow.src, flow.sport);
                place.insert(self.a.run(|| UdpSocket::bind(from)).with_context(|| format!("binding {from}"))?)
            }
        };
        let before = self.kilobytes_sent()?;
        send(socket, SocketAddr::new(flow.dst, flow.dport))?;
        let sent: Vec<u64> = self.kilobytes_sent()?.iter().zip(before).map(|(now, before)| now - before).collect();
        let carriers: Vec<u8> = (0..self.members).filter(|i| sent[usize::from(*i)] >= DATAGRAMS).collect();
        ensure!(carriers.len() == 1, "{flow:?} was sent by {} members: {sent:?} kB", carriers.len());
        Ok(carriers[0])
    }

    fn kilobytes_sent(&self) -> Result<Vec<u64>> {
        let shown = self.a.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?;
        (0..self.members)
            .map(|i| {
                let name = format!("a{i}:");
                let line = shown.lines().find_map(|line| line.trim_start().strip_prefix(&name)).context("a member")?;
                let sent = line.split_whitespace().nth(8).context("the ninth column is bytes sent")?;
                Ok(sent.parse::<u64>()? / 1000)
            })
            .collect()
    }
}

fn mac(ns: &Netns) -> Result<[u8; 6]> {
    let shown: serde_json::Value = serde_json::from_str(&ns.query("ip", "-j link show bond0")?)?;
    let text = shown[0]["address"].as_str().context("bond0 has an address")?;
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    <[u8; 6]>::try_from(bytes).ok().context("an Ethernet address has six bytes")
}

fn send(socket: &UdpSocket, to: SocketAddr) -> Result<()> {
    let payload = [0u8; PAYLOAD];
    for _ in 0..DATAGRAMS {
        // Nobody listens at the far end. Its ICMP errors may arrive here and do not matter.
        if let Err(e) = socket.send_to(&payload, to) {
            ensure!(e.kind() == std::io::ErrorKind::ConnectionRefused, "sending to {to}: {e}");
        }
    }
    Ok(())
}
