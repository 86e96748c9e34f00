//! The steering decision: which tunnel a packet takes. Pure: the maps and the clock are behind [`Tables`].
//!
//! A bucket stays with its tunnel while that lives and its packets follow one another closely. After a gap, or when the
//! tunnel died, it chooses anew: its home under policy `hash`, the least loaded link under `flowlet` and `adaptive`.
//! Under `spray` every packet chooses, unless the daemon marked its bucket to go whole; under `adaptive` where it marked it
//! to be sprayed.

use crate::account::{self, Put};
use crate::flow::{FlowKey, mix};
use crate::layout::{
    Bucket, Destination, Load, Path, Peer, Reason, Rule, RuleSet, Settings, Tunnel, TunnelCounters, bucket_flags, how,
    policy, rule_flags, settings_flags, tunnel_id,
};
use crate::load;
use crate::packet::{Packet, Parsed, Segments, parse, segments};
use crate::rendezvous::{self, NONE};
use crate::rules;

/// A bucket without a packet for so long holds a new flow: where it was last does not count. Nanoseconds.
pub const FORGOTTEN_NS: u64 = 1_000_000_000;

/// What the decision looks up. `None` where there is no such entry.
pub trait Tables {
    /// The monotonic clock, nanoseconds.
    fn now(&self) -> u64;
    /// What the monotonic clock is, up to `tick_ns` too early or too late, nanoseconds; if that is cheaper to know.
    #[inline(always)]
    fn ticked(&self, tick_ns: u32) -> Option<u64> {
        let now = self.now();
        Some(now - now % u64::from(if tick_ns == 0 { 1 } else { tick_ns }))
    }
    /// What holds for all peers.
    fn settings(&self) -> Option<&Settings>;
    /// The peer whose prefix matches longest.
    fn peer_of(&self, destination: &Destination) -> Option<u32>;
    /// The same, if that was found out a moment ago. None of those stays on the link.
    #[inline(always)]
    fn known_peer_of(&self, destination: &Destination, _: &Settings) -> Option<u32> {
        self.peer_of(destination)
    }
    /// A peer by its number.
    fn peer(&self, peer: u32) -> Option<&Peer>;
    /// A tunnel by its id.
    fn tunnel(&self, id: u32) -> Option<&Tunnel>;
    /// A bucket by its place among all peers' buckets.
    fn bucket(&self, index: u32) -> Option<&Bucket>;
    /// A tunnel's load by its id.
    fn load(&self, id: u32) -> Option<&Load>;
    /// Applies `change` to this CPU's counts of a tunnel, by its id.
    fn counted<R>(&self, id: u32, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R>;
    /// A link by its place among all peers' links.
    fn path(&self, index: u32) -> Option<&Path>;
    /// A rule by its number.
    fn rule(&self, rule: u32) -> Option<&Rule>;
    /// The rules that a field's value meets, by [`crate::layout::rule_fields`].
    fn rule_field(&self, at: u32) -> Option<&RuleSet>;
    /// The rules that a firewall mark meets; `None` if none names it.
    fn rules_of_mark(&self, mark: u32) -> Option<u64>;
    /// The rules that a source address meets.
    fn rules_of_source(&self, source: &Destination) -> u64;
    /// The rules that a destination address meets.
    fn rules_of_destination(&self, destination: &Destination) -> u64;
    /// The tunnels of a peer that a rule allows, a bit a slot.
    fn rule_tunnels(&self, rule: u32, peer: u32) -> u32;

    /// The first rule that a packet meets; see [`rules::first`].
    fn first_rule(&self, key: &FlowKey, marks: u64, among: u64) -> u32 {
        rules::first(self, key, marks, among)
    }

    /// The tunnel for a packet; see [`choose`]. The last is the exact clock's reading, if it was read, or 0.
    fn choose(&self, peer: u32, hash: u64, rule: u32, size: u64, _: u64) -> u64 {
        choose(self, peer, hash, rule, size)
    }

    /// The slot that ranks first in a peer's bucket among some, or [`NONE`].
    fn best(&self, peer: u32, within: u32, among: u32) -> u32 {
        best(self, peer, within, among)
    }

    /// Charges a tunnel's link; see [`account::settle`].
    fn settle(&self, id: u32, now: u64, before: u64, bytes: u32, expected: u32) -> u32 {
        account::settle(self, id, now, before, bytes, expected)
    }

    /// The lowest rank among a peer's links; see [`first_rank`].
    fn first_rank(&self, peer: u32, within: u32, among: u32, now: u64, bytes: u32) -> u64 {
        first_rank(self, peer, within, among, now, bytes)
    }

    /// One of the bits that are set; see [`one_of`].
    fn one_of(&self, slots: u32, within: u32) -> u32 {
        one_of(slots, within)
    }

    /// The slot among some whose link is the least loaded, or [`NONE`]; see [`least`].
    fn least(&self, peer: u32, within: u32, among: u32, now: u64, current: u32) -> u32 {
        least(self, peer, within, among, now, current)
    }

    /// The slot among some that would deliver so many bytes first, or [`NONE`].
    fn earliest(&self, peer: u32, within: u32, among: u32, now: u64, bytes: u32) -> u32 {
        earliest(self, peer, within, among, now, bytes)
    }
}

/// The tunnel that a packet takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steer {
    /// The tunnel's id.
    pub tunnel: u32,
    /// Its interface's index, never 0.
    pub ifindex: u32,
    /// The bucket, by its place among all peers' buckets.
    pub bucket: u32,
    /// Bits of [`how`].
    pub how: u32,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to a tunnel.
    Steer(Steer),
    /// It is none of ours and goes on.
    NotSteered(Reason),
    /// It is a peer's and cannot be sent.
    Dropped(Reason),
}

