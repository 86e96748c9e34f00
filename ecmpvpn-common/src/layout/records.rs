//! Records of peers, tunnels, buckets and links.

use super::names::{MAX_PEERS, MAX_TUNNELS, MAX_TUNNELS_PER_PEER, PEER_CACHE_WORDS};
use crate::clock::Clock;
use crate::rendezvous::Candidate;
use crate::shared::{Shared, Whole};

/// Identifies a tunnel among all peers' tunnels: the peer's number times [`MAX_TUNNELS_PER_PEER`], plus the tunnel's
/// slot at that peer.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TunnelId(u32);

impl TunnelId {
    /// `slot` is below [`MAX_TUNNELS_PER_PEER`].
    #[must_use]
    #[inline(always)]
    pub const fn new(peer: u32, slot: u32) -> Self {
        Self(peer * MAX_TUNNELS_PER_PEER + slot)
    }

    /// As [`Self::new`], from indexes of lists.
    #[must_use]
    pub const fn at(peer: usize, slot: usize) -> Self {
        Self::new(peer as u32, slot as u32)
    }

    /// The id with the number that a map holds.
    #[must_use]
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// The number that the maps hold.
    #[must_use]
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Index of the tunnel in arrays that are indexed by tunnel id.
    #[must_use]
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    #[must_use]
    pub const fn peer(self) -> u32 {
        self.0 / MAX_TUNNELS_PER_PEER
    }

    #[must_use]
    pub const fn slot(self) -> u32 {
        self.0 % MAX_TUNNELS_PER_PEER
    }
}

/// Everything that the programs read for every packet, except the buckets. It is one record, because each map look-up
/// costs about as much as the whole flow hash.
#[repr(C)]
pub struct State {
    pub settings: Whole<Settings>,
    /// Only the programs use it.
    pub clock: Clock,
    /// Number of entries of [`Self::peers`] that are in use.
    pub peer_count: Shared<u32>,
    /// Zero.
    pub padding: u32,
    /// Cache from recent IPv4 destinations to their peers; see [`crate::peer_cache`].
    pub peer_cache: [Shared<u64>; PEER_CACHE_WORDS as usize],
    /// Indexed by peer number.
    pub peers: [Peer; MAX_PEERS as usize],
    /// Indexed by tunnel id.
    pub tunnels: [Whole<Tunnel>; MAX_TUNNELS as usize],
    /// Indexed by tunnel id.
    pub loads: [Load; MAX_TUNNELS as usize],
    /// Links of the peers, [`MAX_TUNNELS_PER_PEER`] entries per peer.
    pub paths: [Path; MAX_TUNNELS as usize],
    /// How arriving packets are put back in order, by peer number.
    pub orders: [Order; MAX_PEERS as usize],
}

/// Settings that apply to all peers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Key of the flow hash.
    pub seed: u64,
    /// Bits of [`crate::flow::fields`].
    pub hash_fields: u32,
    /// Bits of [`settings_flags`].
    pub flags: u32,
    pub steering_ifindex: u32,
    /// Period of the kernel's tick, nanoseconds; 0: unknown.
    pub tick_ns: u32,
    /// Version of the contents of [`super::maps::PREFIXES`]. It grows with each change, and is odd while a change is in
    /// progress.
    pub prefixes_version: u32,
    /// Netmask as long as the longest IPv4 prefix, at least /16, network byte order. Addresses that differ only beyond
    /// it belong to the same peer, and either all or none of them are link-local or multicast.
    pub ipv4_mask: u32,
    /// The same for IPv6, at least /10.
    pub ipv6_mask: [u32; 4],
}

/// Bits of [`Settings::flags`].
pub mod settings_flags {
    /// Both directions of a flow have the same hash.
    pub const SYMMETRIC: u32 = 1 << 0;
    /// The programs are attached to clsact, not to tcx.
    pub const CLSACT: u32 = 1 << 1;
    /// ecmpvpn added the steering device's clsact qdisc.
    pub const CLSACT_ADDED: u32 = 1 << 2;
    /// TCP connections begin with the MSS that their hosts chose.
    pub const MSS_KEPT: u32 = 1 << 3;
}

