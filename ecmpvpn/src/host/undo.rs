//! Undoes changes. Each undo is idempotent: what is gone already counts as undone.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;

use super::error::UndoErrors;
use super::journal::Journal;
use super::netlink::{Netlink, ignore_missing};
use super::record::{LinkId, Undo};
use super::{bond, bpffs, device, route, sysctl};
use crate::error::chain;

/// Undoes one change.
pub async fn undo(undo: &Undo, netlink: &Netlink) -> io::Result<()> {
    match undo {
        Undo::Unmount { path } => bpffs::unmount_if_empty(path),
        Undo::DeleteLink { link, kind } => match netlink.find(link).await? {
            Some(found) if found.kind.as_deref() == Some(kind) => {
                ignore_missing(netlink.delete_link(found.ifindex).await)
            }
            _ => Ok(()),
        },
        Undo::DeleteAddress { link, address } => match netlink.find(link).await? {
            Some(found) => {
                let message = device::address_message(found.ifindex, *address);
                ignore_missing(netlink.request(RouteNetlinkMessage::DelAddress(message), 0).await)
            }
            None => Ok(()),
        },
        Undo::SetDown { link } => match netlink.find(link).await? {
            Some(found) => ignore_missing(netlink.set_down(found.ifindex).await),
            None => Ok(()),
        },
        Undo::ReleaseMember { member, bond, saved } => bond::release(netlink, member, bond, saved).await,
        Undo::DeleteRoute { prefix, device } => match netlink.find(device).await? {
            Some(found) => {
                let message = route::message(*prefix, None, found.ifindex);
                ignore_missing(netlink.request(RouteNetlinkMessage::DelRoute(message), 0).await)
            }
            None => Ok(()),
        },
        Undo::DeleteMovedRoute { route, device } => match netlink.find(device).await? {
            Some(_) => ignore_missing(netlink.request(RouteNetlinkMessage::DelRoute(route.message()?), 0).await),
            None => Ok(()),
        },
        Undo::WriteSysctls { values } => sysctl::write_back(values),
    }
}

impl Journal {
    /// Removes the records of links that are gone, and of what was on them: a tunnel of the userspace backend ends with
    /// its process. Also undoes a link that a killed process had only started to make.
    pub async fn prune(&mut self, netlink: &Netlink) -> io::Result<()> {
        let before: Vec<Undo> = self.records().cloned().collect();
        let mut kept = Vec::new();
        for record in before.iter().rev() {
            let there = match record {
                Undo::DeleteLink { link: LinkId { ifindex: None, .. }, .. } => {
                    undo(record, netlink).await?;
                    false
                }
                Undo::DeleteLink { link, .. }
                | Undo::DeleteAddress { link, .. }
                | Undo::SetDown { link }
                | Undo::DeleteRoute { device: link, .. }
                | Undo::DeleteMovedRoute { device: link, .. } => netlink.find(link).await?.is_some(),
                Undo::Unmount { .. } | Undo::ReleaseMember { .. } | Undo::WriteSysctls { .. } => true,
            };
            if there {
                kept.push(record.clone());
            }
        }
        if kept.len() == before.len() { Ok(()) } else { self.replace(kept).map_err(io::Error::other) }
    }

    /// Undoes everything, the last change first, and removes the file. Continues after failures. What is gone already
    /// counts as undone. Returns how many changes were undone.
    ///
    /// # Errors
    /// All failures.
    pub async fn undo(&mut self, netlink: &Netlink, on_undo: &mut dyn FnMut(&Undo)) -> Result<usize, UndoErrors> {
        let mut failures = Vec::new();
        let mut undone = 0;
        let mut members_are_released = false;
        loop {
            let Some(last) = self.records().next().cloned() else { break };
            on_undo(&last);
            if matches!(last, Undo::ReleaseMember { .. }) && !members_are_released {
                members_are_released = true;
                release_members(self, netlink).await;
            }
            match undo(&last, netlink).await {
                Ok(()) => undone += 1,
                Err(error) => failures.push(format!("{last}: {error}")),
            }
            if let Err(error) = self.retract() {
                failures.push(chain(&error));
            }
        }
        if let Err(error) = self.remove() {
            failures.push(chain(&error));
        }
        if failures.is_empty() { Ok(undone) } else { Err(UndoErrors(failures)) }
    }
}

/// Releases at once all members that are next in the journal, so that they become usable at the same time and not one
/// after the other. Each record is still undone in its turn, and that also reports what failed here.
async fn release_members(journal: &Journal, netlink: &Netlink) {
    for record in journal.records() {
        let Undo::ReleaseMember { member, bond, saved } = record else { return };
        if let Err(error) = bond::begin_release(netlink, member, bond, saved).await {
            tracing::debug!("{record}, is tried again later: {error}");
        }
    }
}
