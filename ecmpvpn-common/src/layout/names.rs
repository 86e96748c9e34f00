//! Names and sizes of the maps, and names of the programs and their constants.

/// Part of the path of the pins, so that the maps of one version are never used by another version.
pub const LAYOUT_VERSION: u32 = 5;
/// Maximum number of remote sites.
pub const MAX_PEERS: u32 = 64;
/// Maximum number of tunnels of one peer. Sets of tunnels fit into one word, one bit per tunnel.
pub const MAX_TUNNELS_PER_PEER: u32 = 32;
/// A power of two. One peer's buckets fill only half a mebibyte. With twice as many, 1,000,000 flows cost a quarter
/// more per packet on a processor whose second cache has that size (docs/benchmarks.md).
pub const BUCKETS_PER_PEER: u32 = 32_768;
/// Maximum number of rules. A set of rules fits into one word, one bit per rule.
pub const MAX_RULES: u32 = 64;
/// Prefixes of rules: one per rule, one per family for all addresses, and a spare one, because kernels before 6.11 do
/// not accept a new value for a prefix of a full table.
pub const MAX_RULE_PREFIXES: u32 = MAX_RULES + 3;

/// Names of the maps, in the object and among the pins. At most 15 bytes: the kernel cuts off the rest.
pub mod maps {
    /// Array of one [`crate::layout::State`]; memory-mapped.
    pub const STATE: &str = "STATE";
    /// Longest-prefix match from [`crate::layout::Address`] to the peer's number.
    pub const PREFIXES: &str = "PREFIXES";
    /// Hash from interface index to tunnel id.
    pub const TUNNEL_IDS: &str = "TUNNEL_IDS";
    /// Array of [`crate::layout::Bucket`]; memory-mapped.
    pub const BUCKETS: &str = "BUCKETS";
    /// Per-CPU array of [`crate::layout::TunnelCounters`], indexed by tunnel id.
    pub const COUNTERS: &str = "COUNTERS";
    /// Per-CPU array of 64-bit counters, indexed by [`crate::layout::Reason`].
    pub const REASONS: &str = "REASONS";
    /// Array of [`crate::layout::Health`], indexed by tunnel id; memory-mapped. The programs do not use it.
    pub const HEALTH: &str = "HEALTH";
    /// Array of [`crate::layout::Rule`], indexed by rule number; memory-mapped.
    pub const RULES: &str = "RULES";
    /// Array of [`crate::layout::RuleSet`], indexed by [`crate::layout::rule_fields`]; memory-mapped.
    pub const RULE_FIELDS: &str = "RULE_FIELDS";
    /// Longest-prefix match from a source [`crate::layout::Address`] to the rules that it matches, one bit per rule.
    pub const RULE_SOURCES: &str = "RULE_SOURCES";
    /// The same for destinations.
    pub const RULE_DESTS: &str = "RULE_DESTS";
    /// Hash from firewall mark to the rules that it matches, one bit per rule. A mark that no rule names has no entry.
    pub const RULE_MARKS: &str = "RULE_MARKS";
    /// Array of [`crate::layout::TunnelSet`], indexed by `rule * MAX_PEERS + peer`; memory-mapped.
    pub const RULE_TUNNELS: &str = "RULE_TUNNELS";
    /// Per-CPU hash from [`crate::arrivals::Arrival`] to [`crate::arrivals::ArrivalCounters`].
    pub const ARRIVALS: &str = "ARRIVALS";
    /// Hash from a followed member's interface index to [`crate::arrivals::member_flags`]. The programs do not use it.
    pub const MEMBERS: &str = "MEMBERS";
    /// Per-CPU array of [`crate::layout::OrderCounters`], indexed by peer number.
    pub const ORDER_COUNTS: &str = "ORDER_COUNTS";
    /// All pinned maps.
    pub const ALL: [&str; 16] = [
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
        ORDER_COUNTS,
    ];
}

/// Names of the programs, in the object and among the pins.
pub mod programs {
    /// TC egress of the steering device.
    pub const EGRESS: &str = "ecmpvpn_egress";
    /// TC ingress of every tunnel.
    pub const INGRESS: &str = "ecmpvpn_ingress";
    /// TC ingress of every bond member. At most 15 bytes: the kernel keeps no more of a pinned program's name.
    pub const ARRIVAL: &str = "ecmpvpn_arrival";
    /// All programs of a running site.
    pub const ALL: [&str; 3] = [EGRESS, INGRESS, ARRIVAL];
    /// Redirects and does nothing else. Loaded only to compare [`EGRESS`] with it in measurements.
    pub const BASELINE: &str = "ecmpvpn_baseline";
}

/// Names of the programs' constants, which are set when the object is loaded.
pub mod globals {
    /// 1 or 2 for `BPF_PROG_TEST_RUN`: packets begin with an Ethernet header. With 2, the time is taken from the packet
    /// (`skb->tstamp`) unless that is 0, and the choice is written to `skb->cb`.
    pub const TEST_RUN: &str = "TEST_RUN";
    /// In test runs: number of flows, at most 2^24. Each repetition turns the packet into one of the next flow. The
    /// program for packets that arrive stamps it. 0: the packet is not changed.
    pub const FLOWS: &str = "FLOWS";
    /// 1: the kernel lets programs set delivery times (`bpf_skb_set_tstamp`, Linux 5.18), so order can be restored.
    pub const RESTORES: &str = "RESTORES";
}

/// Words of `skb->cb` to which a test run writes its choice.
pub mod test_run {
    /// Bytes before the network header.
    pub const ETHERNET_HEADER: u32 = 14;
    /// The tunnel's id plus 1, or 0 if the packet was not put onto a tunnel.
    pub const TUNNEL: usize = 0;
    /// Index of the bucket among all peers' buckets.
    pub const BUCKET: usize = 1;
    /// How the tunnel was chosen: bits of [`crate::layout::how`].
    pub const HOW: usize = 2;
    /// Number of the [`crate::layout::Reason`] why the packet was not put onto a tunnel.
    pub const REASON: usize = 3;
    /// 1: the packet was steered by [`crate::fast_path`]. 2: the same, and the bucket kept its tunnel.
    pub const FAST_PATH: usize = 4;
    /// Of a marked packet that arrives: 1: held until its time, 2: late, 3: given up.
    pub const RELEASE: usize = 0;
    /// How long it is held, nanoseconds.
    pub const HELD: usize = 1;
}

/// Number of tunnel ids.
pub const MAX_TUNNELS: u32 = MAX_PEERS * MAX_TUNNELS_PER_PEER;
/// Number of entries of [`crate::layout::State::peer_cache`]; a power of two.
pub const PEER_CACHE_WORDS: u32 = 256;
