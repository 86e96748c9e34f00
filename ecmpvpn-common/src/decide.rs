//! The steering decision: which tunnel a packet takes. It is pure: the maps and the clock are behind [`Tables`] and
//! [`Calls`].
//!
//! A bucket stays with its tunnel while the tunnel is up and the bucket's packets follow one another closely. After a
//! gap, or when the tunnel is down, a tunnel is chosen again: the bucket's home under policy `hash`, a tunnel of the
//! least loaded link under `flowlet` and `adaptive`. Under `spray` a tunnel is chosen for every packet, unless the
//! daemon marked the bucket to stay whole. Under `adaptive` that is so only for buckets that the daemon marked to be
//! sprayed. Packets that must stay in order ([`Flow::ordered`]) are never sprayed, unless a rule with policy `spray`
//! names their protocol; they are steered as under `flowlet`.

use crate::account::{self, Sent};
use crate::flow::mix;
use crate::layout::{
    BUCKETS_PER_PEER, Bucket, MAX_PEERS, Peer, Policy, Reason, Rule, TunnelId, bucket_flags, bucket_seen, how,
    peer_flags, rule_flags, settings_flags,
};
use crate::order;
use crate::packet::{Packet, Parsed, Segments, parse, segments, tolerates_reordering};
use crate::rendezvous::NONE;
use crate::rules;
use crate::select::{SLOT_BITS, SLOT_MASK};
use crate::tables::{Calls, Tables};

/// A bucket without a packet for this long is taken to hold a new flow: its former tunnel does not count. Nanoseconds.
pub const FORGOTTEN_NS: u64 = 1_000_000_000;

/// The tunnel that a packet takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steer {
    pub tunnel: TunnelId,
    /// Interface index of the tunnel, never 0.
    pub ifindex: u32,
    /// Index of the bucket among all peers' buckets.
    pub bucket: u32,
    /// Bits of [`how`].
    pub how: u32,
    /// Stamp of a stamped packet; see [`crate::order`].
    pub time: u16,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Steer(Steer),
    /// It is not for a peer and is left alone.
    NotSteered(Reason),
    /// It is for a peer and cannot be sent.
    Dropped(Reason),
}

/// The peer and the flow of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Number of the peer.
    pub peer: u32,
    /// Hash of the flow key and of the rule that the packet matches.
    pub hash: u64,
    /// Number of the rule that the packet matches, or [`rules::NONE`].
    pub rule: u32,
    /// Whether the packet must stay in order with the flow's others: its transport does not tolerate reordering, and the
    /// far end does not restore it.
    pub ordered: bool,
    /// Whether the packet is stamped if it is sprayed, for the far end to restore the order.
    pub stamps: bool,
}

/// Decides for a packet that is not a super-packet. Records in the packet's bucket which tunnel it takes, and counts it
/// there.
#[inline(always)]
pub fn decide<P: Packet + ?Sized, T: Calls + ?Sized>(packet: &P, tables: &T) -> Verdict {
    let steered = parse(packet).and_then(|mut parsed| {
        let flow = classify(&mut parsed, packet, tables)?;
        steer(&flow, segments(packet, parsed.transport, packet.length(), 0, 0), tables)
    });
    match steered {
        Ok(steer) => Verdict::Steer(steer),
        Err(reason) if reason.is_drop() => Verdict::Dropped(reason),
        Err(reason) => Verdict::NotSteered(reason),
    }
}