/// A packet that is a peer's, and its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The peer's number.
    pub peer: u32,
    /// Of the flow key, and of the rule that it meets.
    pub hash: u64,
    /// The rule that the packet meets, or [`rules::NONE`].
    pub rule: u32,
}

/// Decides for the packet, which is no super-packet; notes in its bucket which tunnel it takes, and counts it there.
#[inline(always)]
pub fn decide<P: Packet + ?Sized, T: Tables + ?Sized>(packet: &P, tables: &T) -> Verdict {
    let steered = parse(packet).and_then(|parsed| {
        let flow = classify(&parsed, packet, tables)?;
        steer(&flow, segments(packet, parsed.transport, packet.length(), 0, 0), tables)
    });
    match steered {
        Ok(steer) => Verdict::Steer(steer),
        Err(reason) if reason.is_drop() => Verdict::Dropped(reason),
        Err(reason) => Verdict::NotSteered(reason),
    }
}

/// Finds the packet's peer and flow.
///
/// # Errors
/// Why it is not steered.
#[inline(always)]
pub fn classify<P: Packet + ?Sized, T: Tables + ?Sized>(
    parsed: &Parsed,
    packet: &P,
    tables: &T,
) -> Result<Flow, Reason> {
    let key = &parsed.key;
    let number = tables.peer_of(&parsed.destination).ok_or(Reason::NoPeer)?;
    let peer = tables.peer(number).ok_or(Reason::BadTable)?;
    let settings = tables.settings().ok_or(Reason::BadTable)?;
    let symmetric = settings.flags & settings_flags::SYMMETRIC != 0;
    let mut hash = key.hash(settings.seed, settings.hash_fields, symmetric);
    let among = peer.rules.get();
    let mut rule = rules::NONE;
    if among != 0 {
        rule = tables.first_rule(key, rules::marks(packet), among);
        if rule != rules::NONE {
            // Else flows that meet different rules would share buckets.
            hash = mix(hash ^ u64::from(rule + 1));
        }
    }
    Ok(Flow { peer: number, hash, rule })
}

/// Puts a flow's packet onto a tunnel.
///
/// # Errors
/// Why that cannot be.
#[inline(always)]
pub fn steer<T: Tables + ?Sized>(flow: &Flow, segments: Segments, tables: &T) -> Result<Steer, Reason> {
    steer_at(flow, segments, tables, 0)
}

/// The same; `now` is the exact clock's reading, if it was read, or 0.
///
/// # Errors
/// As above.
#[inline(always)]
pub fn steer_at<T: Tables + ?Sized>(flow: &Flow, segments: Segments, tables: &T, now: u64) -> Result<Steer, Reason> {
    let size = u64::from(segments.packets) << 32 | u64::from(segments.bytes);
    let chosen = Chosen::unpack(tables.choose(flow.peer, flow.hash, flow.rule, size, now))?;
    let id = tunnel_id(flow.peer, chosen.slot & (u32::BITS - 1));
    let tunnel = tables.tunnel(id).filter(|tunnel| tunnel.ifindex != 0).ok_or(Reason::BadTable)?;
    Ok(Steer { tunnel: id, ifindex: tunnel.ifindex, bucket: chosen.bucket, how: chosen.how })
}

/// What [`choose`] found, as one word: BPF functions return no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chosen {
    slot: u32,
    bucket: u32,
    how: u32,
}

