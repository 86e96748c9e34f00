//! The input of the port planner.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::config::XmitHashPolicy;
use crate::plan::bond_hash::{self, Macs};

/// Lowest port that a plan uses. Ports below need a privilege and belong to well-known services.
pub const LOWEST_PORT: u16 = 1024;

/// Highest base port that a user may give: a plan looks for an even spread in the ports above it.
pub const HIGHEST_BASE_PORT: u16 = u16::MAX - 1024;

/// UDP ports that a plan never uses: network adapters and middleboxes parse their packets as a tunnel of another
/// protocol, or expect replies of that protocol (IANA; the kernel's `udp_tunnel_nic` and VXLAN defaults).
pub const RESERVED_PORTS: [u16; 11] = [1701, 2152, 3784, 3785, 4500, 4784, 4789, 5353, 6081, 6635, 8472];

/// One end of the tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Address of the outer packets.
    pub address: IpAddr,
    /// Usable members of its bond, 1 to 32; 1 if there is no bond.
    pub members: u8,
    /// How its bond hashes. `None`: nothing is known about its bond, and `members` has no meaning.
    pub policy: Option<XmitHashPolicy>,
    /// The Ethernet header of packets that it sends, for policies that hash it.
    pub macs: Option<Macs>,
    /// NAT rewrites its address or ports on the way, so the members that the *other* end sends on cannot be predicted.
    pub rewritten: bool,
    /// Ports that a plan must not use at this end, because they are in use or reserved.
    pub excluded: BTreeSet<u16>,
}

impl End {
    /// An end with a bond of `members` that hashes by `policy`; nothing else is known.
    pub fn new(address: IpAddr, members: u8, policy: XmitHashPolicy) -> Self {
        let excluded = BTreeSet::new();
        Self { address, members, policy: Some(policy), macs: None, rewritten: false, excluded }
    }

    /// An end whose bond is not known.
    pub fn unknown(address: IpAddr) -> Self {
        let excluded = BTreeSet::new();
        Self { address, members: 1, policy: None, macs: None, rewritten: false, excluded }
    }

    /// Whether the tunnels' ports decide which members this end sends on, and no NAT at the far end changes these
    /// ports.
    pub(super) fn spreads_by_ports(&self, far: &Self) -> bool {
        self.members > 1 && !far.rewritten && self.policy.is_some_and(bond_hash::reads_ports)
    }
}

/// What to plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub a: End,
    pub b: End,
    /// Number of tunnels, 1 to [`MAX_TUNNELS_PER_PEER`](crate::config::MAX_TUNNELS_PER_PEER).
    pub tunnels: usize,
    /// Ports are taken from here upwards if possible; at least [`LOWEST_PORT`].
    pub base_port: u16,
}

/// The listen ports of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortPair {
    /// At end A.
    pub a: u16,
    /// At end B.
    pub b: u16,
}
