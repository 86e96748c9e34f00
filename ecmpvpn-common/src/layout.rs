//! What the BPF maps hold: names, sizes and records. All integers are of the host's byte order unless said otherwise.
//!
//! Records that both sides write at any time are [`Shared`], and are read and written through mapped memory.

use crate::clock::Clock;
use crate::shared::{Shared, Whole};

use crate::rendezvous::Candidate;

/// Part of the directory that pins are in: one version's maps are never taken for another's.
pub const LAYOUT_VERSION: u32 = 4;
/// Remote sites.
pub const MAX_PEERS: u32 = 64;
/// Tunnels of one peer: its live ones fit one word.
pub const MAX_TUNNELS_PER_PEER: u32 = 32;
/// A power of two. So few that one peer's fill half a mebibyte: with twice as many, 1,000,000 flows cost a quarter more a
/// packet on a processor whose second cache is as large (docs/benchmarks.md).
pub const BUCKETS_PER_PEER: u32 = 32_768;
/// Rules: those that apply to a packet fit one word.
pub const MAX_RULES: u32 = 64;
/// Prefixes of rules: one each, all addresses of each family, and one more, since kernels before 6.11 take no new value
/// for a prefix of a full table.
pub const MAX_RULE_PREFIXES: u32 = MAX_RULES + 3;

/// Names of the maps, in the object and among the pins. At most 15 bytes: the kernel cuts off more.
pub mod maps {
    /// Array of one [`super::State`]; mapped.
    pub const STATE: &str = "STATE";
    /// Longest-prefix match from [`super::Address`] to the peer's number.
    pub const PREFIXES: &str = "PREFIXES";
    /// Hash from interface index to tunnel id.
    pub const TUNNEL_IDS: &str = "TUNNEL_IDS";
    /// Array of [`super::Bucket`]; mapped.
    pub const BUCKETS: &str = "BUCKETS";
    /// Array per CPU of [`super::TunnelCounters`], by the tunnel's id.
    pub const COUNTERS: &str = "COUNTERS";
    /// Array per CPU of 64-bit counters, by [`super::Reason`].
    pub const REASONS: &str = "REASONS";
    /// Array of [`super::Health`], by the tunnel's id; mapped. The programs do not look at it.
    pub const HEALTH: &str = "HEALTH";
    /// Array of [`super::Rule`], by the rule's number; mapped.
    pub const RULES: &str = "RULES";
    /// Array of [`super::RuleSet`], by [`super::rule_fields`]; mapped.
    pub const RULE_FIELDS: &str = "RULE_FIELDS";
    /// Longest-prefix match from a source [`super::Address`] to the rules that it meets, a bit each.
    pub const RULE_SOURCES: &str = "RULE_SOURCES";
    /// The same for destinations.
    pub const RULE_DESTS: &str = "RULE_DESTS";
    /// Hash from firewall mark to the rules that it meets; marks that no rule names are not there.
    pub const RULE_MARKS: &str = "RULE_MARKS";
    /// Array of [`super::TunnelSet`], by `rule * MAX_PEERS + peer`; mapped.
    pub const RULE_TUNNELS: &str = "RULE_TUNNELS";
    /// Hash from [`crate::arrivals::Arrival`] to [`crate::arrivals::ArrivalCounters`] per CPU.
    pub const ARRIVALS: &str = "ARRIVALS";
    /// Hash from a followed member's interface index to [`crate::arrivals::member_flags`]. The programs do not look at
    /// it.
    pub const MEMBERS: &str = "MEMBERS";
    /// Every map that is pinned.
    pub const ALL: [&str; 15] = [
        STATE,
        PREFIXES,
        TUNNEL_IDS,
        BUCKETS,
        COUNTERS,
        REASONS,
        HEALTH,
        RULES,
        RULE_FIELDS,
        RULE_SOURCES,
        RULE_DESTS,
        RULE_MARKS,
        RULE_TUNNELS,
        ARRIVALS,
        MEMBERS,
    ];
}

/// Names of the programs, in the object and among the pins.
pub mod programs {
    /// TC egress of the steering device.
    pub const EGRESS: &str = "ecmpvpn_egress";
    /// TC ingress of every tunnel.
    pub const INGRESS: &str = "ecmpvpn_ingress";
    /// TC ingress of every bond member. At most 15 bytes: a pinned program's name is what the kernel keeps of it.
    pub const ARRIVAL: &str = "ecmpvpn_arrival";
    /// Every program that runs.
    pub const ALL: [&str; 3] = [EGRESS, INGRESS, ARRIVAL];
    /// Only redirects: what [`EGRESS`] is measured against. Loaded for nothing else.
    pub const BASELINE: &str = "ecmpvpn_baseline";
}