impl Chosen {
    #[inline(always)]
    fn pack(self) -> u64 {
        u64::from(self.bucket) << 32 | u64::from(self.slot & 0xff) << 16 | u64::from(self.how & 0xff) << 8
    }

    #[inline(always)]
    fn unpack(word: u64) -> Result<Self, Reason> {
        match word as u8 {
            0 => Ok(Self {
                slot: (word >> 16) as u32 & 0xff,
                bucket: (word >> 32) as u32,
                how: (word >> 8) as u32 & 0xff,
            }),
            NO_LIVE_TUNNEL => Err(Reason::NoLiveTunnel),
            _ => Err(Reason::BadTable),
        }
    }
}

const NO_LIVE_TUNNEL: u8 = 1;
const BAD_TABLE: u8 = 2;
/// What [`choose`] says where it cannot look anything up.
pub const BAD_STATE: u64 = BAD_TABLE as u64;

/// What [`Tables::choose`] does: the tunnel for a packet of a flow, as [`Chosen`] packs it. `size` has its segments, and in
/// the lower half its bytes. BPF makes a function of its own of it: on the many paths through the parser the verifier then
/// sees only a call.
#[inline(always)]
pub fn choose<T: Tables + ?Sized>(tables: &T, number: u32, hash: u64, rule: u32, size: u64) -> u64 {
    let segments = Segments { packets: (size >> 32) as u32, bytes: size as u32 };
    let bytes = segments.bytes;
    let Some(peer) = tables.peer(number) else { return u64::from(BAD_TABLE) };
    let mut terms = Terms { policy: peer.policy.get(), usable: peer.live.get() };
    if rule != rules::NONE {
        let Some(record) = tables.rule(rule) else { return u64::from(BAD_TABLE) };
        terms = terms.under(record, tables.rule_tunnels(rule, number));
    }
    if terms.usable == 0 {
        return u64::from(NO_LIVE_TUNNEL);
    }

    let within = hash as u32 & peer.bucket_mask;
    let index = peer.bucket_base.wrapping_add(within);
    let Some(bucket) = tables.bucket(index) else { return u64::from(BAD_TABLE) };
    if rule != rules::NONE && bucket.ruled.get() == 0 {
        bucket.ruled.set(1);
    }
    let sprayed = is_sprayed(terms.policy, bucket.flags.get());
    let tick = tables.settings().map_or(0, |settings| settings.tick_ns);
    // Queues are modelled by single packets: a tick is too long for them.
    let Moment { at: now, stamp, idle } =
        Moment::now(tables, if sprayed { 0 } else { tick }, peer.gap_ns.get(), bucket.last_ns.get());
    bucket.last_ns.set(stamp);
    bucket.bytes.set(bucket.bytes.get().wrapping_add(bytes));

    let current = u32::from(bucket.tunnel.get());
    let lives = terms.usable.checked_shr(current).unwrap_or(0) & 1 == 1;
    let (mut slot, mut how, mut is_new) = (current, 0, false);
    if sprayed {
        slot = tables.earliest(number, within, terms.preferred(peer), now, bytes);
        how = how::SPRAYED;
    } else if !lives || idle >= u64::from(peer.gap_ns.get()) {
        slot = anew(tables, number, peer, &terms, within, bucket, now, idle);
        is_new = idle >= FORGOTTEN_NS || slot != current;
        if slot != current {
            how = if lives && terms.policy != policy::HASH { how::FLOWLET } else { how::FAILOVER };
        }
    }
    if slot == NONE {
        return u64::from(BAD_TABLE);
    }
    if slot != current {
        bucket.tunnel.set(slot as u8);
    }
    let expected = if is_new { peer.expected_bytes.get() } else { 0 };
    let at_once = is_new || terms.policy == policy::SPRAY || sprayed;
    account::put(tables, tunnel_id(number, slot), now, &Put { segments, how, expected, at_once });
    Chosen { slot, bucket: index, how }.pack()
}

/// Whether each packet of a bucket chooses by itself.
#[must_use]
#[inline(always)]
pub fn is_sprayed(policy: u32, flags: u8) -> bool {
    match policy {
        policy::SPRAY => flags & bucket_flags::WHOLE == 0,
        policy::ADAPTIVE => flags & bucket_flags::SPRAY != 0,
        _ => false,
    }
}

/// When a bucket's packet comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// Up to a tick too early or too late, nanoseconds of the monotonic clock.
    pub at: u64,
    /// Up to two ticks too late, never too early: what its bucket keeps.
    pub stamp: u64,
    /// The pause before it, or less: nothing is overtaken by a flow that is taken to have paused too short.
    pub idle: u64,
}