/// Finds the packet's peer and flow. Where there are rules, `parsed` loses what an ICMP error quotes.
///
/// # Errors
/// Why the packet is not steered.
#[inline(always)]
pub fn classify<P: Packet + ?Sized, T: Calls + ?Sized>(
    parsed: &mut Parsed,
    packet: &P,
    tables: &T,
) -> Result<Flow, Reason> {
    let number = tables.peer_of(&parsed.destination).ok_or(Reason::NoPeer)?;
    let peer = tables.peer(number).ok_or(Reason::BadTable)?;
    let settings = tables.settings().ok_or(Reason::BadTable)?;
    let symmetric = settings.flags & settings_flags::SYMMETRIC != 0;
    let mut hash = parsed.key.hash(settings.seed, settings.hash_fields, symmetric);
    let candidates = peer.rules.get();
    let mut rule = rules::NONE;
    if candidates != 0 {
        parsed.forget_quote();
        rule = tables.first_rule(&parsed.key, rules::marks(packet), candidates);
        if rule != rules::NONE {
            // Otherwise flows that match different rules would share buckets.
            hash = mix(hash ^ u64::from(rule + 1));
        }
    }
    let stamps = peer.flags.get() & peer_flags::STAMP != 0 && order::carrier(packet).is_some();
    // What an ICMP error quotes counts no more, and a rule's key is that of the packet itself.
    let ordered = !stamps && !tolerates_reordering(parsed.transport.protocol, &parsed.key);
    Ok(Flow { peer: number, hash, rule, ordered, stamps })
}

/// Chooses the tunnel of a flow's packet, and counts the packet there.
///
/// # Errors
/// Why no tunnel can take the packet.
#[inline(always)]
pub fn steer<T: Calls + ?Sized>(flow: &Flow, segments: Segments, tables: &T) -> Result<Steer, Reason> {
    steer_at(flow, segments, tables, 0)
}

/// As [`steer`]; `now` is the reading of the exact clock, or 0 if it was not read.
///
/// # Errors
/// As [`steer`].
#[inline(always)]
pub fn steer_at<T: Calls + ?Sized>(flow: &Flow, segments: Segments, tables: &T, now: u64) -> Result<Steer, Reason> {
    let bits = u64::from(flow.ordered) << ORDERED_BIT | u64::from(flow.stamps) << STAMPS_BIT;
    let size = bits | u64::from(segments.packets) << 32 | u64::from(segments.bytes);
    let chosen = Chosen::unpack(tables.choose(flow.peer, flow.hash, flow.rule, size, now))?;
    let id = TunnelId::new(flow.peer, chosen.slot & (u32::BITS - 1));
    let tunnel = tables.tunnel(id).filter(|tunnel| tunnel.ifindex != 0).ok_or(Reason::BadTable)?;
    Ok(Steer { tunnel: id, ifindex: tunnel.ifindex, bucket: chosen.bucket, how: chosen.how, time: chosen.time })
}

/// Result of [`choose`]. It is packed into one word, because BPF functions return no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chosen {
    slot: u32,
    bucket: u32,
    how: u32,
    time: u16,
}

impl Chosen {
    #[inline(always)]
    fn pack(self) -> u64 {
        const { assert!(MAX_PEERS * BUCKETS_PER_PEER <= 1 << 24) };
        let slot = u64::from(self.slot & 0xff) << 32;
        u64::from(self.bucket) << 40 | slot | u64::from(self.how & 0xff) << 24 | u64::from(self.time) << 8
    }

    #[inline(always)]
    fn unpack(word: u64) -> Result<Self, Reason> {
        match word as u8 {
            0 => Ok(Self {
                slot: (word >> 32) as u32 & 0xff,
                bucket: (word >> 40) as u32,
                how: (word >> 24) as u32 & 0xff,
                time: (word >> 8) as u16,
            }),
            NO_LIVE_TUNNEL => Err(Reason::NoLiveTunnel),
            _ => Err(Reason::BadTable),
        }
    }
}

const NO_LIVE_TUNNEL: u8 = 1;
const BAD_TABLE: u8 = 2;
/// What [`choose`] returns if it cannot look up anything.
pub const BAD_STATE: u64 = BAD_TABLE as u64;

/// The bit of [`choose`]'s `size` that is set if the packet must stay in order. A packet has fewer than 2^30 segments.
const ORDERED_BIT: u32 = 63;
/// The bit that is set if the packet is stamped when it is sprayed.
const STAMPS_BIT: u32 = 62;

