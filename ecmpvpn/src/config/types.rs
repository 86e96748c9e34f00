//! The types of a validated configuration.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ecmpvpn_common::layout;
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::{PresharedKey, PrivateKey, PublicKey};

/// A Linux interface name: 1 to 15 bytes (IFNAMSIZ less the NUL), no `/`, `:`, white space or control bytes, and
/// neither `.` nor `..`. Source: `dev_valid_name()`, net/core/dev.c. `%` is refused too, because the kernel takes it as
/// a pattern to fill in, and `"` and `\`, because they would have to be escaped wherever the name is written.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// # Errors
    /// The name is invalid. The error is a phrase such as `is longer than 15 bytes`.
    pub fn new(name: &str) -> Result<Self, &'static str> {
        match name {
            "" => Err("is empty"),
            "." | ".." => Err("is reserved"),
            _ if name.len() > 15 => Err("is longer than 15 bytes"),
            _ if name.bytes().any(|b| !b.is_ascii_graphic() || b"/:%".contains(&b)) => {
                Err("has a character that an interface name cannot have")
            }
            _ if name.contains(['"', '\\']) => {
                Err("has a quotation mark or a backslash, which ecmpvpn does not support")
            }
            _ => Ok(Self(name.to_owned())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Maximum number of remote sites.
pub const MAX_PEERS: usize = 64;
/// Maximum number of tunnels to one remote site.
pub const MAX_TUNNELS_PER_PEER: usize = 32;
/// Default of [`Steering::restore_ms`], and its highest value.
pub const RESTORE_MS: u32 = 100;
pub const MAX_RESTORE_MS: u32 = 100;
/// Maximum number of steered prefixes of one remote site.
pub const MAX_PREFIXES_PER_PEER: usize = 1024;
/// Maximum number of port ranges in one list of a rule.
pub const MAX_PORT_RANGES: usize = 16;
pub const MAX_RULES: usize = 64;
/// Maximum weight of a tunnel.
pub const MAX_WEIGHT: u16 = 1000;
/// Maximum number of members of a bond.
pub const MAX_MEMBERS: u8 = 32;

/// The validated configuration of one site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub site: Site,
    /// The bond to make or reuse. `None`: outer packets use the interfaces that the host already has.
    pub bond: Option<Bond>,
    pub steering: Steering,
    /// At least one.
    pub peers: Vec<Peer>,
    /// In order; the first match applies.
    pub rules: Vec<Rule>,
    pub health: Health,
    pub metrics: Option<Metrics>,
}

/// `[site]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// 1 to 32 bytes of `[A-Za-z0-9._-]`, not starting with a dot. It becomes part of directory names and link aliases.
    pub name: String,
    /// Read from `private_key_file`.
    pub private_key: PrivateKey,
    /// Addresses of this gateway inside the VPN; sources of its own traffic. At most one host address (/32, /128) of
    /// each family is used as a source.
    pub addresses: Vec<IpNet>,
}

/// `[bond]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bond {
    pub name: InterfaceName,
    /// Interfaces to enslave, in this order; at least one, distinct.
    pub members: Vec<InterfaceName>,
    pub mode: BondMode,
    pub xmit_hash_policy: XmitHashPolicy,
    pub lacp_rate: LacpRate,
    /// Link monitoring interval, milliseconds.
    pub miimon_ms: u32,
    /// Addresses of the bond itself.
    pub addresses: Vec<IpNet>,
}

/// Gives an enum the words of its values, in the order in which messages list them.
macro_rules! words {
    ($type:ident: $($value:ident = $word:literal),+) => {
        impl $type {
            pub const ALL: &[Self] = &[$(Self::$value),+];

            /// The word in the configuration.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$value => $word),+ }
            }
        }
    };
}

words!(BondMode: Lacp = "802.3ad", BalanceXor = "balance-xor");
words!(LacpRate: Slow = "slow", Fast = "fast");
words!(Policy: Hash = "hash", Flowlet = "flowlet", Adaptive = "adaptive", Spray = "spray");
words!(BackendChoice: Auto = "auto", Kernel = "kernel", Userspace = "userspace");

/// `mode` of a bond. Only modes that hash flows onto members are possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BondMode {
    /// `802.3ad`: LACP.
    Lacp,
    /// `balance-xor`: the same hash, without LACP.
    BalanceXor,
}

/// `lacp_rate`: how often the partner is asked to send LACPDUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LacpRate {
    /// Every 30 seconds.
    Slow,
    /// Every second.
    Fast,
}

/// A bond's `xmit_hash_policy`. Source: `drivers/net/bonding/bond_options.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum XmitHashPolicy {
    /// `layer2`
    Layer2,
    /// `layer2+3`
    Layer23,
    /// `layer3+4`
    Layer34,
    /// `encap2+3`
    Encap23,
    /// `encap3+4`
    Encap34,
    /// `vlan+srcmac`
    VlanSrcmac,
}

impl XmitHashPolicy {
    /// In the kernel's order.
    pub const ALL: [Self; 6] =
        [Self::Layer2, Self::Layer34, Self::Layer23, Self::Encap23, Self::Encap34, Self::VlanSrcmac];

    /// The kernel's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Layer2 => "layer2",
            Self::Layer23 => "layer2+3",
            Self::Layer34 => "layer3+4",
            Self::Encap23 => "encap2+3",
            Self::Encap34 => "encap3+4",
            Self::VlanSrcmac => "vlan+srcmac",
        }
    }
}

