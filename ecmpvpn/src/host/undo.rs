//! Takes single changes back. Each is idempotent: what is gone already is fine.

use std::fmt;
use std::io;

use netlink_packet_route::RouteNetlinkMessage;

use super::journal::{LinkId, Undo};
use super::links::Link;
use super::netlink::{Netlink, errno_of};
use super::{bond, bpffs, device, route, sysctl};

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

    /// The link, if it is still the one that was meant.
    pub async fn find(&self, netlink: &Netlink) -> io::Result<Option<Link>> {
        let link = match self.ifindex {
            Some(index) => netlink.link_at(index).await?,
            None => netlink.link(&self.name).await?,
        };
        Ok(link.filter(|link| match &self.alias {
            // Between the making of a link and its index being written down it may have no alias yet.
            Some(_) if self.ifindex.is_none() && link.alias.is_none() => true,
            Some(alias) => link.alias.as_ref() == Some(alias),
            None => link.name == self.name,
        }))
    }
}

/// Takes one change back.
pub async fn undo(undo: &Undo, netlink: &Netlink) -> io::Result<()> {
    match undo {
        Undo::Unmount { path } => bpffs::unmount_if_empty(path),
        Undo::DeleteLink { link, kind } => match link.find(netlink).await? {
            Some(found) if found.kind.as_deref() == Some(kind) => gone(netlink.delete_link(found.ifindex).await),
            _ => Ok(()),
        },
        Undo::DeleteAddress { link, address } => match link.find(netlink).await? {
            Some(found) => {
                let message = device::address_message(found.ifindex, *address);
                gone(netlink.request(RouteNetlinkMessage::DelAddress(message), 0).await)
            }
            None => Ok(()),
        },
        Undo::SetDown { link } => match link.find(netlink).await? {
            Some(found) => gone(netlink.set_down(found.ifindex).await),
            None => Ok(()),
        },
        Undo::ReleaseMember { member, bond, saved } => bond::release(netlink, member, bond, saved).await,
        Undo::DeleteRoute { prefix, device } => match device.find(netlink).await? {
            Some(found) => {
                let message = route::message(*prefix, None, found.ifindex);
                gone(netlink.request(RouteNetlinkMessage::DelRoute(message), 0).await)
            }
            None => Ok(()),
        },
        Undo::DeleteMovedRoute { route, device } => match device.find(netlink).await? {
            Some(_) => gone(netlink.request(RouteNetlinkMessage::DelRoute(route.message()?), 0).await),
            None => Ok(()),
        },
        Undo::WriteSysctls { values } => sysctl::write_back(values),
    }
}

/// Turns "there is no such thing" into success.
pub fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if matches!(errno_of(&e), Some(libc::ENODEV | libc::EADDRNOTAVAIL | libc::ESRCH | libc::ENOENT)) => {
            Ok(())
        }
        other => other,
    }
}
