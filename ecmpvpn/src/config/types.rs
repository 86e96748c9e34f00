//! The validated configuration's types.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ecmpvpn_common::layout;
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::{PresharedKey, PrivateKey, PublicKey};

/// A Linux interface name: 1 to 15 bytes (IFNAMSIZ less the NUL), no `/`, `:`,
/// white space or control bytes, neither `.` nor `..`. Source: `dev_valid_name()`, net/core/dev.c. Refused as
/// well are `%`, which the kernel takes for a pattern to fill in, and `"` and `\`, which would have to be escaped wherever
/// the name is written.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name, or why it is none in a phrase such as `is longer than 15 bytes`.
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

    /// The name as text.
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

/// Remote sites at most.
pub const MAX_PEERS: usize = 64;
/// Tunnels to one remote site at most.
pub const MAX_TUNNELS_PER_PEER: usize = 32;
/// Steered prefixes of one remote site at most.
pub const MAX_PREFIXES_PER_PEER: usize = 1024;
/// Port ranges in one list of a rule at most.
pub const MAX_PORT_RANGES: usize = 16;
/// Rules at most.
pub const MAX_RULES: usize = 64;
/// A tunnel's weight at most.
pub const MAX_WEIGHT: u16 = 1000;
/// Members of a bond at most.
pub const MAX_MEMBERS: u8 = 32;

/// One site's validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This site.
    pub site: Site,
    /// The bond to make or reuse; `None`: the interfaces that the host has.
    pub bond: Option<Bond>,
    /// How flows are put onto tunnels.
    pub steering: Steering,
    /// The remote sites, at least one.
    pub peers: Vec<Peer>,
    /// Ordered; the first match wins.
    pub rules: Vec<Rule>,
    /// Probing of tunnels.
    pub health: Health,
    /// Where metrics are served, if at all.
    pub metrics: Option<Metrics>,
}

/// `[site]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// 1 to 32 bytes of `[A-Za-z0-9._-]`, not starting with a dot: it names directories and link aliases.
    pub name: String,
    /// Read from `private_key_file`.
    pub private_key: PrivateKey,
    /// This gateway inside the VPN; source of its own traffic. At most one host address (/32, /128) a family is used as source.
    pub addresses: Vec<IpNet>,
}

/// `[bond]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bond {
    /// The bond's interface name.
    pub name: InterfaceName,
    /// Interfaces to enslave, in this order; at least one, distinct.
    pub members: Vec<InterfaceName>,
    /// `mode`
    pub mode: BondMode,
    /// `xmit_hash_policy`
    pub xmit_hash_policy: XmitHashPolicy,
    /// `lacp_rate`
    pub lacp_rate: LacpRate,
    /// Link monitoring interval, milliseconds.
    pub miimon_ms: u32,
    /// Addresses of the bond itself.
    pub addresses: Vec<IpNet>,
}

/// Gives an enum its words, in the order in which they are listed to the user.
macro_rules! words {
    ($type:ident: $($value:ident = $word:literal),+) => {
        impl $type {
            /// Every value.
            pub const ALL: &[Self] = &[$(Self::$value),+];

            /// The value's name in the configuration.
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

/// Bonding mode; only the modes that hash flows onto members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BondMode {
    /// `802.3ad`: LACP.
    Lacp,
    /// `balance-xor`: the same hash with no LACP.
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
    /// Every policy, in the kernel's order.
    pub const ALL: [Self; 6] =
        [Self::Layer2, Self::Layer34, Self::Layer23, Self::Encap23, Self::Encap34, Self::VlanSrcmac];

    /// The kernel's name of the policy.
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
    /// Remote prefixes are routed to this device.
    pub device: InterfaceName,
    /// The policy of peers and rules that name none.
    pub policy: Policy,
    /// Which WireGuard carries the tunnels.
    pub backend: BackendChoice,
    /// MTU of the steering device and of every tunnel, bytes.
    pub mtu: u32,
    /// Keys the flow hash.
    pub seed: u64,
    /// `None`: automatic.
    pub flowlet_gap_us: Option<u32>,
    /// Whether policy `adaptive` may put a flow that fills its link onto several.
    pub spray_elephants: bool,
}

/// How a flow's tunnel is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// By the flow hash and the tunnels' weights alone.
    Hash,
    /// To the least loaded tunnel whenever the flow pauses.
    Flowlet,
    /// As `Flowlet`, and busy buckets move off an overloaded tunnel.
    Adaptive,
    /// Packet by packet, to the tunnel that delivers first.
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
    /// Its number in the maps.
    pub fn number(self) -> u32 {
        layout::Policy::from(self).number()
    }

    /// The policy of a number in the maps; `None`: none of this version's.
    pub fn of(number: u32) -> Option<Self> {
        layout::Policy::of(number).map(Self::from)
    }
}

/// `backend`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendChoice {
    /// The kernel's WireGuard where there is one, else userspace.
    Auto,
    /// The kernel's WireGuard.
    Kernel,
    /// gotatun in this process.
    Userspace,
}