/// Key of the longest-prefix match. The family comes first, so that no IPv6 prefix matches an IPv4 address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// 4 or 6.
    pub family: u32,
    /// Network byte order; an IPv4 address is the first word, the others are 0.
    pub address: [u32; 4],
}

impl Address {
    /// Length of the part of the key before the address, bits.
    pub const FAMILY_BITS: u32 = 32;
}

/// A remote site.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Tunnels that are up, one bit per slot. One write to it fails over or back.
    pub live: Shared<u32>,
    /// Tunnels that take new flows, one bit per slot. The others are being drained.
    pub open: Shared<u32>,
    /// Index of the peer's first bucket among all peers' buckets.
    pub bucket_base: u32,
    /// Number of the peer's buckets minus one. The number of buckets is a power of two.
    pub bucket_mask: u32,
    /// Number of a [`Policy`].
    pub policy: Shared<u32>,
    /// Number of the peer's slots, counted from slot 0. A slot whose tunnel was removed has interface index 0.
    pub tunnel_count: Shared<u32>,
    /// Flowlet gap, nanoseconds. A bucket without a packet for this long may move, because nothing that it sent can be
    /// overtaken any more.
    pub gap_ns: Shared<u32>,
    /// Number of the peer's links in [`State::paths`].
    pub path_count: Shared<u32>,
    /// Rules that apply to the peer, one bit per rule.
    pub rules: Shared<u64>,
    /// Bytes that a new flow is expected to send soon.
    pub expected_bytes: Shared<u32>,
    /// Bits of [`peer_flags`].
    pub flags: Shared<u32>,
    /// Zero.
    pub padding: [u32; 8],
    /// Padded with zeros.
    pub name: [u8; 32],
}

/// Bits of [`Peer::flags`].
pub mod peer_flags {
    /// Sprayed packets are stamped: the far end restores their order. Then they may be of any transport.
    pub const STAMP: u32 = 1 << 0;
    /// Packets that are not stamped lose the mark of stamped ones, if their sender has made it up.
    pub const UNMARK: u32 = 1 << 1;
    /// Order is not restored for this peer, in neither direction, although the site restores it. Read by the daemon
    /// only.
    pub const UNRESTORED: u32 = 1 << 2;
}

/// How the packets that arrive from a peer are put back in order; see [`crate::order`].
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// Interface index of the device that holds packets until their time; 0: marked packets pass as they are.
    pub device: Shared<u32>,
    /// Longest hold, in units of [`crate::order::UNIT_BITS`].
    pub bound: Shared<u32>,
    /// Begin of the present window, in the same units.
    pub since: Shared<u32>,
    /// Highest delay of the present window in the upper half, lowest delay in the lower half.
    pub present: Shared<u32>,
    /// The same of the window before.
    pub former: Shared<u32>,
    /// Packets in succession whose delays were beyond the bound.
    pub strays: Shared<u32>,
    /// When the present stretch of stamps begins, in the same units, by the clock of this host.
    pub stretch: Shared<u32>,
    /// What is added to the stamps at the stretch's begin in the upper half, and at its end in the lower half, in
    /// the same units, modulo 2^16.
    pub added: Shared<u32>,
    /// The same of the stretch before.
    pub before: Shared<u32>,
    /// The delay by which stamps are converted to the clock of this host, in the same units, modulo 2^16.
    pub reference: Shared<u32>,
    /// How much the delays of the tunnels vary although nothing waits, in the same units. From the probes.
    pub spread: Shared<u32>,
    /// Zero.
    pub padding: [u32; 5],
}

impl Peer {
    #[must_use]
    #[inline(always)]
    pub fn policy(&self) -> Policy {
        Policy::of_bits(self.policy.get())
    }
}

/// How flows are distributed over a peer's tunnels.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// By the flow hash and the tunnels' weights alone.
    Hash = 0,
    /// To the least loaded tunnel whenever the flow pauses.
    Flowlet = 1,
    /// As [`Self::Flowlet`]. In addition the daemon moves busy buckets off an overloaded tunnel.
    Adaptive = 2,
    /// Packet by packet, to the tunnel that delivers first.
    Spray = 3,
}

