//! Stamps of sprayed packets: written, read, removed, and forged ones.

use anyhow::{Context as _, ensure};
use ecmpvpn::dataplane::Options;
use ecmpvpn_common::layout::{Order, OrderCounters, Policy, how, peer_flags};
use ecmpvpn_common::order::{Carrier, Release, UNIT_BITS, carrier, release, time_of};
use ecmpvpn_common::shared::Shared;

use super::agree::Random;
use super::build::{TCP, UDP, V4, tcp, udp, v6};
use super::model::Model;
use super::rig::{Outcome, Rig, table};

const MS: u64 = 1_000_000;
const DONT_FRAGMENT: u16 = 0x4000;
const RESERVED: u16 = 0x8000;

/// An IPv4 packet from 10.1.0.1 to 10.20.0.1 with an identification and a right checksum.
fn v4(fragment: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = V4 { src: "10.1.0.1", dst: "10.20.0.1", options: 0, fragment }.with(protocol, payload);
    packet[4..6].copy_from_slice(&[0x12, 0x34]);
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The Internet checksum, RFC 1071; 0 over a header with a right one.
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("16 bits")
}

fn with_label(mut packet: Vec<u8>, label: u32) -> Vec<u8> {
    let [_, a, b, c] = label.to_be_bytes();
    packet[1] = packet[1] & 0xf0 | a & 0x0f;
    packet[2..4].copy_from_slice(&[b, c]);
    packet
}

fn carrier_of(packet: &[u8]) -> anyhow::Result<Carrier> {
    carrier(packet).context("it can carry a stamp")
}

/// Whether the packets differ only in what a stamp is written to, and the IPv4 header's checksum is right.
fn is_else_the_same(packet: &[u8], other: &[u8]) -> bool {
    let is_v4 = packet[0] >> 4 == 4;
    let stamped = |at: usize| if is_v4 { matches!(at, 4..=6 | 10 | 11) } else { matches!(at, 1..=3) };
    let same = (0..packet.len()).filter(|at| !stamped(*at)).all(|at| packet[at] == other[at]);
    same && packet.len() == other.len() && (!is_v4 || checksum(&other[..20]) == 0)
}

pub fn sprayed_packets_are_stamped() -> anyhow::Result<()> {
    let table = table(3);
    let mut rig = Rig::new(&table, &Options::default())?;
    let model = Model::new(&table, Options::default().hash_fields, false);
    for peer in [rig.view.peer(0).context("a peer")?, model.peer_record(0)] {
        peer.policy.set(Policy::Spray.number());
        peer.flags.set(peer_flags::STAMP | peer_flags::UNMARK);
    }
    rig.now = 5_000 * MS;
    let stamped = how::SPRAYED | how::STAMPED;
    let (udp6, tcp6) = (udp(7, 9, 500), tcp(7, 9, 500));
    for (packet, how, gso) in [
        (v4(DONT_FRAGMENT, UDP, &udp(7, 9, 500)), stamped, (0, 0)),
        (v4(DONT_FRAGMENT, TCP, &tcp(7, 9, 3000)), stamped, (1000, 3)),
        (v4(DONT_FRAGMENT | RESERVED, UDP, &udp(8, 9, 0)), stamped, (0, 0)),
        (with_label(v6("fd00:10::1", "fd00:20::1", UDP, &udp6), 0xe_1234), stamped, (0, 0)),
        (with_label(v6("fd00:10::1", "fd00:20::1", TCP, &tcp6), 0x7_1234), stamped, (0, 0)),
        // What may still be fragmented too, but not what is: UDP then stays whole.
        (v4(0, UDP, &udp(7, 10, 500)), stamped, (0, 0)),
        (v4(0, TCP, &tcp(7, 10, 500)), stamped, (0, 0)),
        (v4(0x2000, UDP, &udp(7, 11, 500)), 0, (0, 0)),
        (v4(0x0010, UDP, &udp(7, 11, 500)), 0, (0, 0)),
    ] {
        let mut least = time_of(rig.now);
        // A burst: packets of the same moment get different times, one for each segment. The time is that of the
        // expected arrival, less than 20 ms later.
        for _ in 0..3 {
            model.now.set(rig.now);
            let (outcome, out) = rig.sent(&packet, gso)?;
            let is_one = gso.0 == 0;
            let (decided, stamp) = if is_one { model.outcome_and_stamp(&packet, 0) } else { (outcome, 0) };
            ensure!(outcome == decided, "{outcome:?}: the host decides otherwise, {decided:?}");
            let Outcome::Steered { how: found, .. } = outcome else { anyhow::bail!("{outcome:?}") };
            ensure!(found & (how | stamped) == how, "{found:#x}, not {how:#x}: {packet:02x?}");
            if how & how::STAMPED == 0 {
                ensure!(out == packet, "changed from {packet:02x?} to {out:02x?}");
                continue;
            }
            ensure!(is_else_the_same(&packet, &out), "{packet:02x?} became {out:02x?}");
            let carrier = carrier_of(&out)?;
            let later = carrier.time().wrapping_sub(least);
            ensure!(
                carrier.is_marked() && u64::from(later) < (20 * MS) >> UNIT_BITS,
                "{carrier:?}, {later} after {least}"
            );
            ensure!(!is_one || carrier.time() == stamp, "{carrier:?}: the host stamps {stamp}");
            least = carrier.time().wrapping_add(u16::try_from(gso.1.max(1))?);
        }
        rig.now += 20 * MS;
    }
    let counted = rig.view.order_counters(0)?;
    ensure!(counted == OrderCounters { stamped: 21, ..OrderCounters::default() }, "{counted:?}");
    Ok(())
}