/// `[[peer]]`: a remote site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// As [`Site::name`].
    pub name: String,
    /// The remote site's WireGuard public key.
    pub public_key: PublicKey,
    /// Read from `preshared_key_file`.
    pub preshared_key: Option<PresharedKey>,
    /// Address that the outer packets leave from.
    pub local_endpoint: IpAddr,
    /// Address that the outer packets go to; same family as `local_endpoint`. Unspecified while `remote_name` is not
    /// resolved.
    pub remote_endpoint: IpAddr,
    /// The name that stands in place of that address; [`Config::set_remote`] fills the address in.
    pub remote_name: Option<String>,
    /// What the planner may assume of the far end.
    pub remote_bond: Option<RemoteBond>,
    /// How its flows are put onto tunnels; `None`: as [`Steering::policy`] says.
    pub policy: Option<Policy>,
    /// Steered to this peer; host bits zero.
    pub prefixes: Vec<IpNet>,
    /// At least one.
    pub tunnels: Vec<Tunnel>,
}

/// `remote_bond`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteBond {
    /// Members of the far end's bond.
    pub members: u8,
    /// The far end's policy.
    pub xmit_hash_policy: XmitHashPolicy,
}

/// `[[peer.tunnel]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The WireGuard interface's name.
    pub name: InterfaceName,
    /// UDP port here; unique on this host.
    pub listen_port: u16,
    /// UDP port at the far end.
    pub remote_port: u16,
    /// This end's address of a /31 (or /30) IPv4 net; the far end has the other one.
    pub address: Ipv4Net,
    /// Share of flows relative to the peer's other tunnels, 1 to 1,000; `None`: learned from what it delivers.
    pub weight: Option<u16>,
    /// This site's key for it alone; `None`: [`Site::private_key`].
    pub private_key: Option<PrivateKey>,
    /// The far end's key for it alone; `None`: [`Peer::public_key`].
    pub public_key: Option<PublicKey>,
    /// Shared for it alone; `None`: [`Peer::preshared_key`].
    pub preshared_key: Option<PresharedKey>,
}

/// `[[rule]]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Source prefix.
    pub src: Option<IpNet>,
    /// Destination prefix.
    pub dst: Option<IpNet>,
    /// IP protocol number.
    pub proto: Option<u8>,
    /// Inclusive ranges; empty: any.
    pub src_ports: Vec<(u16, u16)>,
    /// Inclusive ranges; empty: any.
    pub dst_ports: Vec<(u16, u16)>,
    /// Differentiated services code point, 0 to 63.
    pub dscp: Option<u8>,
    /// Firewall mark.
    pub fwmark: Option<u32>,
    /// What matching flows get; `None`: the peer's policy.
    pub policy: Option<Policy>,
    /// Tunnels allowed; empty: all.
    pub tunnels: Vec<InterfaceName>,
    /// It pins flows to its one tunnel, by policy `hash`; while that is down, they take the peer's other tunnels.
    pub pin: bool,
}

/// `[health]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// Between probes of one tunnel, milliseconds.
    pub interval_ms: u32,
    /// Probes lost in a row until a tunnel counts as down.
    pub down_after: u32,
    /// Probes answered in a row until it counts as up.
    pub up_after: u32,
}

/// `[metrics]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Address to listen on.
    pub listen: SocketAddr,
}