/// `[steering]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steering {
    pub device: InterfaceName,
    /// For peers and rules without a policy of their own.
    pub policy: Policy,
    /// The WireGuard implementation.
    pub backend: BackendChoice,
    /// MTU of the steering device and of every tunnel, bytes.
    pub mtu: u32,
    /// Whether the MSS of TCP connections that begin is lowered to what fits through a tunnel.
    pub mss_clamp: bool,
    /// Seed of the flow hash.
    pub seed: u64,
    /// `None`: automatic.
    pub flowlet_gap_us: Option<u32>,
    /// Whether policy `adaptive` may spread a flow that fills its link over several links.
    pub spray_elephants: bool,
    /// Whether sprayed flows are put back in order where they arrive: by this end what the far ends spray, and by the far
    /// ends what this end sprays.
    pub restore_order: bool,
    /// Longest time that a packet is held for that, milliseconds.
    pub restore_ms: u32,
}

/// How a flow's tunnel is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// By the flow hash and the tunnels' weights only.
    Hash,
    /// To the least loaded tunnel whenever the flow pauses.
    Flowlet,
    /// Like `Flowlet`; also moves busy buckets off an overloaded tunnel.
    Adaptive,
    /// Each packet to the tunnel that would deliver it first.
    Spray,
}

impl From<Policy> for layout::Policy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Hash => Self::Hash,
            Policy::Flowlet => Self::Flowlet,
            Policy::Adaptive => Self::Adaptive,
            Policy::Spray => Self::Spray,
        }
    }
}

impl From<layout::Policy> for Policy {
    fn from(policy: layout::Policy) -> Self {
        match policy {
            layout::Policy::Hash => Self::Hash,
            layout::Policy::Flowlet => Self::Flowlet,
            layout::Policy::Adaptive => Self::Adaptive,
            layout::Policy::Spray => Self::Spray,
        }
    }
}

impl Policy {
    /// The value in the maps.
    pub fn number(self) -> u32 {
        layout::Policy::from(self).number()
    }

    /// The policy for a value in the maps. `None`: the value is unknown to this version.
    pub fn of(number: u32) -> Option<Self> {
        layout::Policy::of(number).map(Self::from)
    }
}

/// `backend`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendChoice {
    /// The kernel's WireGuard if there is one, otherwise userspace.
    Auto,
    Kernel,
    /// gotatun in this process.
    Userspace,
}

/// `[[peer]]`: a remote site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Same rules as [`Site::name`].
    pub name: String,
    pub public_key: PublicKey,
    /// Read from `preshared_key_file`.
    pub preshared_key: Option<PresharedKey>,
    /// Source address of the outer packets.
    pub local_endpoint: IpAddr,
    /// Destination address of the outer packets; same family as `local_endpoint`. Unspecified until `remote_name` is
    /// resolved.
    pub remote_endpoint: IpAddr,
    /// The host name, if the configuration has one in place of `remote_endpoint`. [`Config::set_remote`] sets the
    /// address.
    pub remote_name: Option<String>,
    /// What the port planner assumes about the far end.
    pub remote_bond: Option<RemoteBond>,
    /// `None`: [`Steering::policy`] applies.
    pub policy: Option<Policy>,
    /// Whether sprayed flows from and to this peer are put back in order, if [`Steering::restore_order`] allows it.
    pub restore_order: bool,
    /// Nets that are steered to this peer; host bits zero.
    pub prefixes: Vec<IpNet>,
    /// At least one.
    pub tunnels: Vec<Tunnel>,
}

/// `remote_bond`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteBond {
    /// Number of members of the far end's bond.
    pub members: u8,
    pub xmit_hash_policy: XmitHashPolicy,
}

/// `[[peer.tunnel]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    pub name: InterfaceName,
    /// UDP port here; unique on this host.
    pub listen_port: u16,
    /// UDP port at the far end.
    pub remote_port: u16,
    /// This end's address of a /31 (or /30) IPv4 net; the far end has the other one.
    pub address: Ipv4Net,
    /// Share of flows relative to the peer's other tunnels, 1 to 1,000. `None`: learned from what the tunnel delivers.
    pub weight: Option<u16>,
    /// This site's key for this tunnel only. `None`: [`Site::private_key`].
    pub private_key: Option<PrivateKey>,
    /// The far end's key for this tunnel only. `None`: [`Peer::public_key`].
    pub public_key: Option<PublicKey>,
    /// Pre-shared key for this tunnel only. `None`: [`Peer::preshared_key`].
    pub preshared_key: Option<PresharedKey>,
}

/// `[[rule]]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub src: Option<IpNet>,
    pub dst: Option<IpNet>,
    pub proto: Option<u8>,
    /// Inclusive ranges, host byte order. Empty: any.
    pub src_ports: Vec<(u16, u16)>,
    /// Inclusive ranges, host byte order. Empty: any.
    pub dst_ports: Vec<(u16, u16)>,
    /// Differentiated services code point, 0 to 63.
    pub dscp: Option<u8>,
    pub fwmark: Option<u32>,
    /// `None`: the peer's policy.
    pub policy: Option<Policy>,
    /// Allowed tunnels. Empty: all.
    pub tunnels: Vec<InterfaceName>,
    /// The rule pins flows to its only tunnel, with policy `hash`. While this tunnel is down, they use the peer's other
    /// tunnels.
    pub pin: bool,
}

/// `[health]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// Time between probes of one tunnel, milliseconds.
    pub interval_ms: u32,
    /// How many probes in a row must be lost before a tunnel counts as down.
    pub down_after: u32,
    /// How many probes in a row must be answered before it counts as up.
    pub up_after: u32,
}

/// `[metrics]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Address and port of the metrics server.
    pub listen: SocketAddr,
}
