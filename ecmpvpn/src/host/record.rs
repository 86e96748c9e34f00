//! What the journal holds: how each change is taken back. Plain data.

use std::fmt;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::links::Link;
use super::saved::Saved;

/// Which link a record is about: enough never to touch another one of the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkId {
    /// Interface name.
    pub name: String,
    /// Interface index; `None`: about to be made, index not yet known.
    pub ifindex: Option<u32>,
    /// Our alias, if the link is one that we made.
    pub alias: Option<String>,
}

/// How to take one change back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "undo", rename_all = "kebab-case")]
pub enum Undo {
    /// Unmount the BPF file system if nothing is in it.
    Unmount {
        /// The mount point.
        path: PathBuf,
    },
    /// Remove a link that we made.
    DeleteLink {
        /// Ours.
        link: LinkId,
        /// As `bond`, so that a link made a moment before a crash is known without its alias.
        kind: String,
    },
    /// Remove an address from a link that stays.
    DeleteAddress {
        /// Whose.
        link: LinkId,
        /// Which.
        address: IpNet,
    },
    /// Set a link down again that was down.
    SetDown {
        /// Which.
        link: LinkId,
    },
    /// Release a bond member and give it back what it had.
    ReleaseMember {
        /// The member.
        member: LinkId,
        /// Its bond.
        bond: LinkId,
        /// What it had.
        saved: MemberState,
    },
    /// Remove a route of ours.
    DeleteRoute {
        /// Destination.
        prefix: IpNet,
        /// The steering device.
        device: LinkId,
    },
    /// Remove a member's route from its bond.
    DeleteMovedRoute {
        /// The route as it was added.
        route: Saved,
        /// The bond.
        device: LinkId,
    },
    /// Write kernel settings, in this order, where they differ.
    WriteSysctls {
        /// Path below `/proc/sys/net` and value.
        values: Vec<(String, String)>,
    },
}

/// What a member had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// Administratively up.
    pub up: bool,
    /// It was never up, so that it has no queueing discipline.
    pub pristine: bool,
    /// Bytes.
    pub mtu: u32,
    /// `net.ipv6.conf.DEVICE.mtu`, which a router may have advertised.
    pub ipv6_mtu: Option<String>,
    /// In the order in which they were added: a net's first IPv4 address is its primary one.
    pub addresses: Vec<Saved>,
    /// Link-local IPv6 addresses, which the kernel mostly makes by itself.
    pub link_local: Vec<Saved>,
    /// Routes that go with the device or with its addresses.
    pub routes: Vec<Saved>,
    /// Permanent neighbour entries.
    pub neighbours: Vec<Saved>,
}

impl fmt::Display for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unmount { path } => write!(f, "unmount {}", path.display()),
            Self::DeleteLink { link, kind } => write!(f, "remove {kind} {link}"),
            Self::DeleteAddress { link, address } => write!(f, "remove {address} from {link}"),
            Self::SetDown { link } => write!(f, "set {link} down"),
            Self::ReleaseMember { member, bond, saved } => {
                write!(f, "release {member} from {bond}")?;
                match saved.addresses.as_slice() {
                    [] => Ok(()),
                    some => {
                        let texts: Vec<&str> = some.iter().map(|a| a.text.as_str()).collect();
                        write!(f, " and give it back {}", texts.join(", "))
                    }
                }
            }
            Self::DeleteRoute { prefix, device } => write!(f, "remove the route to {prefix} through {device}"),
            Self::DeleteMovedRoute { route, device } => write!(f, "remove the route {} from {device}", route.text),
            Self::WriteSysctls { values } => match values.first() {
                Some((path, value)) => write!(f, "set {} back to {value}", path.replace('/', ".")),
                None => Ok(()),
            },
        }
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl LinkId {
    /// A link that is on the host and not of our making.
    pub fn theirs(link: &Link) -> Self {
        Self { name: link.name.clone(), ifindex: Some(link.ifindex), alias: None }
    }
}