impl Moment {
    /// Reads the clock: the exact one costs as much as all the rest of a decision and is read only where the ticks cannot
    /// tell whether a pause is shorter than `gap`.
    #[inline(always)]
    pub fn now<T: Tables + ?Sized>(tables: &T, tick: u32, gap: u32, last: u64) -> Self {
        if tick != 0
            && gap >= tick
            && let Some(at) = tables.ticked(tick)
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

/// What holds for a packet.
struct Terms {
    /// See [`policy`].
    policy: u32,
    /// Live tunnels that it may take.
    usable: u32,
}

impl Terms {
    /// As a rule that the packet meets changes them; `allowed` are the peer's tunnels that the rule allows.
    #[inline(always)]
    fn under(self, rule: &Rule, allowed: u32) -> Self {
        let policy = match rule.policy.get() {
            policy::PEERS_OWN => self.policy,
            policy => policy,
        };
        let allowed = self.usable & allowed;
        let others_do = allowed == 0 && rule.flags.get() & rule_flags::PREFER != 0;
        Self { policy, usable: if others_do { self.usable } else { allowed } }
    }

    /// Tunnels that may take a new flow: those that are being drained only if there are no others.
    #[inline(always)]
    fn preferred(&self, peer: &Peer) -> u32 {
        match self.usable & peer.open.get() {
            0 => self.usable,
            open => open,
        }
    }
}

/// The slot for a bucket that may move.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined; a struct of them would go through the BPF stack")]
fn anew<T: Tables + ?Sized>(
    tables: &T,
    number: u32,
    peer: &Peer,
    terms: &Terms,
    within: u32,
    bucket: &Bucket,
    now: u64,
    idle: u64,
) -> u32 {
    let among = terms.preferred(peer);
    if terms.policy == policy::HASH {
        let home = u32::from(bucket.home.get());
        return if among.checked_shr(home).unwrap_or(0) & 1 == 1 { home } else { tables.best(number, within, among) };
    }
    let current = if idle >= FORGOTTEN_NS { NONE } else { u32::from(bucket.tunnel.get()) };
    tables.least(number, within, among, now, current)
}

/// What [`Tables::best`] does. BPF makes a function of its own of it, which the verifier looks at only once.
#[inline(always)]
pub fn best<T: Tables + ?Sized>(tables: &T, peer: u32, within: u32, among: u32) -> u32 {
    rendezvous::pick(within, among, |slot| tables.tunnel(tunnel_id(peer, slot)).map(Tunnel::candidate))
}

/// The slot among `among` whose link has the lowest level. The `current` one stays, unless that would leave its link
/// ahead by more than a new flow is expected to bring: where nothing is to be gained nothing moves. Ties go to the first
/// link in an order that differs from bucket to bucket.
#[inline(always)]
pub fn least<T: Tables + ?Sized>(tables: &T, peer: u32, within: u32, among: u32, now: u64, current: u32) -> u32 {
    let first = tables.first_rank(peer, within, among, now, 0);
    if among.checked_shr(current).unwrap_or(0) & 1 == 1
        && let Some(record) = tables.peer(peer)
        && let Some(load) = tables.load(tunnel_id(peer, current)).and_then(|load| tables.load(load.link.get()))
    {
        let margin = load::weighted_time_of(load, record.expected_bytes.get());
        if load::level(load, now) <= (first >> PLACE_BITS).saturating_add(margin) {
            return current;
        }
    }
    slot_of(tables, peer, within, among, first)
}

/// The slot among `among` that would deliver `bytes` first: earliest delivery path first, by the modelled queue, rate and
/// delay of each link. Source: Chebrolu, Rao, "Communication using multiple wireless interfaces", WCNC 2002.
///
/// Where rates are over-estimated all queues look empty; then the lower level decides, which deals out bytes evenly.
#[inline(always)]
pub fn earliest<T: Tables + ?Sized>(tables: &T, peer: u32, within: u32, among: u32, now: u64, bytes: u32) -> u32 {
    let first = tables.first_rank(peer, within, among, now, bytes);
    slot_of(tables, peer, within, among, first)
}

/// The lowest rank among a peer's links. A rank is [`rank`]'s cost with the link's place in its low bits, counted from
/// another link on from bucket to bucket. No comparison branches: the verifier would follow each branch of each turn.
#[inline(always)]
pub fn first_rank<T: Tables + ?Sized>(tables: &T, peer: u32, within: u32, among: u32, now: u64, bytes: u32) -> u64 {
    let count = tables.peer(peer).map_or(0, |peer| peer.path_count.get());
    let start = spread(within, count);
    let mut first = NO_RANK;
    for i in 0..u32::BITS {
        if i >= count {
            break;
        }
        let place = u64::from(i.wrapping_sub(start) & PLACE_MASK);
        let ranked = rank(tables, tunnel_id(peer, i), among, now, bytes) | place;
        // Both are below 2^63: the sign of the difference tells which is lower.
        let difference = ranked.wrapping_sub(first);
        first = first.wrapping_add(difference & (difference.cast_signed() >> 63).cast_unsigned());
    }
    first
}

const PLACE_BITS: u32 = 5;
const PLACE_MASK: u32 = (1 << PLACE_BITS) - 1;
/// Above every rank.
pub const NO_RANK: u64 = u64::MAX >> 1;

/// What a link costs, times 2^[`PLACE_BITS`]: without `bytes` its level, else when it would deliver them, nanoseconds
/// from `now`. [`NO_RANK`] without the place if none of `among` leaves by it.
#[inline(always)]
fn rank<T: Tables + ?Sized>(tables: &T, path: u32, among: u32, now: u64, bytes: u32) -> u64 {
    const NONE: u64 = NO_RANK & !(PLACE_MASK as u64);
    let Some(path) = tables.path(path) else { return NONE };
    let Some(load) = tables.load(path.link.get()) else { return NONE };
    let level = load::level(load, now);
    let mut cost = level;
    if bytes != 0 {
        cost = load::waits(load, now) + load::time_of(load, bytes) + u64::from(load.delay_ns.get());
        cost += level >> LEVEL_SHARE_BITS;
    }
    let leaving = u64::from(path.tunnels.get() & among);
    // All ones if none does.
    let none = ((leaving | leaving.wrapping_neg()) >> 63).wrapping_sub(1);
    (cost | none) << (PLACE_BITS + 1) >> 1
}

/// The level's share of the cost when delivery counts: enough to break ties, too little to outweigh a queued packet.
const LEVEL_SHARE_BITS: u32 = 12;

/// A slot of the link that a rank belongs to.
#[inline(always)]
fn slot_of<T: Tables + ?Sized>(tables: &T, peer: u32, within: u32, among: u32, rank: u64) -> u32 {
    let count = tables.peer(peer).map_or(0, |peer| peer.path_count.get());
    let place = (rank as u32).wrapping_add(spread(within, count)) & PLACE_MASK;
    tables.path(tunnel_id(peer, place)).map_or(NONE, |path| tables.one_of(path.tunnels.get() & among, within))
}

/// A number below `count` that differs from bucket to bucket.
#[inline(always)]
fn spread(within: u32, count: u32) -> u32 {
    let scattered = within.wrapping_mul(0x9e37_79b1);
    ((u64::from(scattered) * u64::from(count)) >> 32) as u32
}

/// One of the bits that are set, another one from bucket to bucket; [`NONE`] if there is none. No loop: kernels before
/// 6.4 would look at each of its ends by itself.
#[inline(always)]
pub fn one_of(slots: u32, within: u32) -> u32 {
    if slots == 0 {
        return NONE;
    }
    // How many set bits are left of the wanted one; halves that hold fewer are skipped.
    let mut skipped = spread(within ^ 0x5555, slots.count_ones());
    let (mut rest, mut at) = (slots, 0);
    let mut width = u32::BITS / 2;
    while width > 0 {
        let held = (rest & ((1 << width) - 1)).count_ones();
        let beyond = held.wrapping_sub(skipped + 1) >> 31;
        skipped -= held * beyond;
        rest >>= width * beyond;
        at += width * beyond;
        width /= 2;
    }
    at & (u32::BITS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_bit_is_chosen_alike_and_no_other() {
        for slots in [1u32, 0b11, 0b1010_0001, 0x8000_0000, 0x8000_0001, u32::MAX, 0x00ff_0f00] {
            let mut chosen = [0u32; 32];
            for within in 0..65_536 {
                chosen[one_of(slots, within) as usize] += 1;
            }
            let share = 65_536 / slots.count_ones();
            for (bit, count) in (0..).zip(chosen) {
                let wanted = if slots >> bit & 1 == 1 { share } else { 0 };
                assert!(count.abs_diff(wanted) <= wanted / 50 + 2, "{slots:#x}: bit {bit} {count} times, not {wanted}");
            }
        }
        assert_eq!(one_of(0, 7), NONE);
    }
}
