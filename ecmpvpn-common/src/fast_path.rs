//! The decision for the most frequent packets, in one step. It gives the same result as [`crate::decide`], or none.
//!
//! These packets are TCP or UDP directly behind an IP header without options, for a peer that has no rules. The fast
//! path leaves out what is costly: the walk through headers and, if the bucket stays with its tunnel, the exact clock
//! and all calls.

use crate::account::{Sent, record_sent};
use crate::decide::{self, Steer, Timing, is_sprayed};
use crate::flow::{FlowKey, IPV4, IPV6, fields};
use crate::layout::{Address, Peer, Reason, Settings, TunnelId, bucket_flags, peer_flags, settings_flags};
use crate::order::Carrier;
use crate::packet::{Packet, Segments, Transport, protocol};
use crate::rules;
use crate::tables::{Calls, Tables};

/// A packet that was put onto a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steered {
    pub steer: Steer,
    /// Whether the bucket kept its tunnel without a new choice.
    pub stayed: bool,
}

/// Chooses the packet's tunnel and records that, as `decide` does. `None`: nothing was done, and the caller must ask
/// `decide`. `segments` returns what the packet is on the wire.
#[inline(always)]
pub fn try_decide<P: Packet + ?Sized, T: Calls + ?Sized>(
    packet: &P,
    segments: impl Fn(Transport) -> Segments,
    tables: &T,
) -> Option<Result<Steered, Reason>> {
    let [first, second, third, fourth, fifth, sixth] = packet.peek(0)?;
    let [version, ..] = first.to_ne_bytes();
    let carrier = Carrier::of([first, second]);
    // Each family is handled separately up to its hash: together they would need more registers than BPF has.
    let (flow, transport) = if version == 0x45 {
        let [_, _, flags, offset] = second.to_ne_bytes();
        if flags & 0x3f != 0 || offset != 0 {
            return None;
        }
        let [_, protocol, _, _] = third.to_ne_bytes();
        let key =
            FlowKey { src: [fourth, 0, 0, 0], dst: [fifth, 0, 0, 0], protocol, family: IPV4, ..FlowKey::default() };
        (classify(key, sixth, tables)?, Transport { protocol, offset: 20 })
    } else if version >> 4 == IPV6 {
        let [_, _, protocol, _] = second.to_ne_bytes();
        let [a, b, c, d, ports] = packet.peek(24)?;
        let (src, dst) = ([third, fourth, fifth, sixth], [a, b, c, d]);
        let key = FlowKey { src, dst, protocol, family: IPV6, ..FlowKey::default() };
        (classify(key, ports, tables)?, Transport { protocol, offset: 40 })
    } else {
        return None;
    };
    // They have ports, so this says it: see `tolerates_reordering`.
    let tolerant = transport.protocol == protocol::TCP;
    steer(segments(transport), tables, &flow, tolerant, carrier)
}

struct Flow<'a> {
    /// Number of the peer.
    peer: u32,
    hash: u64,
    settings: &'a Settings,
}

/// Finds the packet's peer and flow. `key` has no ports yet.
#[inline(always)]
fn classify<T: Tables + ?Sized>(mut key: FlowKey, ports: u32, tables: &T) -> Option<Flow<'_>> {
    if key.protocol != protocol::TCP && key.protocol != protocol::UDP || ports == 0 {
        return None;
    }
    let [a, b, c, d] = ports.to_ne_bytes();
    (key.sport, key.dport) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
    let destination = Address { family: u32::from(key.family), address: key.dst };
    let settings = tables.settings()?;
    if settings.hash_fields != fields::FIVE_TUPLE || settings.flags & settings_flags::SYMMETRIC != 0 {
        return None;
    }
    let peer = tables.cached_peer_of(&destination, settings)?;
    Some(Flow { peer, hash: key.hash(settings.seed, fields::FIVE_TUPLE, false), settings })
}

#[inline(always)]
fn steer<T: Calls + ?Sized>(
    segments: Segments,
    tables: &T,
    flow: &Flow<'_>,
    tolerant: bool,
    carrier: Option<Carrier>,
) -> Option<Result<Steered, Reason>> {
    let peer: &Peer = tables.peer(flow.peer)?;
    if peer.rules.get() != 0 {
        return None;
    }
    let flags = peer.flags.get();
    // The caller of `decide` removes a made-up mark.
    if flags & peer_flags::UNMARK != 0 && carrier.is_some_and(Carrier::is_marked) {
        return None;
    }
    let stamps = flags & peer_flags::STAMP != 0 && carrier.is_some();
    let ordered = !stamps && !tolerant;
    let index = peer.bucket_base.wrapping_add(flow.hash as u32 & peer.bucket_mask);
    let bucket = tables.bucket(index)?;
    let slot = u32::from(bucket.tunnel.get());
    let id = TunnelId::new(flow.peer, slot & (u32::BITS - 1));
    let ifindex = tables.tunnel(id)?.ifindex;
    let policy = peer.policy();
    let lives = peer.live.get().checked_shr(slot).unwrap_or(0) & 1 == 1 && ifindex != 0;
    let mut now = 0;
    let flags = bucket.flags.get();
    if lives && (ordered || flags & bucket_flags::STAMP == 0 && !is_sprayed(policy, flags)) {
        let gap = peer.gap_ns.get();
        let timing = Timing::now(tables, flow.settings.tick_ns, gap, bucket.last_ns.get());
        if timing.idle < u64::from(gap) {
            bucket.last_ns.set(timing.stamp);
            bucket.bytes.set(bucket.bytes.get().wrapping_add(segments.bytes));
            decide::note(bucket, ordered, false);
            let at_once = policy.sprays_all();
            record_sent(tables, id, timing.at, &Sent { segments, how: 0, expected: 0, at_once });
            return Some(Ok(Steered {
                steer: Steer { tunnel: id, ifindex, bucket: index, how: 0, time: 0 },
                stayed: true,
            }));
        }
        now = timing.at;
    }
    let flow = decide::Flow { peer: flow.peer, hash: flow.hash, rule: rules::NONE, ordered, stamps };
    Some(decide::steer_at(&flow, segments, tables, now).map(|steer| Steered { steer, stayed: false }))
}