impl Policy {
    /// In the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Hash, Self::Flowlet, Self::Adaptive, Self::Spray];

    /// The policy with this number; `None` if this version does not know the number.
    #[must_use]
    #[inline(always)]
    pub const fn of(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Hash),
            1 => Some(Self::Flowlet),
            2 => Some(Self::Adaptive),
            3 => Some(Self::Spray),
            _ => None,
        }
    }

    /// The policy with a number that this version wrote. It looks at the two low bits only, so that the program needs
    /// no branch for numbers that do not occur.
    #[must_use]
    #[inline(always)]
    pub const fn of_bits(number: u32) -> Self {
        match number & 3 {
            0 => Self::Hash,
            1 => Self::Flowlet,
            2 => Self::Adaptive,
            _ => Self::Spray,
        }
    }

    /// Whether a bucket uses the tunnel that ranks first in it, and not the least loaded one.
    #[must_use]
    #[inline(always)]
    pub const fn is_by_rank(self) -> bool {
        match self {
            Self::Hash => true,
            Self::Flowlet | Self::Adaptive | Self::Spray => false,
        }
    }

    /// Whether a tunnel is chosen for each packet, unless the bucket's flags say otherwise.
    #[must_use]
    #[inline(always)]
    pub const fn sprays_all(self) -> bool {
        match self {
            Self::Spray => true,
            Self::Hash | Self::Flowlet | Self::Adaptive => false,
        }
    }

    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// See [`crate::rendezvous::key_of`].
    pub key: u64,
    /// Interface index; 0: no such tunnel.
    pub ifindex: u32,
    /// See [`crate::rendezvous::inverse_weight`].
    pub inverse_weight: u32,
    /// Share relative to the peer's other tunnels.
    pub weight: u16,
    /// Bits of [`tunnel_flags`].
    pub flags: u16,
    /// Zero.
    pub padding: u32,
    /// Interface name, padded with zeros.
    pub name: [u8; 16],
}

/// Bits of [`Tunnel::flags`].
pub mod tunnel_flags {
    /// ecmpvpn added the clsact qdisc of the tunnel's device.
    pub const CLSACT_ADDED: u16 = 1 << 0;
    /// The weight is learned from what the tunnel's link delivers.
    pub const AUTO_WEIGHT: u16 = 1 << 1;
}

impl Tunnel {
    /// What the tunnel is ranked by.
    #[must_use]
    #[inline(always)]
    pub fn candidate(&self) -> Candidate {
        Candidate { key: self.key, inverse_weight: self.inverse_weight }
    }
}

/// State of all flows whose hash ends in the bucket's number.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Bucket {
    /// Time of the last packet, nanoseconds of the monotonic clock. It is never too early, but may be up to two
    /// [`Settings::tick_ns`] too late.
    pub last_ns: Shared<u64>,
    /// Bytes of all packets, modulo 2^32.
    pub bytes: Shared<u32>,
    /// Slot of the tunnel that the bucket uses.
    pub tunnel: Shared<u8>,
    /// Slot of the tunnel that the bucket belongs to while all tunnels are up.
    pub home: Shared<u8>,
    /// Bits of [`bucket_flags`].
    pub flags: Shared<u8>,
    /// Bits of [`bucket_seen`].
    pub seen: Shared<u8>,
}

/// Bits of [`Bucket::flags`].
pub mod bucket_flags {
    /// The bucket's packets are sprayed under policy `adaptive`.
    pub const SPRAY: u8 = 1 << 0;
    /// The bucket's packets are not sprayed under policy `spray`.
    pub const WHOLE: u8 = 1 << 1;
    /// The bucket's packets are stamped although they are not sprayed: they will be soon, or were until now. So none
    /// overtakes another at the change.
    pub const STAMP: u8 = 1 << 2;
}

