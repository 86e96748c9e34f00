//! What a plan of ports is asked for.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::config::XmitHashPolicy;
use crate::plan::bond_hash::{self, Macs};

/// Lowest port that a plan uses: those below need a privilege and belong to well-known services.
pub const LOWEST_PORT: u16 = 1024;

/// UDP ports that a plan never uses: network adapters and middleboxes parse what they carry as another protocol's
/// tunnel, or expect that protocol's answers (IANA; the kernel's `udp_tunnel_nic` and VXLAN defaults).
pub const RESERVED_PORTS: [u16; 11] = [1701, 2152, 3784, 3785, 4500, 4784, 4789, 5353, 6081, 6635, 8472];

/// One end of the tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Address of the outer packets.
    pub address: IpAddr,
    /// Usable members of its bond, 1 to 32; 1 where there is no bond.
    pub members: u8,
    /// How its bond hashes; `None`: nobody knows its bond, and `members` means nothing.
    pub policy: Option<XmitHashPolicy>,
    /// The Ethernet header of what it sends, for the policies that read it.
    pub macs: Option<Macs>,
    /// Its address or ports reach the other end rewritten (NAT), so that what the *other* end sends cannot be told.
    pub rewritten: bool,
    /// Ports that a plan must not use here: in use, or otherwise taken.
    pub excluded: BTreeSet<u16>,
}

impl End {
    /// An end with a bond of `members` that hashes by `policy`, nothing else known.
    pub fn new(address: IpAddr, members: u8, policy: XmitHashPolicy) -> Self {
        let excluded = BTreeSet::new();
        Self { address, members, policy: Some(policy), macs: None, rewritten: false, excluded }
    }

    /// An end of whose bond nothing is known.
    pub fn unknown(address: IpAddr) -> Self {
        let excluded = BTreeSet::new();
        Self { address, members: 1, policy: None, macs: None, rewritten: false, excluded }
    }

    /// Whether the tunnels' ports decide the members that this end sends on, and the far end's NAT leaves them alone.
    pub(super) fn spreads_by_ports(&self, far: &Self) -> bool {
        self.members > 1 && !far.rewritten && self.policy.is_some_and(bond_hash::reads_ports)
    }
}

/// What to plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// One end.
    pub a: End,
    /// The other end.
    pub b: End,
    /// How many tunnels, 1 to [`MAX_TUNNELS_PER_PEER`](crate::config::MAX_TUNNELS_PER_PEER).
    pub tunnels: usize,
    /// Ports are taken from here upwards where that is possible; at least [`LOWEST_PORT`].
    pub base_port: u16,
}

/// A tunnel's listen ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortPair {
    /// At end A.
    pub a: u16,
    /// At end B.
    pub b: u16,
}
