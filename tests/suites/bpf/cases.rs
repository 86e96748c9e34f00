//! Handwritten packets: where each must be steered, and how it must be counted.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use ecmpvpn::dataplane::Options;
use ecmpvpn_common::layout::{BUCKETS_PER_PEER, Reason};

use super::build::{ICMP, ICMPV6, TCP, UDP, V4, extension, fragment, icmp, ports, tcp, udp, v4, v6};
use super::model::Model;
use super::rig::{Outcome, Rig, table};

const A: &str = "10.1.0.1";
const B: &str = "10.20.0.1";
const A6: &str = "fd00:10::1";
const B6: &str = "fd00:20::1";

#[derive(Debug)]
enum Expect {
    /// Exactly this tunnel and bucket, calculated independently of this code. Detects changes of the hash and the
    /// homes.
    Exactly(u32, u32),
    /// The same bucket as the case with this name.
    SameAs(&'static str),
    /// A bucket that no earlier case has.
    Alone,
    /// Any tunnel and bucket of this peer.
    Peer(u32),
    Refused(Reason),
}

struct Case {
    name: &'static str,
    packet: Vec<u8>,
    expect: Expect,
    /// GSO size and number of segments of a super-packet, and the packets and bytes that it must count as.
    gso: Option<((u32, u32), (u64, u64))>,
}

fn case(name: &'static str, packet: Vec<u8>, expect: Expect) -> Case {
    Case { name, packet, expect, gso: None }
}

fn gso(name: &'static str, packet: Vec<u8>, like: &'static str, given: (u32, u32), counted: (u64, u64)) -> Case {
    Case { name, packet, expect: Expect::SameAs(like), gso: Some((given, counted)) }
}

fn flows() -> Vec<Case> {
    use Expect::{Alone, Exactly, Peer, SameAs};
    let option = |options, fragment| V4 { src: A, dst: B, options, fragment };
    vec![
        case("tcp", v4(A, B, TCP, &tcp(1000, 80, 10)), Exactly(0, 8_775)),
        case("tcp6", v6(A6, B6, TCP, &tcp(1000, 80, 10)), Exactly(1, 22_377)),
        case("another source port", v4(A, B, TCP, &tcp(1001, 80, 10)), Alone),
        case("the other direction's ports", v4(A, B, TCP, &tcp(80, 1000, 10)), Alone),
        case("udp with the same ports", v4(A, B, UDP, &udp(1000, 80, 10)), Alone),
        case("tcp with options", option(10, 0).with(TCP, &tcp(1000, 80, 0)), SameAs("tcp")),
        case("tcp that must not be fragmented", option(0, 0x4000).with(TCP, &tcp(1000, 80, 0)), SameAs("tcp")),
        case("only the ports of a tcp header", v4(A, B, TCP, &ports(1000, 80)), SameAs("tcp")),
        case("the longer prefix wins", v4(A, "10.20.30.1", TCP, &tcp(1, 2, 0)), Peer(1)),
        case("the longer IPv6 prefix wins", v6(A6, "fd00:20:0:9::1", TCP, &tcp(1, 2, 0)), Peer(1)),
        case("sctp", v4(A, B, 132, &ports(1000, 80)), Alone),
        case("dccp", v4(A, B, 33, &ports(1000, 80)), Alone),
        case("udp-lite", v4(A, B, 136, &ports(1000, 80)), Alone),
        case("a protocol without ports", v4(A, B, 89, &[]), Alone),
        case("esp", v4(A, B, 50, &[0, 0, 0, 1, 0, 0, 0, 1]), Alone),
        case("the same esp later", v4(A, B, 50, &[0, 0, 0, 1, 0, 0, 0, 9]), SameAs("esp")),
        case("another esp", v4(A, B, 50, &[0, 0, 0, 2, 0, 0, 0, 1]), Alone),
        case("ah", v4(A, B, 51, &[6, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]), Alone),
        case("the same ah later", v4(A, B, 51, &[6, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7]), SameAs("ah")),
        case("gre without key", v4(A, B, 47, &[0, 0, 8, 0]), Alone),
        case("gre", v4(A, B, 47, &[0x20, 0, 8, 0, 0, 0, 0, 5]), Alone),
        case("the same gre with checksum", v4(A, B, 47, &[0xa0, 0, 8, 0, 1, 2, 0, 0, 0, 0, 0, 5]), SameAs("gre")),
        case("pptp", v4(A, B, 47, &[0x30, 1, 0x88, 0x0b, 0, 40, 0, 9]), Alone),
        case("the same pptp, longer", v4(A, B, 47, &[0x30, 1, 0x88, 0x0b, 1, 40, 0, 9]), SameAs("pptp")),
        case("echo", v4(A, B, ICMP, &icmp(8, 0x0007_0001, &[0; 8])), Alone),
        case("the next echo", v4(A, B, ICMP, &icmp(8, 0x0007_0002, &[0; 8])), SameAs("echo")),
        case("echo of another ping", v4(A, B, ICMP, &icmp(8, 0x0008_0001, &[0; 8])), Alone),
        case("echo6", v6(A6, B6, ICMPV6, &icmp(128, 0x0007_0001, &[0; 8])), Alone),
        case("the next echo6", v6(A6, B6, ICMPV6, &icmp(128, 0x0007_0002, &[0; 8])), SameAs("echo6")),
    ]
}

fn fragments() -> Vec<Case> {
    use Expect::{Alone, SameAs};
    let part = |fragment| V4 { src: A, dst: B, options: 0, fragment };
    let whole = tcp(1000, 80, 16);
    vec![
        case("fragment", part(0x2000).with(UDP, &udp(1000, 80, 16)), Alone),
        case("a later fragment", part(0x2005).with(UDP, &[9; 24]), SameAs("fragment")),
        case("the last fragment", part(0x0009).with(UDP, &[1; 3]), SameAs("fragment")),
        case("fragment of another datagram", part(0x2000).with(UDP, &udp(7, 9, 16)), SameAs("fragment")),
        case("fragment6", v6(A6, B6, 44, &fragment(UDP, 1, &udp(1000, 80, 16))), Alone),
        case("the last fragment6", v6(A6, B6, 44, &fragment(UDP, 8, &[5])), SameAs("fragment6")),
        case("an atomic fragment6", v6(A6, B6, 44, &fragment(TCP, 0, &whole)), SameAs("tcp6")),
        case("hop by hop", v6(A6, B6, 0, &extension(TCP, 0, &whole)), SameAs("tcp6")),
        case(
            "three extensions",
            v6(A6, B6, 0, &extension(43, 1, &extension(60, 2, &extension(TCP, 0, &whole)))),
            SameAs("tcp6"),
        ),
        case("too deep", v6(A6, B6, 60, &deep(7, &whole)), Alone),
        case("too deep with other ports", v6(A6, B6, 60, &deep(7, &tcp(9, 9, 0))), SameAs("too deep")),
        case("just not too deep", v6(A6, B6, 60, &deep(6, &whole)), SameAs("tcp6")),
        case("too long", v6(A6, B6, 60, &extension(TCP, 60, &whole)), SameAs("too deep")),
        case("no next header", v6(A6, B6, 59, &[]), Alone),
    ]
}

/// `count` destination options before `segment`.
fn deep(count: u32, segment: &[u8]) -> Vec<u8> {
    let inner = extension(TCP, 0, segment);
    (1..count).fold(inner, |payload, _| extension(60, 0, &payload))
}

/// An ICMP error takes the same way as those packets of the quoted flow that travel in the direction of the error.
fn errors() -> Vec<Case> {
    use Expect::{Alone, SameAs};
    let quote = v4(B, A, TCP, &tcp(80, 1000, 0));
    let quote6 = v6(B6, A6, TCP, &tcp(80, 1000, 0));
    let ping = v4(B, A, ICMP, &icmp(8, 0x0007_0009, &[]));
    let router = "10.1.99.99";
    vec![
        case("unreachable", v4(A, B, ICMP, &icmp(3, 0, &quote)), SameAs("tcp")),
        case("time exceeded at a router", v4(router, B, ICMP, &icmp(11, 0, &quote)), SameAs("tcp")),
        case("an error with the shortest quote", v4(router, B, ICMP, &icmp(3, 1400, &quote[..28])), SameAs("tcp")),
        case("an error about an echo request", v4(router, B, ICMP, &icmp(3, 0, &ping)), SameAs("echo")),
        case("packet too big", v6("fd00:10::99", B6, ICMPV6, &icmp(2, 1280, &quote6)), SameAs("tcp6")),
        case("an error with no ports in its quote", v4(router, B, ICMP, &icmp(3, 0, &quote[..22])), Alone),
        case(
            "an error about another router's error",
            v4(router, B, ICMP, &icmp(3, 1, &quote[..10])),
            SameAs("an error with no ports in its quote"),
        ),
    ]
}

fn refused() -> Vec<Case> {
    use Expect::Refused;
    let short = v4(A, B, TCP, &tcp(1, 2, 0));
    let short6 = v6(A6, B6, 0, &extension(TCP, 0, &tcp(1, 2, 0)));
    let mut tiny = short.clone();
    tiny[0] = 0x44;
    vec![
        case("neither IPv4 nor IPv6", vec![0x55; 40], Refused(Reason::NotIp)),
        case("one byte", vec![0x45], Refused(Reason::Truncated)),
        case("half an IPv4 header", short[..19].to_vec(), Refused(Reason::Truncated)),
        case("half a port", short[..23].to_vec(), Refused(Reason::Truncated)),
        case("a header length below five words", tiny, Refused(Reason::Truncated)),
        case("half an IPv6 header", short6[..39].to_vec(), Refused(Reason::Truncated)),
        case("half an extension", short6[..42].to_vec(), Refused(Reason::Truncated)),
        case("no transport header after an extension", short6[..48].to_vec(), Refused(Reason::Truncated)),
        case("multicast", v4(A, "224.0.0.251", UDP, &udp(5353, 5353, 0)), Refused(Reason::Multicast)),
        case("broadcast", v4(A, "255.255.255.255", UDP, &udp(68, 67, 0)), Refused(Reason::Multicast)),
        case(
            "neighbour solicitation",
            v6("fe80::1", "ff02::1:ff00:1", ICMPV6, &icmp(135, 0, &[0; 16])),
            Refused(Reason::Multicast),
        ),
        case("link-local", v4(A, "169.254.77.1", TCP, &tcp(1, 2, 0)), Refused(Reason::LinkLocal)),
        case("link-local IPv6", v6(A6, "fe80::1", TCP, &tcp(1, 2, 0)), Refused(Reason::LinkLocal)),
        case("nobody's prefix", v4(A, "10.21.0.1", TCP, &tcp(1, 2, 0)), Refused(Reason::NoPeer)),
        case("nobody's IPv6 prefix", v6(A6, "fd00:21::1", TCP, &tcp(1, 2, 0)), Refused(Reason::NoPeer)),
    ]
}

fn super_packets() -> Vec<Case> {
    let wide = |data: usize| {
        // TCP options of 12 bytes, as with timestamps.
        let mut segment = tcp(1000, 80, 12 + data);
        segment[12] = 8 << 4;
        segment
    };
    vec![
        gso("a tcp super-packet", v4(A, B, TCP, &wide(3000)), "tcp", (1000, 3), (3, 3052 + 2 * 52)),
        gso("one that was not segmented yet", v4(A, B, TCP, &wide(2500)), "tcp", (1000, 0), (3, 2552 + 2 * 52)),
        gso("a tcp6 super-packet", v6(A6, B6, TCP, &tcp(1000, 80, 2800)), "tcp6", (1400, 2), (2, 2860 + 60)),
        gso(
            "a udp super-packet",
            v4(A, B, UDP, &udp(1000, 80, 900)),
            "udp with the same ports",
            (300, 3),
            (3, 928 + 2 * 28),
        ),
    ]
}

pub fn cases_by_hand() -> anyhow::Result<()> {
    let table = table(0x1f2e_3d4c);
    let mut rig = Rig::new(&table, &Options::default())?;
    let model = Model::new(&table, Options::default().hash_fields, false);
    let mut buckets: BTreeMap<&str, u32> = BTreeMap::new();
    let mut reasons: BTreeMap<&str, u64> = Reason::ALL.iter().map(|reason| (reason.name(), 0)).collect();
    let mut failed = Vec::new();
    let all = flows().into_iter().chain(fragments()).chain(errors()).chain(refused()).chain(super_packets());
    for Case { name, packet, expect, gso } in all {
        let total = |rig: &Rig| -> anyhow::Result<(u64, u64)> {
            let tunnels = rig.view.tunnels()?;
            let sum = |count: fn(&ecmpvpn_common::layout::TunnelCounters) -> u64| {
                tunnels.iter().map(|t| count(&t.counters)).sum()
            };
            Ok((sum(|c| c.tx_packets), sum(|c| c.tx_bytes)))
        };
        let before = total(&rig)?;
        let found = rig.egress(&packet, gso.map_or((0, 0), |(given, _)| given)).with_context(|| name.to_owned())?;
        let after = total(&rig)?;
        ensure!(found == model.outcome(&packet, 0), "{name}: BPF {found:?}, host {:?}", model.outcome(&packet, 0));
        let counted = (after.0 - before.0, after.1 - before.1);
        let right = match (found, &expect) {
            (Outcome::Refused(reason), Expect::Refused(expected)) => {
                *reasons.entry(expected.name()).or_default() += 1;
                reason == *expected as u32 && counted == (0, 0)
            }
            (Outcome::Refused(_), _) | (_, Expect::Refused(_)) => false,
            (Outcome::Steered { tunnel, bucket, how }, expect) => {
                let expected = gso.map_or((1, packet.len() as u64), |(_, counted)| counted);
                let place = match expect {
                    Expect::Exactly(at, within) => tunnel == *at && bucket == *within,
                    Expect::SameAs(other) => buckets.get(other) == Some(&bucket),
                    Expect::Alone => !buckets.values().any(|other| *other == bucket),
                    Expect::Peer(peer) => tunnel / 32 == *peer && bucket / BUCKETS_PER_PEER == *peer,
                    Expect::Refused(_) => false,
                };
                buckets.insert(name, bucket);
                place && how == 0 && counted == expected
            }
        };
        if !right {
            failed.push(format!("{name}: {found:?}, counted {counted:?}, expected {expect:?} {gso:?}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    let found = rig.view.reasons()?;
    let found: BTreeMap<&str, u64> = found.not_steered.into_iter().chain(found.dropped).collect();
    ensure!(found == reasons, "reasons {found:?}, expected {reasons:?}");
    Ok(())
}

pub fn ingress_counts_what_arrived() -> anyhow::Result<()> {
    let table = table(1);
    // Test runs use loopback, whose index is 1.
    let mut ifindexes = super::rig::ifindexes(&table);
    let (name, _) = &table.peers[0].tunnels[1];
    ifindexes.insert(name.clone(), 1);
    let mut rig = Rig::with_ifindexes(&table, &ifindexes, &Options::default())?;
    let mut expected = (0, 0);
    for (packet, gso, counted) in [
        (v4(B, A, TCP, &tcp(80, 1000, 100)), (0, 0), (1, 140)),
        (v4(B, A, TCP, &tcp(80, 1000, 3000)), (1000, 3), (3, 3040 + 2 * 40)),
        (v6(B6, A6, UDP, &udp(80, 1000, 900)), (300, 3), (3, 948 + 2 * 48)),
        (vec![0x55; 30], (0, 0), (1, 30)),
    ] {
        ensure!(rig.ingress(&packet, gso)? == u32::MAX, "it must pass on");
        expected = (expected.0 + counted.0, expected.1 + counted.1);
        let tunnels = rig.view.tunnels()?;
        for tunnel in tunnels {
            let found = (tunnel.counters.rx_packets, tunnel.counters.rx_bytes);
            ensure!(found == if tunnel.name == "wg1" { expected } else { (0, 0) }, "{tunnel:?}, expected {expected:?}");
        }
    }
    Ok(())
}