/// Bits of [`Bucket::seen`]: what the programs saw of a bucket's packets.
pub mod bucket_seen {
    /// A packet matched a rule. `run` clears it.
    pub const RULED: u8 = 1 << 0;
    /// The last packet must stay in order, so it was not sprayed. Only of the last packet: an ICMP error that a flow is
    /// answered with shares the flow's bucket, and must not stand for it.
    pub const ORDERED: u8 = 1 << 1;
}

/// The link by which a tunnel's bytes leave the host, and how much is on its way there; see [`crate::load`]. Tunnels
/// that leave by the same link share one record: the record of the tunnel that [`Load::link`] names.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// Time when the link will have sent everything that was put onto it, nanoseconds of the monotonic clock.
    pub free_ns: Shared<u64>,
    /// Time that recent bytes take on the link, nanoseconds.
    pub level_ns: Shared<u64>,
    /// Time for which the level was computed, nanoseconds of the monotonic clock.
    pub stamp_ns: Shared<u64>,
    /// Buckets that the daemon moved to this tunnel.
    pub rebalance_moves: Shared<u64>,
    /// Number of the [`TunnelId`] whose record is used for this tunnel: its own, unless it shares the record of another
    /// tunnel.
    pub link: Shared<u32>,
    /// Time that a byte takes on the link, nanoseconds with [`crate::load::COST_BITS`] fractional bits. Used for the
    /// queue.
    pub cost: Shared<u32>,
    /// The same if the link were as fast as its tunnels' weights say. Used for the level.
    pub weighted_cost: Shared<u32>,
    /// How much longer the tunnel's path takes than the peer's fastest path, nanoseconds.
    pub delay_ns: Shared<u32>,
    /// By how much the link's queue is shorter than [`crate::load::MAX_QUEUE_NS`] when it drops packets, nanoseconds; 0:
    /// it drops none.
    pub shortfall_ns: Shared<u32>,
    /// How long packets rather wait for other links than use this one, which loses packets, nanoseconds.
    pub loss_ns: Shared<u32>,
}

impl Load {
    #[must_use]
    #[inline(always)]
    pub fn link(&self) -> TunnelId {
        TunnelId::from_number(self.link.get())
    }
}

/// One of a peer's links.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Path {
    /// Number of the [`TunnelId`] whose [`Load`] describes the link.
    pub link: Shared<u32>,
    /// The peer's tunnels that leave by the link, one bit per slot.
    pub tunnels: Shared<u32>,
}

impl Path {
    #[must_use]
    #[inline(always)]
    pub fn link(&self) -> TunnelId {
        TunnelId::from_number(self.link.get())
    }
}

/// What is known about a tunnel besides its counters.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Health {
    /// Time of the last completed WireGuard handshake, nanoseconds of the clock that also runs while the machine sleeps
    /// (`CLOCK_BOOTTIME`); 0: none. Only kept for tunnels whose device cannot be queried: those of the userspace
    /// backend.
    pub last_handshake_ns: Shared<u64>,
    /// Time when probing last found that the tunnel went down or came back, same clock; 0: never.
    pub changed_ns: Shared<u64>,
    /// Lowest round-trip time of the last 10 to 20 seconds, microseconds; 0: unknown.
    pub rtt_min_us: Shared<u32>,
    /// Smoothed round-trip time, microseconds; 0: unknown.
    pub rtt_us: Shared<u32>,
    /// Mean deviation of the round-trip time, microseconds.
    pub rtt_jitter_us: Shared<u32>,
    /// Lost probes among the last 256, millionths.
    pub loss_ppm: Shared<u32>,
    /// How often the tunnel went down.
    pub deaths: Shared<u32>,
    /// How often the tunnel was restarted because it stayed down.
    pub restarts: Shared<u32>,
}

impl Health {
    /// Sets every field to 0, as for a tunnel about which nothing is known.
    pub fn clear(&self) {
        let Self { last_handshake_ns, changed_ns, rtt_min_us, rtt_us, rtt_jitter_us, loss_ppm, deaths, restarts } =
            self;
        for word in [last_handshake_ns, changed_ns] {
            word.set(0);
        }
        for word in [rtt_min_us, rtt_us, rtt_jitter_us, loss_ppm, deaths, restarts] {
            word.set(0);
        }
    }
}