/// Names of the programs' constants, set at load.
pub mod globals {
    /// 1 or 2 for `BPF_PROG_TEST_RUN`: packets begin with an Ethernet header. With 2 the time is what the packet says that
    /// it is (`skb->tstamp`), unless that is 0, and the choice is written to `skb->cb`.
    pub const TEST_RUN: &str = "TEST_RUN";
    /// In test runs: so many flows, at most 2^24, that the packet belongs to in turn, repetition by repetition; 0: the
    /// packet stays as it is given.
    pub const FLOWS: &str = "FLOWS";
}

/// Words of `skb->cb` that a test run leaves its choice in.
pub mod test_run {
    /// Bytes before the network header.
    pub const ETHERNET_HEADER: u32 = 14;
    /// The tunnel's id plus 1, or 0 if the packet was not put onto a tunnel.
    pub const TUNNEL: usize = 0;
    /// The bucket, by its place among all peers' buckets.
    pub const BUCKET: usize = 1;
    /// How the packet came to its tunnel: bits of [`super::how`].
    pub const HOW: usize = 2;
    /// The number of the [`super::Reason`] why the packet was not put onto a tunnel.
    pub const REASON: usize = 3;
    /// 1 if it was steered by [`crate::fast_path`], 2 if its bucket stayed where it was.
    pub const FAST_PATH: usize = 4;
}

/// A tunnel's id.
#[must_use]
#[inline(always)]
pub const fn tunnel_id(peer: u32, slot: u32) -> u32 {
    peer * MAX_TUNNELS_PER_PEER + slot
}

/// Number of peers that there may be tunnels for, times [`MAX_TUNNELS_PER_PEER`].
pub const MAX_TUNNELS: u32 = MAX_PEERS * MAX_TUNNELS_PER_PEER;
/// Entries of [`State::peer_cache`]; a power of two.
pub const PEER_CACHE_WORDS: u32 = 256;

/// What the programs look at with every packet, but for the buckets: in one record, since each look-up in a map costs
/// about as much as the whole flow hash.
#[repr(C)]
pub struct State {
    /// What holds for all peers.
    pub settings: Whole<Settings>,
    /// The programs' own.
    pub clock: Clock,
    /// Number of [`Self::peers`] that there are.
    pub peer_count: Shared<u32>,
    /// Zero.
    pub padding: u32,
    /// The peers of the latest IPv4 destinations; see [`crate::peer_cache`].
    pub peer_cache: [Shared<u64>; PEER_CACHE_WORDS as usize],
    /// By the peer's number.
    pub peers: [Peer; MAX_PEERS as usize],
    /// By the tunnel's id.
    pub tunnels: [Whole<Tunnel>; MAX_TUNNELS as usize],
    /// By the tunnel's id.
    pub loads: [Load; MAX_TUNNELS as usize],
    /// The links of each peer, [`MAX_TUNNELS_PER_PEER`] a peer.
    pub paths: [Path; MAX_TUNNELS as usize],
}

/// What holds for all peers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Keys the flow hash.
    pub seed: u64,
    /// See [`crate::flow::fields`].
    pub hash_fields: u32,
    /// Bits of [`settings_flags`].
    pub flags: u32,
    /// Index of the steering device.
    pub steering_ifindex: u32,
    /// How far apart the kernel's ticks are, nanoseconds; 0: not known.
    pub tick_ns: u32,
    /// Grows with each change of [`maps::PREFIXES`]; odd while they change.
    pub prefixes_version: u32,
    /// As many leading bits as the longest IPv4 prefix has, at least 16, network byte order: addresses that differ only
    /// beyond them have the same peer, and all of them stay on the link or none does.
    pub ipv4_mask: u32,
    /// The same for IPv6; at least 10 bits.
    pub ipv6_mask: [u32; 4],
}

/// Bits of [`Settings::flags`].
pub mod settings_flags {
    /// Both directions of a flow hash alike.
    pub const SYMMETRIC: u32 = 1 << 0;
    /// The programs are attached to clsact, not to tcx.
    pub const CLSACT: u32 = 1 << 1;
    /// The steering device's clsact qdisc was added by us.
    pub const CLSACT_ADDED: u32 = 1 << 2;
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
    /// Bits of the key that stand before the address.
    pub const FAMILY_BITS: u32 = 32;
}

