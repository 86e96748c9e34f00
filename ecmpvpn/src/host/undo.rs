//! Undoes changes. Each undo is idempotent: what is gone already counts as undone.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;

use super::error::UndoErrors;
use super::journal::Journal;
use super::netlink::{Netlink, ignore_missing};
use super::record::{LinkId, Undo};
use super::{bond, bpffs, device, route, shared, sysctl, unreachable};
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
        Undo::DeleteUnreachable { prefix } => {
            let message = RouteNetlinkMessage::DelRoute(unreachable::message(*prefix));
            ignore_missing(netlink.request(message, 0).await)
        }
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
                Undo::Unmount { .. }
                | Undo::ReleaseMember { .. }
                | Undo::WriteSysctls { .. }
                | Undo::DeleteUnreachable { .. } => true,
            };
            if there {
                kept.push(record.clone());
            }
        }
        if kept.len() == before.len() { Ok(()) } else { self.replace(kept).map_err(io::Error::other) }
    }

    /// Undoes everything, the last change first. Continues after failures. The records of changes that could not be
    /// undone stay, so that another call tries them again; without any, the file is removed. What is gone already
    /// counts as undone. Returns how many changes were undone.
    ///
    /// `on_undo` is called before each undo. If it returns an error, that undo fails with it.
    ///
    /// # Errors
    /// All failures.
    pub async fn undo(&mut self, netlink: &Netlink, on_undo: OnUndo<'_>) -> Result<usize, UndoErrors> {
        let mut failures = Vec::new();
        let mut undone = 0;
        let mut members_are_released = false;
        let oldest_first: Vec<Undo> = self.records().rev().cloned().collect();
        for (index, record) in oldest_first.iter().enumerate().rev() {
            let attempt = match on_undo(record) {
                Ok(()) => {
                    if matches!(record, Undo::ReleaseMember { .. }) && !members_are_released {
                        members_are_released = true;
                        release_members(&oldest_first[..=index], netlink).await;
                    }
                    match record {
                        Undo::WriteSysctls { values } => {
                            shared::write_back(self, values, sysctl::write_back, |journal| journal.done(index))
                        }
                        _ => undo(record, netlink).await.map(|()| self.done(index)),
                    }
                }
                Err(error) => Err(error),
            };
            match attempt {
                Ok(()) => undone += 1,
                Err(error) => failures.push(format!("{record}: {error}")),
            }
        }
        let kept = if self.is_empty() { self.remove() } else { self.save() };
        if let Err(error) = kept {
            failures.push(chain(&error));
        }
        if failures.is_empty() { Ok(undone) } else { Err(UndoErrors(failures)) }
    }

    /// Removes the record at `index` after its undo. If the file cannot be written, it names a change that is undone
    /// already. Undoing that again is harmless. A full disk does not keep the file from being removed in the end.
    fn done(&mut self, index: usize) {
        if let Err(error) = self.remove_record(index) {
            tracing::debug!("{}", chain(&error));
        }
    }
}

/// Called before each undo. An error of it counts as a failure to undo that change.
pub type OnUndo<'a> = &'a mut (dyn FnMut(&Undo) -> io::Result<()> + Send);

/// Releases at once all members that are undone next, so that they become usable at the same time and not one after the
/// other. Each record is still undone in its turn, and that also reports what failed here. `records`: the oldest first.
async fn release_members(records: &[Undo], netlink: &Netlink) {
    for record in records.iter().rev() {
        let Undo::ReleaseMember { member, bond, saved } = record else { return };
        if let Err(error) = bond::begin_release(netlink, member, bond, saved).await {
            tracing::debug!("{record}, is tried again later: {error}");
        }
    }
}