/// Chooses the tunnel for a packet of a flow. Returns it as [`Chosen`] packs it. `size` holds the number of the
/// packet's segments in the upper half, with [`ORDERED_BIT`] and [`STAMPS_BIT`], and its bytes in the lower half. In BPF this is a separate function, so that the
/// verifier sees only a call on each of the many paths through the parser.
#[inline(always)]
pub fn choose<T: Calls + ?Sized>(tables: &T, number: u32, hash: u64, rule: u32, size: u64) -> u64 {
    let segments = Segments { packets: (size >> 32) as u32 & (u32::MAX >> 2), bytes: size as u32 };
    let bytes = segments.bytes;
    let Some(peer) = tables.peer(number) else { return u64::from(BAD_TABLE) };
    let mut constraints =
        Constraints { policy: peer.policy(), usable: peer.live.get(), ordered: size >> ORDERED_BIT == 1 };
    if rule != rules::NONE {
        let Some(rule_record) = tables.rule(rule) else { return u64::from(BAD_TABLE) };
        constraints = constraints.under_rule(rule_record, tables.rule_tunnels(rule, number));
    }
    if constraints.usable == 0 {
        return u64::from(NO_LIVE_TUNNEL);
    }

    let bucket = hash as u32 & peer.bucket_mask;
    let index = peer.bucket_base.wrapping_add(bucket);
    let Some(record) = tables.bucket(index) else { return u64::from(BAD_TABLE) };
    note(record, constraints.ordered, rule != rules::NONE);
    let sprayed = is_sprayed(constraints.policy, record.flags.get()) && !constraints.ordered;
    let tick = tables.settings().map_or(0, |settings| settings.tick_ns);
    let last = record.last_ns.get();
    // Queues are modelled packet by packet: a tick is too coarse for them.
    let stamps = size >> STAMPS_BIT & 1 == 1 && (sprayed || record.flags.get() & bucket_flags::STAMP != 0);
    let tick = if sprayed || stamps { 0 } else { tick };
    let Timing { at: now, stamp, idle } = Timing::now(tables, tick, peer.gap_ns.get(), last);
    record.bytes.set(record.bytes.get().wrapping_add(bytes));

    let current = u32::from(record.tunnel.get());
    let lives = constraints.usable.checked_shr(current).unwrap_or(0) & 1 == 1;
    let (mut slot, mut how, mut is_new) = (current, 0, false);
    let mut delivery = 0;
    if sprayed {
        let earliest = tables.earliest_delivery(number, bucket, constraints.preferred(peer), now, bytes);
        (slot, delivery) = (earliest as u32 & SLOT_MASK, earliest >> SLOT_BITS);
        how = how::SPRAYED;
    } else if !lives || idle >= u64::from(peer.gap_ns.get()) {
        slot = reselect(tables, number, peer, &constraints, bucket, record, now, idle);
        is_new = idle >= FORGOTTEN_NS || slot != current;
        if slot != current {
            how = if lives && !constraints.policy.is_by_rank() { how::FLOWLET } else { how::FAILOVER };
        }
    }
    if slot >= u32::BITS {
        return u64::from(BAD_TABLE);
    }
    let mut time = 0u32;
    if stamps {
        let former = TunnelId::new(number, current & (u32::BITS - 1));
        time = tables.stamp(index, former, now, delivery, segments.packets);
        how |= how::STAMPED;
    } else {
        record.last_ns.set(stamp);
    }
    if slot != current {
        record.tunnel.set(slot as u8);
    }
    let expected = if is_new { peer.expected_bytes.get() } else { 0 };
    let at_once = sprayed || is_new || constraints.policy.sprays_all();
    account::record_sent(tables, TunnelId::new(number, slot), now, &Sent { segments, how, expected, at_once });
    Chosen { slot, bucket: index, how, time: time as u16 }.pack()
}

