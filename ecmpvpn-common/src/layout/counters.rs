//! Counters: packets of each tunnel, and packets that were not steered, by reason.

/// Bits that say how a packet's tunnel was chosen.
pub mod how {
    /// The bucket left a tunnel that is down, or returned to its home under policy `hash`.
    pub const FAILOVER: u32 = 1 << 0;
    /// The bucket moved to the tunnel after a pause.
    pub const FLOWLET: u32 = 1 << 1;
    /// The tunnel was chosen for this packet alone.
    pub const SPRAYED: u32 = 1 << 2;
    /// The sprayed packet is stamped with its send time.
    pub const STAMPED: u32 = 1 << 3;
}

/// One CPU's counters of one tunnel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelCounters {
    /// Packets sent into the tunnel; a super-packet counts as its segments.
    pub tx_packets: u64,
    /// Their bytes from the network header on.
    pub tx_bytes: u64,
    /// Packets received from the tunnel; merged packets count as they arrived.
    pub rx_packets: u64,
    /// Their bytes from the network header on.
    pub rx_bytes: u64,
    /// Buckets that moved to the tunnel after a pause.
    pub flowlet_moves: u64,
    /// Buckets that moved to the tunnel because another tunnel went down, or because this one came back.
    pub failover_moves: u64,
    /// Packets for which the tunnel was chosen one by one.
    pub sprayed_packets: u64,
    /// Low half of [`Self::tx_bytes`] when the link was last charged; see [`crate::account`].
    pub charged: u32,
    /// Time of that charge, in units of [`crate::account`], modulo 2^32.
    pub charged_at: u32,
}

/// Adds up the counters. `charged` and `charged_at` are each CPU's own and stay as they are.
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

/// One CPU's counters of the packets of one peer that are, or were to be, put back in order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OrderCounters {
    /// Sent with a stamp; a super-packet counts as one.
    pub stamped: u64,
    /// Arrived with a stamp, and held until their time.
    pub restored: u64,
    /// Arrived with a stamp after their time, and passed on at once.
    pub late: u64,
    /// Arrived with a stamp and a delay beyond the bound, and passed on at once.
    pub given_up: u64,
}

impl core::ops::AddAssign for OrderCounters {
    fn add_assign(&mut self, other: Self) {
        self.stamped += other.stamped;
        self.restored += other.restored;
        self.late += other.late;
        self.given_up += other.given_up;
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
    /// The destination is in no peer's prefix.
    NoPeer = 4,
    /// No tunnel that the packet may take is up.
    NoLiveTunnel = 5,
    /// The maps contradict each other.
    BadTable = 6,
}

/// Number of entries in the map of reasons. There are fewer reasons, so that more can be added.
pub const REASONS: u32 = 16;

impl Reason {
    /// In the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::NotIp,
        Self::Truncated,
        Self::Multicast,
        Self::LinkLocal,
        Self::NoPeer,
        Self::NoLiveTunnel,
        Self::BadTable,
    ];

    /// The name in statistics.
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

    /// Whether the packet was for a peer and is lost. Otherwise it was not for a peer.
    #[must_use]
    pub const fn is_drop(self) -> bool {
        match self {
            Self::NoLiveTunnel | Self::BadTable => true,
            Self::NotIp | Self::Truncated | Self::Multicast | Self::LinkLocal | Self::NoPeer => false,
        }
    }
}
