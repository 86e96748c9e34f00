//! The decision for the packets that there are most of, in one go: the same as [`crate::decide`] comes to, or none.
//!
//! Such packets are TCP or UDP right behind an IP header without options, for a peer that has no rules, of a bucket that
//! stays with its tunnel. What is costly is left out: the walk through headers, the exact clock, calls.

use crate::account::{Put, put};
use crate::decide::{Moment, Steer, Tables, is_sprayed};
use crate::flow::{FlowKey, IPV4, IPV6, fields};
use crate::layout::{Destination, Peer, Settings, policy, settings_flags, tunnel_id};
use crate::packet::{Packet, Segments, Transport, protocol};

/// Puts the packet onto its bucket's tunnel and notes that, as `decide` does. `None`: nothing was done, ask `decide`.
/// `segments` tells what it is on the wire.
#[inline(always)]
pub fn quick<P: Packet + ?Sized, T: Tables + ?Sized>(
    packet: &P,
    segments: impl Fn(Transport) -> Segments,
    tables: &T,
) -> Option<Steer> {
    let [first, second, third, fourth, fifth, sixth] = packet.peek(0)?;
    let [version, ..] = first.to_ne_bytes();
    // Each family by itself to the end of its hash: together they would need more registers than there are.
    if version == 0x45 {
        let [_, _, flags, offset] = second.to_ne_bytes();
        if flags & 0x3f != 0 || offset != 0 {
            return None;
        }
        let [_, protocol, _, _] = third.to_ne_bytes();
        let key =
            FlowKey { src: [fourth, 0, 0, 0], dst: [fifth, 0, 0, 0], protocol, family: IPV4, ..FlowKey::default() };
        let flow = classify(key, sixth, tables)?;
        steer(segments(Transport { protocol, offset: 20 }), tables, &flow)
    } else if version >> 4 == IPV6 {
        let [_, _, protocol, _] = second.to_ne_bytes();
        let [a, b, c, d, ports] = packet.peek(24)?;
        let (src, dst) = ([third, fourth, fifth, sixth], [a, b, c, d]);
        let key = FlowKey { src, dst, protocol, family: IPV6, ..FlowKey::default() };
        let flow = classify(key, ports, tables)?;
        steer(segments(Transport { protocol, offset: 40 }), tables, &flow)
    } else {
        None
    }
}

struct Flow<'a> {
    /// The peer's number.
    peer: u32,
    hash: u32,
    settings: &'a Settings,
}

/// Finds the packet's peer and flow. `key` lacks the ports.
#[inline(always)]
fn classify<T: Tables + ?Sized>(mut key: FlowKey, ports: u32, tables: &T) -> Option<Flow<'_>> {
    if key.protocol != protocol::TCP && key.protocol != protocol::UDP {
        return None;
    }
    let [a, b, c, d] = ports.to_ne_bytes();
    (key.sport, key.dport) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
    let destination = Destination { family: u32::from(key.family), address: key.dst };
    let settings = tables.settings()?;
    if settings.hash_fields != fields::FIVE_TUPLE || settings.flags & settings_flags::SYMMETRIC != 0 {
        return None;
    }
    let peer = tables.known_peer_of(&destination, settings)?;
    Some(Flow { peer, hash: key.hash(settings.seed, fields::FIVE_TUPLE, false) as u32, settings })
}

#[inline(always)]
fn steer<T: Tables + ?Sized>(segments: Segments, tables: &T, flow: &Flow<'_>) -> Option<Steer> {
    let peer: &Peer = tables.peer(flow.peer)?;
    if peer.rules.get() != 0 {
        return None;
    }
    let index = peer.bucket_base.wrapping_add(flow.hash & peer.bucket_mask);
    let bucket = tables.bucket(index)?;
    let slot = u32::from(bucket.tunnel.get());
    if is_sprayed(peer.policy.get(), bucket.flags.get()) || peer.live.get().checked_shr(slot).unwrap_or(0) & 1 == 0 {
        return None;
    }
    let id = tunnel_id(flow.peer, slot & (u32::BITS - 1));
    let ifindex = tables.tunnel(id)?.ifindex;
    let gap = peer.gap_ns.get();
    let moment = Moment::now(tables, flow.settings.tick_ns, gap, bucket.last_ns.get());
    if ifindex == 0 || moment.idle >= u64::from(gap) {
        return None;
    }

    bucket.last_ns.set(moment.stamp);
    bucket.bytes.set(bucket.bytes.get().wrapping_add(segments.bytes));
    let at_once = peer.policy.get() == policy::SPRAY;
    put(tables, id, moment.at, &Put { segments, how: 0, expected: 0, at_once });
    Some(Steer { tunnel: id, ifindex, bucket: index, how: 0 })
}