pub fn made_up_marks_are_removed() -> anyhow::Result<()> {
    let mut rig = Rig::new(&table(3), &Options::default())?;
    let forged = [
        v4(DONT_FRAGMENT | RESERVED, UDP, &udp(7, 9, 30)),
        v4(DONT_FRAGMENT | RESERVED, TCP, &tcp(7, 9, 30)),
        v4(RESERVED, UDP, &udp(7, 9, 30)),
        with_label(v6("fd00:10::1", "fd00:20::1", UDP, &udp(7, 9, 30)), 0xe_4321),
    ];
    for flags in [0, peer_flags::UNMARK] {
        rig.view.peer(0).context("a peer")?.flags.set(flags);
        for packet in &forged {
            for _ in 0..3 {
                let (outcome, out) = rig.sent(packet, (0, 0))?;
                ensure!(matches!(outcome, Outcome::Steered { how: 0, .. }), "{outcome:?}");
                if flags == 0 {
                    ensure!(out == *packet, "changed for a peer that heeds no marks");
                } else {
                    ensure!(is_else_the_same(packet, &out), "{packet:02x?} became {out:02x?}");
                    ensure!(!carrier_of(&out)?.is_marked(), "still marked: {out:02x?}");
                }
            }
        }
    }
    Ok(())
}

pub fn stamped_packets_are_held_as_calculated() -> anyhow::Result<()> {
    let table = table(1);
    // Test runs use loopback, whose index is 1.
    let mut ifindexes = super::rig::ifindexes(&table);
    let (name, _) = &table.peers[0].tunnels[1];
    ifindexes.insert(name.clone(), 1);
    let mut rig = Rig::with_ifindexes(&table, &ifindexes, &Options::default())?;
    let mut random = Random(9);
    let bound = u32::try_from((50 * MS) >> UNIT_BITS)?;
    let model = Order { bound: Shared::new(bound), ..Order::default() };
    let packets = [
        v4(DONT_FRAGMENT, UDP, &udp(7, 9, 100)),
        v4(DONT_FRAGMENT, TCP, &tcp(7, 9, 100)),
        v4(0, UDP, &udp(7, 9, 100)),
        v6("fd00:20::1", "fd00:10::1", UDP, &udp(7, 9, 100)),
    ];
    let mut expected = OrderCounters::default();
    let mut sent = 7_000 * MS;
    let order = |rig: &Rig, device| -> anyhow::Result<()> {
        let order = rig.view.order(0).context("a peer")?;
        order.bound.set(bound);
        order.device.set(device);
        Ok(())
    };
    for round in 0..3000u64 {
        // Now and then a clock jumps, or nothing arrives for long.
        sent += if random.one_in(500) { 400 * MS } else { random.next() % MS };
        let offset = if round < 1500 { 0 } else { 77 * MS };
        rig.now = sent + offset + random.of(&[2 * MS, 7 * MS, 12 * MS, 70 * MS]) + random.next() % MS;
        let packet = packets[random.below(packets.len())].clone();
        let at = carrier_of(&packet)?;
        let mut stamped = packet.clone();
        let offset = at.offset() as usize;
        let word = at.stamped(time_of(sent));
        stamped[offset..offset + 4].copy_from_slice(&word.to_ne_bytes());
        if at.is_v4 {
            stamped[10..12].fill(0);
            let sum = checksum(&stamped[..20]);
            stamped[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        order(&rig, 0)?;
        ensure!(rig.arrived(&stamped)?.3 == stamped, "changed although nothing is restored");
        order(&rig, 99)?;
        let (kind, held, redirected, out) = rig.arrived(&stamped)?;
        let (expected_kind, expected_hold) = match release(&model, rig.now, time_of(sent)) {
            Release::At(time) => (1, time.saturating_sub(rig.now)),
            Release::Late => (2, 0),
            Release::GivenUp => (3, 0),
        };
        ensure!((kind, u64::from(held)) == (expected_kind, expected_hold), "round {round}: {kind}, {held} ns");
        ensure!(redirected == (kind == 1), "round {round}: {kind}, redirected: {redirected}");
        expected.restored += u64::from(kind == 1);
        expected.late += u64::from(kind == 2);
        expected.given_up += u64::from(kind == 3);
        ensure!(is_else_the_same(&packet, &out), "{packet:02x?} became {out:02x?}");
        ensure!(carrier_of(&out)?.word == Carrier { word, ..at }.restored(), "{out:02x?}");
        let plain = rig.arrived(&packet)?;
        ensure!(plain.0 == 0 && !plain.2 && plain.3 == packet, "a packet without a mark: {plain:?}");
    }
    let counted = rig.view.order_counters(0)?;
    ensure!(counted == expected, "{counted:?}, not {expected:?}");
    println!("{counted:?}");
    ensure!(expected.restored > 1000 && expected.late > 0 && expected.given_up > 100, "{expected:?}");
    Ok(())
}