/// A remote site.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Tunnels that carry traffic, a bit a slot: one write to it fails over or back.
    pub live: Shared<u32>,
    /// Tunnels that take new flows, a bit a slot; the others are being drained.
    pub open: Shared<u32>,
    /// First of its buckets.
    pub bucket_base: u32,
    /// Number of its buckets less one.
    pub bucket_mask: u32,
    /// Number of a [`Policy`].
    pub policy: Shared<u32>,
    /// Number of its slots, from 0 on. A slot whose tunnel was taken away has no interface index.
    pub tunnel_count: Shared<u32>,
    /// A bucket without a packet for so long may move: then nothing that it sent can be overtaken. Nanoseconds.
    pub gap_ns: Shared<u32>,
    /// Number of its links in [`State::paths`].
    pub path_count: Shared<u32>,
    /// Rules that apply to it, a bit each.
    pub rules: Shared<u64>,
    /// What a new flow is expected to send soon, bytes.
    pub expected_bytes: Shared<u32>,
    /// Zero.
    pub padding: [u32; 9],
    /// Its name, filled up with zeros.
    pub name: [u8; 32],
}

impl Peer {
    /// Its policy.
    #[must_use]
    #[inline(always)]
    pub fn policy(&self) -> Policy {
        Policy::of_bits(self.policy.get())
    }
}

/// How flows are put onto a peer's tunnels.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// By the flow hash and the tunnels' weights alone.
    Hash = 0,
    /// To the least loaded tunnel whenever the flow pauses.
    Flowlet = 1,
    /// As flowlet, and busy buckets move off an overloaded tunnel.
    Adaptive = 2,
    /// Packet by packet, to the tunnel that delivers first.
    Spray = 3,
}

impl Policy {
    /// Every policy, by its number.
    pub const ALL: [Self; 4] = [Self::Hash, Self::Flowlet, Self::Adaptive, Self::Spray];

    /// The policy of this number in a record; `None`: none of this version's.
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

    /// The policy of a number that this version wrote: only its two low bits are looked at, so that the program needs no
    /// branch for numbers that do not occur.
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

    /// Its number in a record.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }
}

/// In [`Rule::policy`]: the peer's own.
pub const PEERS_OWN: u32 = u32::MAX;

/// Bits that say how a packet came to its tunnel.
pub mod how {
    /// Its bucket came from a tunnel that died, or went back home under policy `hash`.
    pub const FAILOVER: u32 = 1 << 0;
    /// Its bucket came to the tunnel after a pause.
    pub const FLOWLET: u32 = 1 << 1;
    /// The tunnel was chosen for this packet alone.
    pub const SPRAYED: u32 = 1 << 2;
}

/// A tunnel.
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
    /// Interface name, filled up with zeros.
    pub name: [u8; 16],
}

/// Bits of [`Tunnel::flags`].
pub mod tunnel_flags {
    /// Its clsact qdisc was added by us.
    pub const CLSACT_ADDED: u16 = 1 << 0;
    /// Its weight is learnt from what its link delivers.
    pub const AUTO_WEIGHT: u16 = 1 << 1;
}

impl Tunnel {
    /// What ranks it.
    #[must_use]
    #[inline(always)]
    pub fn candidate(&self) -> Candidate {
        Candidate { key: self.key, inverse_weight: self.inverse_weight }
    }
}

/// The flows whose hash ends in the bucket's number.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Bucket {
    /// When it last had a packet, nanoseconds of the monotonic clock; never earlier than it was, but up to two
    /// [`Settings::tick_ns`] later.
    pub last_ns: Shared<u64>,
    /// Bytes of all its packets, modulo 2^32.
    pub bytes: Shared<u32>,
    /// Slot of the tunnel that it uses.
    pub tunnel: Shared<u8>,
    /// Slot of the tunnel that it belongs to while all tunnels live.
    pub home: Shared<u8>,
    /// Bits of [`bucket_flags`].
    pub flags: Shared<u8>,
    /// The programs set it to 1 with a packet that meets a rule; `run` takes it back.
    pub ruled: Shared<u8>,
}

/// Bits of [`Bucket::flags`].
pub mod bucket_flags {
    /// Its packets are sprayed under policy `adaptive`.
    pub const SPRAY: u8 = 1 << 0;
    /// Its packets stay together under policy `spray`.
    pub const WHOLE: u8 = 1 << 1;
}

