//! The rules of a packet filter, as far as [`super::evaluate`] understands them. Values only.

/// The family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    Ipv4,
    Ipv6,
}

impl Family {
    /// As `nft` writes it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Ipv4 => "ip",
            Self::Ipv6 => "ip6",
        }
    }

    pub const fn sees(self, is_ipv4: bool) -> bool {
        match self {
            Self::Inet => true,
            Self::Ipv4 => is_ipv4,
            Self::Ipv6 => !is_ipv4,
        }
    }
}

/// Where a base chain is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets for this host.
    Input,
    /// Packets from one interface to another.
    Forward,
}

impl Hook {
    /// As `nft` writes it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Forward => "forward",
        }
    }
}

/// What makes a chain a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    pub hook: Hook,
    pub priority: i32,
    /// The policy: whether it drops what no rule decides.
    pub drops: bool,
}

/// The packet filter of a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    pub chains: Vec<Chain>,
    pub sets: Vec<Set>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub family: Family,
    pub table: String,
    pub name: String,
    /// `None`: other chains jump here.
    pub base: Option<Base>,
    /// Each rule is a list of steps. The first that does not hold ends the rule.
    pub rules: Vec<Vec<Step>>,
}

/// A set or verdict map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    pub family: Family,
    pub table: String,
    pub name: String,
    /// `None`: elements that are not understood, for example concatenated ranges.
    pub elements: Option<Vec<Element>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// A value, or the first one of an interval, as in the packet.
    pub key: Vec<u8>,
    /// The first value after an interval.
    pub is_end: bool,
    /// In a verdict map.
    pub verdict: Option<Verdict>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    /// Drops or rejects.
    Drop,
    Return,
    Continue,
    /// The name of a chain in the same table.
    Jump(String),
    Goto(String),
    /// Ends the evaluation in another way, for example in a queue.
    Other,
}

/// A field of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `meta nfproto`
    Family,
    /// `meta protocol`
    EtherType,
    /// `meta l4proto`
    Protocol,
    /// `iifname`
    InputDevice,
    /// `oifname`
    OutputDevice,
    /// Bytes from this offset in the IP header.
    Network(u32),
    /// Bytes from this offset behind the IP header.
    Transport(u32),
    /// `ct state`, in the host's byte order.
    ConnectionState,
    /// `meta pkttype`
    PacketType,
    /// `fib daddr type`, in the host's byte order.
    DestinationType,
    /// Any other: its value is not known.
    Unknown,
}

/// The comparisons of `cmp`. Values are compared as big-endian numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A part of a rule. Registers are numbered as `NFT_REG32_*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Load {
        register: u32,
        field: Field,
        /// Bytes. `None`: all of the field.
        length: Option<usize>,
    },
    /// `to = from & mask ^ xor`
    Mask {
        from: u32,
        to: u32,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    /// Holds if the register begins so.
    Compare {
        register: u32,
        operator: Operator,
        data: Vec<u8>,
    },
    /// Holds if the value is in one of these ranges; both ends belong to a range.
    Within {
        register: u32,
        ranges: Vec<(Vec<u8>, Vec<u8>)>,
        is_inverted: bool,
    },
    /// Holds if the set has the value. In a verdict map the element decides.
    Lookup {
        register: u32,
        set: String,
        is_inverted: bool,
        is_map: bool,
    },
    Verdict(Verdict),
    /// Holds for some packets, nobody knows for which.
    Unknown,
}