/// Keeps in the bucket what the daemon must know of its packets. Written only where it changes.
#[inline(always)]
pub(crate) fn note(record: &Bucket, ordered: bool, ruled: bool) {
    const { assert!(bucket_seen::RULED == 1 && bucket_seen::ORDERED == 2) };
    let before = record.seen.get();
    let seen = before & bucket_seen::RULED | u8::from(ruled) | u8::from(ordered) << 1;
    if seen != before {
        record.seen.set(seen);
    }
}

/// Whether a tunnel is chosen for each packet of a bucket. Packets that must stay in order are the exception.
#[must_use]
#[inline(always)]
pub fn is_sprayed(policy: Policy, flags: u8) -> bool {
    // A flag and its value, instead of a branch for each policy: the verifier then sees fewer paths.
    let (flag, when) = match policy {
        Policy::Spray => (bucket_flags::WHOLE, 0),
        Policy::Adaptive => (bucket_flags::SPRAY, bucket_flags::SPRAY),
        // Never sprayed: no flag is read, so the result cannot be 1.
        Policy::Hash | Policy::Flowlet => (0, 1),
    };
    flags & flag == when
}

/// Time of a bucket's packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// Up to a tick too early or too late, nanoseconds of the monotonic clock.
    pub at: u64,
    /// The time that the bucket keeps: up to two ticks too late, never too early.
    pub stamp: u64,
    /// Pause before the packet, nanoseconds. If it is as long as the gap, the real pause is at least as long: so no
    /// packet overtakes another.
    pub idle: u64,
}

impl Timing {
    /// Reads the clock. The exact clock costs as much as the rest of a decision. It is read only if the ticks do not
    /// show that the pause is shorter than `gap`.
    #[inline(always)]
    pub fn now<T: Tables + ?Sized>(tables: &T, tick: u32, gap: u32, last: u64) -> Self {
        if tick != 0
            && gap >= tick
            && let Some(at) = tables.coarse_now(tick)
        {
            let stamp = at + u64::from(tick);
            let idle = stamp.saturating_sub(last);
            if idle < u64::from(gap) {
                return Self { at, stamp, idle };
            }
        }
        let at = tables.now();
        Self { at, stamp: at, idle: at.saturating_sub(last) }
    }
}

/// The policy and the tunnels that apply to a packet.
struct Constraints {
    policy: Policy,
    /// Tunnels that are up and that the packet may take, one bit per slot.
    usable: u32,
    /// Whether the packet must stay in order.
    ordered: bool,
}

impl Constraints {
    /// The constraints under a rule that the packet matches. `allowed`: the peer's tunnels that the rule allows, one
    /// bit per slot.
    #[inline(always)]
    fn under_rule(self, rule: &Rule, allowed: u32) -> Self {
        let policy = rule.policy(self.policy);
        let allowed = self.usable & allowed;
        let flags = rule.flags.get();
        let others_do = allowed == 0 && flags & rule_flags::PREFER != 0;
        let ordered = self.ordered && flags & rule_flags::SPRAY_ANY == 0;
        Self { policy, usable: if others_do { self.usable } else { allowed }, ordered }
    }

    /// Tunnels that may take a new flow. Tunnels that are being drained are among them only if there is no other.
    #[inline(always)]
    fn preferred(&self, peer: &Peer) -> u32 {
        match self.usable & peer.open.get() {
            0 => self.usable,
            open => open,
        }
    }
}

/// Chooses the slot for a bucket that may move.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined; a struct of them would go through the BPF stack")]
fn reselect<T: Calls + ?Sized>(
    tables: &T,
    number: u32,
    peer: &Peer,
    constraints: &Constraints,
    bucket: u32,
    record: &Bucket,
    now: u64,
    idle: u64,
) -> u32 {
    let candidates = constraints.preferred(peer);
    if constraints.policy.is_by_rank() {
        let home = u32::from(record.home.get());
        return if candidates.checked_shr(home).unwrap_or(0) & 1 == 1 {
            home
        } else {
            tables.best(number, bucket, candidates)
        };
    }
    let current = if idle >= FORGOTTEN_NS { NONE } else { u32::from(record.tunnel.get()) };
    tables.least_loaded(number, bucket, candidates, now, current)
}