/// Where a tunnel's bytes leave the host, and how much is on its way there; see [`crate::load`]. Tunnels that leave by
/// one link share one record: that of the tunnel that [`Load::link`] names.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// When the link will have sent all that was put onto it, nanoseconds of the monotonic clock.
    pub free_ns: Shared<u64>,
    /// Time that recent bytes take, nanoseconds.
    pub level_ns: Shared<u64>,
    /// When the level was right.
    pub stamp_ns: Shared<u64>,
    /// Buckets that the daemon moved to this tunnel.
    pub rebalance_moves: Shared<u64>,
    /// Id of the tunnel whose record counts for this one; its own where it shares its link with none.
    pub link: Shared<u32>,
    /// What a byte costs on the link, nanoseconds with [`crate::load::COST_BITS`] fractional bits: for its queue.
    pub cost: Shared<u32>,
    /// The same, were the link as fast as its tunnels' weights say: for its level.
    pub weighted_cost: Shared<u32>,
    /// What the tunnel's path takes longer than the peer's quickest one, nanoseconds.
    pub delay_ns: Shared<u32>,
    /// Zero.
    pub padding: [u32; 2],
}

/// One of a peer's links.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Path {
    /// Id of the tunnel whose [`Load`] counts.
    pub link: Shared<u32>,
    /// The peer's tunnels that leave by it, a bit a slot.
    pub tunnels: Shared<u32>,
}

/// What is done with the packets that a rule matches.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Rule {
    /// Number of a [`Policy`], or [`PEERS_OWN`].
    pub policy: Shared<u32>,
    /// Bits of [`rule_flags`].
    pub flags: Shared<u32>,
}

/// Bits of [`Rule::flags`].
pub mod rule_flags {
    /// When none of the allowed tunnels lives, the peer's other tunnels are used; else the packet is dropped.
    pub const PREFER: u32 = 1 << 0;
}

/// Tunnels that a rule allows one peer's packets.
#[repr(C)]
#[derive(Debug, Default)]
pub struct TunnelSet {
    /// A bit a slot.
    pub tunnels: Shared<u32>,
    /// Zero: entries of an array are 8 bytes apart.
    pub padding: u32,
}

/// Rules, a bit each.
#[repr(C)]
#[derive(Debug, Default)]
pub struct RuleSet {
    /// Rule 0 is the lowest bit.
    pub rules: Shared<u64>,
}

/// Places in [`maps::RULE_FIELDS`]: for each value of a field the rules that it meets.
pub mod rule_fields {
    /// By IP protocol number.
    pub const PROTOCOL: u32 = 0;
    /// By differentiated services code point.
    pub const DSCP: u32 = 256;
    /// Rules that ask for no mark.
    pub const NO_MARK: u32 = 320;
    /// Rules that ask for no ports: all that a packet without ports meets.
    pub const NO_PORTS: u32 = 321;
    /// By source port.
    pub const SOURCE_PORT: u32 = 1 << 16;
    /// By destination port.
    pub const DESTINATION_PORT: u32 = 2 << 16;
    /// Number of entries.
    pub const COUNT: u32 = 3 << 16;
}

/// What is known of a tunnel besides its counts.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Health {
    /// When the last WireGuard handshake was completed, nanoseconds of the clock that also runs while the machine
    /// sleeps (`CLOCK_BOOTTIME`); 0: none. Only kept for tunnels whose device cannot be asked: the userspace backend's.
    pub last_handshake_ns: Shared<u64>,
    /// When probing last found it to have died or to have come back, same clock; 0: never.
    pub changed_ns: Shared<u64>,
    /// The least round-trip time of the last 10 to 20 seconds, microseconds; 0: not known.
    pub rtt_min_us: Shared<u32>,
    /// Smoothed round-trip time, microseconds; 0: not known.
    pub rtt_us: Shared<u32>,
    /// Its mean deviation, microseconds.
    pub rtt_jitter_us: Shared<u32>,
    /// Probes lost of the last 256, millionths.
    pub loss_ppm: Shared<u32>,
    /// How often it died.
    pub deaths: Shared<u32>,
    /// How often it was started anew because it stayed dead.
    pub restarts: Shared<u32>,
}

