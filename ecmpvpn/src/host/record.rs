//! The journal's records: how to undo each change. Plain data.

use std::fmt;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::links::Link;
use super::saved::Saved;

/// Identifies the link of a record, so that another link of the same name is never touched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkId {
    pub name: String,
    /// Interface index; `None`: the link is about to be made, its index is not known yet.
    pub ifindex: Option<u32>,
    /// The site's alias, if ecmpvpn made the link.
    pub alias: Option<String>,
}

/// How to undo one change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "undo", rename_all = "kebab-case")]
pub enum Undo {
    /// Unmount the BPF file system if nothing is in it.
    Unmount { path: PathBuf },
    /// Remove a link that ecmpvpn made.
    DeleteLink {
        link: LinkId,
        /// For example `bond`. Identifies a link that was made just before a crash, and has no alias yet.
        kind: String,
    },
    /// Remove an address from a link that stays.
    DeleteAddress { link: LinkId, address: IpNet },
    /// Set a link down: it was down before.
    SetDown { link: LinkId },
    /// Release a bond member, and restore what it had.
    ReleaseMember { member: LinkId, bond: LinkId, saved: MemberState },
    /// Remove a route that ecmpvpn made.
    DeleteRoute {
        prefix: IpNet,
        /// The steering device.
        device: LinkId,
    },
    /// Remove an unreachable route that ecmpvpn made beside a steered one.
    DeleteUnreachable { prefix: IpNet },
    /// Remove a member's route that was moved to its bond.
    DeleteMovedRoute {
        /// The route as it was added.
        route: Saved,
        /// The bond.
        device: LinkId,
    },
    /// Write kernel settings back, in this order, if they differ.
    WriteSysctls {
        /// Path below `/proc/sys/net`, and value.
        values: Vec<(String, String)>,
    },
}

/// What a bond member had before it was enslaved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// Administratively up.
    pub up: bool,
    /// It was never up, so it had no queueing discipline.
    pub pristine: bool,
    /// Bytes.
    pub mtu: u32,
    /// `net.ipv6.conf.DEVICE.mtu`: a router may have advertised another value.
    pub ipv6_mtu: Option<String>,
    /// In the order in which they were added: the first IPv4 address of a network is the primary one.
    pub addresses: Vec<Saved>,
    /// Link-local IPv6 addresses. The kernel usually makes them again by itself.
    pub link_local: Vec<Saved>,
    /// Routes that disappear with the device or with its addresses.
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
            Self::DeleteUnreachable { prefix } => write!(f, "remove the unreachable route to {prefix}"),
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
    /// A link on the host that ecmpvpn did not make.
    pub fn foreign(link: &Link) -> Self {
        Self { name: link.name.clone(), ifindex: Some(link.ifindex), alias: None }
    }
}
