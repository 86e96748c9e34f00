//! Outer packets that arrive on a bond member are recognised and counted. Nothing else changes.
//!
//! ```text
//!   namespace of lifecycle.rs          peer's namespace
//!   m0 10.2.3.4/24, fd00:2::4  ------  m0 10.2.3.5/24, fd00:2::5
//! ```

use std::net::UdpSocket;

use anyhow::{Result, ensure};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use ecmpvpn::config::InterfaceName;
use ecmpvpn::dataplane::{Arrivals, Device, Hook, OuterTunnel};
use ecmpvpn_common::arrivals::arrival;
use ecmpvpn_common::layout::{TunnelId, programs};
use lab::netns::Netns;
use lab::packet::inject_as;

use super::build::{TCP, UDP, V4, fragment, tcp, udp, v4, v6};
use super::lifecycle::{Stage, index};

const REMOTE: [&str; 3] = ["10.2.3.5:51820", "[fd00:2::5]:51821", "10.2.3.5:51822"];
const LISTEN: u16 = 40_000;

fn tunnels() -> Vec<OuterTunnel> {
    let tunnel = |(id, remote): (u32, &&str)| OuterTunnel {
        id: TunnelId::new(0, id),
        remote: remote.parse().expect("an address"),
        listen_port: LISTEN + u16::try_from(id).expect("below 3"),
    };
    (0..).zip(&REMOTE).map(tunnel).collect()
}

/// Makes the peer's end of the links.
fn far_end(stage: &Stage, links: &[&str]) -> Result<Netns> {
    let far = Netns::new("bpf-far")?;
    for link in links {
        stage.ns.ip(&format!("link add {link} type veth peer name {link} netns {}", far.name()))?;
    }
    for (ns, host) in [(&stage.ns, 4), (&far, 5)] {
        for link in links {
            ns.ip(&format!("link set {link} up addrgenmode none"))?;
        }
        ns.ip(&format!("address add 10.2.3.{host}/24 dev {}", links[0]))?;
        ns.ip(&format!("address add fd00:2::{host}/64 dev {} nodad", links[0]))?;
    }
    Ok(far)
}

fn device(stage: &Stage, name: &str) -> Result<Device> {
    Ok(Device { name: InterfaceName::new(name).expect("a valid name"), ifindex: index(&stage.ns, name)? })
}

/// Packets and bytes of each tunnel that were counted on a member.
fn member_counts(arrivals: &Arrivals, member: &Device) -> Result<Vec<(u64, u64)>> {
    let counts = arrivals.counts()?;
    Ok(counts
        .iter()
        .filter(|count| count.ifindex == member.ifindex)
        .map(|count| (count.packets, count.bytes))
        .collect())
}

/// Sends `count` datagrams. The sockets stay open, because closing one takes effect only when no child of another test
/// has a copy.
fn send(from: &UdpSocket, to: &str, length: usize, count: usize) -> Result<()> {
    for _ in 0..count {
        from.send_to(&vec![7; length], to)?;
    }
    Ok(())
}

pub fn counts_arrivals_by_tcx() -> Result<()> {
    counts_arrivals(Hook::Tcx)
}

pub fn counts_arrivals_by_clsact() -> Result<()> {
    counts_arrivals(Hook::Clsact)
}