impl Health {
    /// As of a tunnel that nothing is known of.
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

/// What one CPU counts of one tunnel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelCounters {
    /// Packets put onto it; a super-packet counts its segments.
    pub tx_packets: u64,
    /// Their bytes from the network header on.
    pub tx_bytes: u64,
    /// Packets that came out of it; merged ones count as they arrived.
    pub rx_packets: u64,
    /// Their bytes from the network header on.
    pub rx_bytes: u64,
    /// Buckets that came to it after a pause.
    pub flowlet_moves: u64,
    /// Buckets that came to it because another tunnel died, or because it came back.
    pub failover_moves: u64,
    /// Packets that it was chosen for one by one.
    pub sprayed_packets: u64,
    /// The low half of [`Self::tx_bytes`] when its link was last charged; see [`crate::account`].
    pub charged: u32,
    /// When that was, in units of the same module, modulo 2^32.
    pub charged_at: u32,
}

/// Sums counts; what is charged is each CPU's own.
impl core::ops::AddAssign for TunnelCounters {
    fn add_assign(&mut self, other: Self) {
        self.tx_packets += other.tx_packets;
        self.tx_bytes += other.tx_bytes;
        self.rx_packets += other.rx_packets;
        self.rx_bytes += other.rx_bytes;
        self.flowlet_moves += other.flowlet_moves;
        self.failover_moves += other.failover_moves;
        self.sprayed_packets += other.sprayed_packets;
    }
}

/// Why a packet was not put onto a tunnel.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Neither IPv4 nor IPv6.
    NotIp = 0,
    /// Shorter than its headers say.
    Truncated = 1,
    /// To a multicast or broadcast address.
    Multicast = 2,
    /// To a link-local address.
    LinkLocal = 3,
    /// To no peer's prefix.
    NoPeer = 4,
    /// None of the peer's tunnels lives.
    NoLiveTunnel = 5,
    /// The maps contradict each other.
    BadTable = 6,
}

/// Entries of the reasons' map; more than there are, so that reasons can be added.
pub const REASONS: u32 = 16;

impl Reason {
    /// Every reason, by its number.
    pub const ALL: [Self; 7] = [
        Self::NotIp,
        Self::Truncated,
        Self::Multicast,
        Self::LinkLocal,
        Self::NoPeer,
        Self::NoLiveTunnel,
        Self::BadTable,
    ];

    /// Its name in statistics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotIp => "not_ip",
            Self::Truncated => "truncated",
            Self::Multicast => "multicast",
            Self::LinkLocal => "link_local",
            Self::NoPeer => "no_peer",
            Self::NoLiveTunnel => "no_live_tunnel",
            Self::BadTable => "bad_table",
        }
    }

    /// Whether the packet was for a peer and is lost; else it is none of ours.
    #[must_use]
    pub const fn is_drop(self) -> bool {
        matches!(self, Self::NoLiveTunnel | Self::BadTable)
    }
}

const _: () = {
    assert!(size_of::<Settings>() == 48);
    assert!(size_of::<Address>() == 20);
    assert!(size_of::<Peer>() == 112);
    assert!(size_of::<Load>() == 56);
    assert!(size_of::<Path>() == 8);
    assert!(size_of::<Rule>() == 8);
    assert!(size_of::<RuleSet>() == 8);
    assert!(size_of::<TunnelSet>() == 8);
    assert!(size_of::<Tunnel>() == 40);
    assert!(size_of::<Bucket>() == 16);
    assert!(size_of::<Health>() == 40);
    assert!(size_of::<TunnelCounters>() == 64);
    assert!(size_of::<State>() == 48 + 16 + 8 + 256 * 8 + 64 * 112 + 2048 * (40 + 56 + 8));
    assert!(PEER_CACHE_WORDS.is_power_of_two());
    assert!(BUCKETS_PER_PEER.is_power_of_two());
    assert!(Reason::ALL.len() <= REASONS as usize);
};

/// Every record is `repr(C)`, has no implicit padding (the sizes above), and is valid for any bytes.
#[cfg(feature = "aya")]
mod pod {
    #![allow(clippy::undocumented_unsafe_blocks, reason = "the module says it once for all")]
    unsafe impl aya::Pod for super::Address {}
    unsafe impl aya::Pod for super::TunnelCounters {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_numbered_as_listed() {
        for (number, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, number);
        }
    }

    #[test]
    fn map_names_fit_the_kernel() {
        assert!(maps::ALL.iter().all(|name| name.len() <= 15));
    }
}