fn counts_arrivals(hook: Hook) -> Result<()> {
    let stage = Stage::new()?;
    let far = far_end(&stage, &["m0", "m1", "m2"])?;
    // A foreign queueing discipline, which must stay.
    stage.ns.tc("qdisc add dev m1 clsact")?;
    let before = stage.ns.query("tc", "qdisc show")?;
    stage.start(Some(hook))?;
    let [m0, m1] = [device(&stage, "m0")?, device(&stage, "m1")?];
    let follow = |members: &[Device]| -> Result<Vec<Device>> {
        Ok(stage.ns.run(|| Arrivals::open(&stage.pins)?.follow(&tunnels(), members))?)
    };
    let joined = follow(std::slice::from_ref(&m0))?;
    ensure!(joined.len() == 1 && joined[0] == m0);
    ensure!(follow(&[m0.clone(), m1.clone()])? == [m1.clone()], "m0 is followed already");
    let arrivals = Arrivals::open(&stage.pins)?;
    ensure!(member_counts(&arrivals, &m0)? == [(0, 0); 3] && member_counts(&arrivals, &m1)? == [(0, 0); 3]);
    ensure!(arrivals.counts()?.iter().all(|count| count.age.is_none()));

    let bind = |address: &str| far.run(|| UdpSocket::bind(address));
    let [first, second, stray] = [bind(REMOTE[0])?, bind(REMOTE[1])?, bind("10.2.3.5:51899")?];
    let to = format!("10.2.3.4:{LISTEN}");
    send(&first, &to, 100, 5)?;
    send(&second, &format!("[fd00:2::4]:{}", LISTEN + 1), 200, 3)?;
    // Packets that do not count: other ports, and a datagram in fragments.
    send(&first, &format!("10.2.3.4:{}", LISTEN + 1), 100, 1)?;
    send(&stray, &to, 100, 1)?;
    send(&first, &to, 4_000, 1)?;
    // A packet with a VLAN tag. On reception, the kernel moves the tag out of the packet.
    let tagged = [&[0x60, 0x07, 8, 0][..], &v4("10.2.3.5", "10.2.3.4", UDP, &udp(51822, LISTEN + 2, 60))].concat();
    inject_as(&far, "m0", 0x8100, &[&tagged])?;
    let expected = [(5, 5 * 128), (3, 3 * 248), (1, 88)];
    ensure!(member_counts(&arrivals, &m0)? == expected, "{:?}", member_counts(&arrivals, &m0)?);
    ensure!(member_counts(&arrivals, &m1)? == [(0, 0); 3], "nothing came by m1");
    for count in arrivals.counts()? {
        ensure!(count.age.is_some_and(|age| age.as_secs() < 60) == (count.packets > 0), "{count:?}");
    }

    // After a reload, one tunnel has another endpoint and one has another number. The counts of the first one stay.
    let mut changed = tunnels();
    changed[1].remote = "[fd00:2::5]:51830".parse()?;
    changed[2].id = TunnelId::new(0, 9);
    stage.ns.run(|| Arrivals::open(&stage.pins)?.follow(&changed, &[m0.clone(), m1.clone()]))?;
    ensure!(member_counts(&arrivals, &m0)? == [expected[0], (0, 0), (0, 0)], "{:?}", member_counts(&arrivals, &m0)?);
    ensure!(arrivals.counts()?.iter().any(|count| count.id.slot() == 9) && arrivals.counts()?.len() == 6);
    follow(&[m0.clone(), m1.clone()])?;

    // A member that leaves the bond is detached. One that comes back starts from zero. One whose device is deleted is
    // forgotten.
    follow(std::slice::from_ref(&m1))?;
    ensure!(member_counts(&arrivals, &m0)?.is_empty());
    send(&first, &to, 100, 1)?;
    follow(&[m0.clone(), m1.clone(), device(&stage, "m2")?])?;
    ensure!(member_counts(&arrivals, &m0)? == [(0, 0); 3]);
    stage.ns.ip("link del m2")?;
    follow(&[m0.clone(), m1.clone()])?;
    ensure!(arrivals.counts()?.len() == 6);
    let missing = Device { name: InterfaceName::new("m9").expect("a valid name"), ifindex: 9_999 };
    let error = stage.ns.run(|| Arrivals::open(&stage.pins)?.follow(&tunnels(), &[m0.clone(), m1.clone(), missing]));
    ensure!(error.is_err_and(|error| error.to_string().contains("m9")) && arrivals.counts()?.len() == 6);

    drop(arrivals);
    stage.remove()?;
    let after = stage.ns.query("tc", "qdisc show")?;
    let without_m2 = before.lines().filter(|line| !line.contains("dev m2 ")).collect::<Vec<_>>().join("\n");
    ensure!(after.trim() == without_m2.trim(), "before {before}, after {after}");
    for member in ["m0", "m1"] {
        let filters = stage.ns.query("tc", &format!("filter show dev {member} ingress"))?;
        ensure!(filters.trim().is_empty(), "{filters}");
    }
    Ok(())
}

/// Runs the program on a frame with this Ethernet type. Returns whether the frame passed unchanged.
fn run(stage: &Stage, program: &SchedClassifier, member: &Device, ethertype: u16, packet: &[u8]) -> Result<bool> {
    /// Size of `struct __sk_buff`, and offset of a field. Source: linux/bpf.h.
    const CONTEXT: usize = 192;
    const IFINDEX: usize = 40;
    let frame = [&[0; 12][..], &ethertype.to_be_bytes(), packet].concat();
    let mut context = [0; CONTEXT];
    context[IFINDEX..][..4].copy_from_slice(&member.ifindex.to_ne_bytes());
    let mut out = vec![0; frame.len()];
    let options = TestRunOptions {
        data_in: Some(&frame),
        data_out: Some(&mut out),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    };
    let result = stage.ns.run(|| program.test_run(options))?;
    Ok(result.return_value == u32::MAX && out == frame)
}

/// BPF and host agree on every packet. Every packet passes unchanged.
pub fn arrivals_agree_and_pass() -> Result<()> {
    let stage = Stage::new()?;
    let _far = far_end(&stage, &["m0"])?;
    stage.start(None)?;
    let m0 = device(&stage, "m0")?;
    stage.ns.run(|| Arrivals::open(&stage.pins)?.follow(&tunnels(), std::slice::from_ref(&m0)))?;
    let arrivals = Arrivals::open(&stage.pins)?;
    let program = SchedClassifier::from_pin(stage.pins.dir().join(programs::ARRIVAL))?;
    let (a, b) = ("10.2.3.4", "10.2.3.5");
    let ours = || udp(51820, LISTEN, 60);
    let with = |options, fragment| V4 { src: b, dst: a, options, fragment }.with(UDP, &ours());
    let (v4_type, v6_type) = (0x0800, 0x86dd);
    let cases: [(&str, u16, Vec<u8>, bool); 14] = [
        ("ours", v4_type, v4(b, a, UDP, &ours()), true),
        ("with options", v4_type, with(10, 0), true),
        ("not to be fragmented", v4_type, with(0, 0x4000), true),
        ("a first fragment", v4_type, with(0, 0x2000), false),
        ("a later fragment", v4_type, with(0, 0x0010), false),
        ("from elsewhere", v4_type, v4("10.2.3.6", a, UDP, &ours()), false),
        ("the other direction", v4_type, v4(b, a, UDP, &udp(LISTEN, 51820, 60)), false),
        ("another port", v4_type, v4(b, a, UDP, &udp(51820, LISTEN + 9, 60)), false),
        ("TCP", v4_type, v4(b, a, TCP, &tcp(51820, LISTEN, 60)), false),
        ("no IP by its type", 0x88b5, v4(b, a, UDP, &ours()), false),
        ("cut off in the ports", v4_type, v4(b, a, UDP, &[0xca, 0x6c]), false),
        ("ours by IPv6", v6_type, v6("fd00:2::5", "fd00:2::4", UDP, &udp(51821, LISTEN + 1, 60)), true),
        ("an IPv6 fragment", v6_type, v6("fd00:2::5", "fd00:2::4", 44, &fragment(UDP, 1, &ours())), false),
        ("from elsewhere by IPv6", v6_type, v6("fd00:2::6", "fd00:2::4", UDP, &udp(51821, LISTEN + 1, 60)), false),
    ];
    for (name, ethertype, packet, expected) in cases {
        let before = member_counts(&arrivals, &m0)?;
        ensure!(run(&stage, &program, &m0, ethertype, &packet)?, "{name} did not pass as it was");
        let grown = member_counts(&arrivals, &m0)?.iter().zip(&before).map(|(now, then)| now.0 - then.0).sum::<u64>();
        let keys = tunnels().into_iter().map(|tunnel| {
            let remote = tunnel.remote;
            ecmpvpn_common::arrivals::Arrival::new(remote.ip(), remote.port(), tunnel.listen_port, m0.ifindex)
        });
        let host = arrival(&packet[..], ethertype, m0.ifindex)
            .is_some_and(|(found, _)| keys.into_iter().any(|key| key == found));
        ensure!((grown == 1, host) == (expected, expected), "{name}: counted {grown}, the host says {host}");
    }
    cost(&stage, &program, &m0)?;
    stage.remove()?;
    Ok(())
}

/// Prints the cost of a packet.
fn cost(stage: &Stage, program: &SchedClassifier, member: &Device) -> Result<()> {
    const REPEAT: u32 = 200_000;
    let packets = [
        ("a tunnel's", v4("10.2.3.5", "10.2.3.4", UDP, &udp(51820, LISTEN, 60))),
        ("other UDP", v4("10.2.3.9", "10.2.3.4", UDP, &udp(53, 5_000, 60))),
        ("TCP", v4("10.2.3.5", "10.2.3.4", TCP, &tcp(80, 5_000, 60))),
    ];
    for (name, packet) in packets {
        let frame = [&[0; 12][..], &[8, 0], &packet].concat();
        let mut context = [0; 192];
        context[40..44].copy_from_slice(&member.ifindex.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            repeat: REPEAT,
            ..TestRunOptions::default()
        };
        let result = stage.ns.run(|| program.test_run(options))?;
        println!("arrival program, {name} packet: {} ns", result.duration.as_nanos());
    }
    Ok(())
}
