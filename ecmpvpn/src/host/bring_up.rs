//! Makes the changes one by one, and undoes all of them if one fails.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::alteration::{Alteration, Part};
use super::change::Change;
use super::device::{self, New};
use super::error::{During as _, HostError};
use super::journal::Journal;
use super::netlink::{Netlink, ignore_missing};
use super::owned::Owned;
use super::record::{LinkId, Undo};
use super::survey::Survey;
use super::wireguard::userspace::Userspace;
use super::{bond, bpffs, member_routes, route, sysctl, tunnel, undo, unreachable};
use netlink_packet_route::RouteNetlinkMessage;

use crate::config::{Bond, InterfaceName};
use crate::plan::{Backend, Plan, Route};

/// Options for bringing a site up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long to wait until all members of the bond carry traffic. After that, bringing up continues with a warning.
    pub bond_patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { bond_patience: Duration::from_secs(5) }
    }
}

/// The links of a site that is up.
#[derive(Default)]
pub struct HostLinks {
    /// Interface index of the steering device.
    pub steering: u32,
    /// The tunnels and their interface indexes, in the plan's order.
    pub tunnels: Vec<(InterfaceName, u32)>,
    /// Carries the tunnels; they end with it. `None` with the kernel backend. Stop it before undoing the journal.
    pub userspace: Option<Userspace>,
}

/// Lists what `plan` would change on this host, and what is already as planned.
pub async fn changes(plan: &Plan) -> Result<Vec<Change>, HostError> {
    changes_since(plan, Owned::default()).await
}

/// As [`changes`], given what is `made` already.
///
/// # Errors
/// Also if something in `made` would have to be removed and made again.
pub async fn changes_since(plan: &Plan, made: Owned<'_>) -> Result<Vec<Change>, HostError> {
    let netlink = Netlink::open()?;
    Survey::take(&netlink).await?.changes(plan, made)
}

/// The work in progress, and what it made so far.
struct Work<'a> {
    plan: &'a Plan,
    options: &'a Options,
    alias: String,
    netlink: &'a Netlink,
    userspace: &'a mut Option<Userspace>,
    bond: Option<LinkId>,
    tunnels: Vec<(InterfaceName, u32)>,
    steering: Option<LinkId>,
}

/// Makes the host match `plan`, and calls `on_change` before each change. If the future is dropped, `journal` has what
/// to undo.
///
/// Call [`super::preflight`] first: its errors are clearer.
///
/// # Errors
/// A change failed. The changes made so far are undone.
pub async fn bring_up(
    plan: &Plan,
    options: &Options,
    journal: &mut Journal,
    on_change: &mut dyn FnMut(&Change),
) -> Result<HostLinks, HostError> {
    let netlink = Netlink::open()?;
    let changes = Survey::take(&netlink).await?.changes(plan, Owned::default())?;
    let mut userspace = matches!(plan.backend, Backend::Userspace).then(Userspace::new);
    match apply(plan, options, &changes, journal, &mut userspace, on_change).await {
        Ok((steering, tunnels)) => Ok(HostLinks { steering, tunnels, userspace }),
        Err(first) => {
            if let Some(userspace) = userspace {
                userspace.stop().await;
            }
            match journal.undo(&netlink, &mut |_| Ok(())).await {
                Ok(_) => Err(first),
                Err(undo) => Err(HostError::NotUndone { first: Box::new(first), undo }),
            }
        }
    }
}

/// Interface indexes of the steering device and of the tunnels.
pub type Indexes = (u32, Vec<(InterfaceName, u32)>);

/// Makes `changes`, all or some of those of [`changes_since`], and calls `on_change` before each. Returns the links
/// that `changes` name, made or kept, in the order of the changes. The steering device's index is 0 if it is not among
/// them.
///
/// # Errors
/// A change failed. The changes made before it stay.
pub async fn apply(
    plan: &Plan,
    options: &Options,
    changes: &[Change],
    journal: &mut Journal,
    userspace: &mut Option<Userspace>,
    on_change: &mut dyn FnMut(&Change),
) -> Result<Indexes, HostError> {
    let netlink = Netlink::open()?;
    let mut work = Work {
        plan,
        options,
        alias: Plan::link_alias(&plan.site),
        netlink: &netlink,
        userspace,
        bond: None,
        tunnels: Vec::new(),
        steering: None,
    };
    for change in changes {
        on_change(change);
        work.make(change, journal).await?;
    }
    Ok((work.steering.and_then(|steering| steering.ifindex).unwrap_or(0), work.tunnels))
}

impl Work<'_> {
    async fn make(&mut self, change: &Change, journal: &mut Journal) -> Result<(), HostError> {
        match change {
            Change::MountBpffs => bpffs::mount_at(Path::new(bpffs::BPFFS), journal),
            Change::CreateBond { bond, mtu } => {
                let new = New { name: bond.name.as_str(), kind: "bond", alias: &self.alias };
                let index = new.create(self.netlink, journal, bond::message(bond, *mtu)).await?;
                self.bond = Some(new.id(index));
                Ok(())
            }
            Change::ReuseBond { bond } => {
                let link = self.netlink.link(bond.as_str()).await.during(|| format!("looking {bond} up"))?;
                self.bond = link.as_ref().map(LinkId::foreign);
                Ok(())
            }
            Change::Enslave { member, bond, .. } => {
                bond::enslave(self.netlink, journal, member.as_str(), self.bond_id(bond)?).await
            }
            Change::AddAddress { device, address } => {
                let link = self.bond_id(device)?.clone();
                let index = link.ifindex.unwrap_or(0);
                journal.record(Undo::DeleteAddress { link, address: *address })?;
                let added = device::add_address(self.netlink, device.as_str(), index, *address).await;
                if added.is_err() {
                    journal.retract()?;
                }
                added
            }
            Change::SetUp { device } => self.set_bond_up(device, journal).await,
            Change::MoveRoute { route, device } => {
                member_routes::add(self.netlink, journal, route, self.bond_id(device)?).await
            }
            Change::CreateTunnel { name, .. } => {
                let planned = self.plan.tunnel(name);
                let planned = planned.ok_or_else(|| tunnel::unplanned(name))?;
                let userspace = self.userspace.as_mut();
                let index = tunnel::create(self.netlink, journal, userspace, &self.alias, planned).await?;
                self.tunnels.push((name.clone(), index));
                Ok(())
            }
            Change::CreateSteering { .. } => {
                let userspace = self.userspace.as_mut();
                let steering = &self.plan.steering;
                let id = tunnel::create_steering(self.netlink, journal, userspace, &self.alias, steering).await?;
                self.steering = Some(id);
                Ok(())
            }
            Change::KeepTunnel { name, ifindex } => {
                self.tunnels.push((name.clone(), *ifindex));
                Ok(())
            }
            Change::KeepSteering { name, ifindex } => {
                self.steering = Some(self.own_link(name.as_str(), *ifindex));
                Ok(())
            }
            Change::Alter { name, ifindex, alteration } => self.alter(name, *ifindex, alteration).await,
            Change::RemoveTunnel { name, ifindex } => {
                if let Some(userspace) = self.userspace.as_mut() {
                    userspace.stop_tunnel(name).await;
                }
                let removed = ignore_missing(self.netlink.delete_link(*ifindex).await);
                removed.during(|| format!("removing {name}"))?;
                Ok(journal
                    .forget(|undo| matches!(undo, Undo::DeleteLink { link, .. } if link.ifindex == Some(*ifindex)))?)
            }
            Change::RemoveRoute { prefix, device } => {
                let is_it = |undo: &Undo| matches!(undo, Undo::DeleteRoute { prefix: other, device: by } if other == prefix && by.name == *device);
                self.undo_each(journal, is_it, || format!("removing the route to {prefix}")).await
            }
            Change::RemoveAddress { device, address } => {
                let is_it = |undo: &Undo| matches!(undo, Undo::DeleteAddress { link, address: other } if other == address && link.name == device.as_str());
                self.undo_each(journal, is_it, || format!("removing {address} from {device}")).await
            }
            Change::ReplaceRoute { prefix, device, source } => {
                let steering = self.steering.clone().ok_or_else(|| tunnel::unplanned(device))?;
                route::replace(self.netlink, journal, &Route { prefix: *prefix, source: *source }, steering).await
            }
            Change::AddUnreachable { prefix } => unreachable::add(self.netlink, journal, *prefix).await,
            Change::RemoveUnreachable { prefix } => {
                let is_it = |undo: &Undo| matches!(undo, Undo::DeleteUnreachable { prefix: other } if other == prefix);
                self.undo_each(journal, is_it, || format!("removing the unreachable route to {prefix}")).await
            }
            Change::AddRoute { prefix, device, source } => {
                let steering = self.steering.clone().ok_or_else(|| tunnel::unplanned(device))?;
                route::add(self.netlink, journal, &Route { prefix: *prefix, source: *source }, steering).await
            }
            Change::AcceptRouterAdvertisements { device } => sysctl::accept_router_advertisements(journal, device),
            Change::EnableForwarding { ipv4: true } => sysctl::enable_ipv4_forwarding(journal),
            Change::EnableForwarding { ipv4: false } => sysctl::enable_ipv6_forwarding(journal),
            Change::KeepForwarding { ipv4 } => sysctl::keep_forwarding(journal, *ipv4),
            Change::LooseReversePath { device } => sysctl::loose_reverse_path(device.as_str()),
            Change::KeepMember { .. }
            | Change::KeepAddress { .. }
            | Change::KeepUnreachable { .. }
            | Change::KeepRoute { .. } => Ok(()),
        }
    }

    /// Undoes the changes whose records `are` it, and forgets these.
    async fn undo_each(
        &self,
        journal: &mut Journal,
        are: impl Fn(&Undo) -> bool,
        operation: impl Fn() -> String,
    ) -> Result<(), HostError> {
        for record in journal.records().filter(|undo| are(undo)) {
            undo::undo(record, self.netlink).await.during(&operation)?;
        }
        Ok(journal.forget(are)?)
    }

    fn own_link(&self, name: &str, ifindex: u32) -> LinkId {
        LinkId { name: name.to_owned(), ifindex: Some(ifindex), alias: Some(self.alias.clone()) }
    }

    /// Changes only those parts of a tunnel or of the steering device that differ.
    async fn alter(&mut self, name: &InterfaceName, ifindex: u32, to: &Alteration) -> Result<(), HostError> {
        let tunnel = self.plan.tunnel(name);
        let mtu = tunnel.map_or(self.plan.steering.mtu, |tunnel| tunnel.mtu);
        if let Some(tunnel) = tunnel {
            if !to.parts.is_empty() {
                tunnel::alter(self.userspace.as_mut(), tunnel, &to.parts).await?;
            }
            self.tunnels.push((name.clone(), ifindex));
        }
        if to.parts.contains(&Part::Mtu) || to.parts.contains(&Part::Down) {
            // A device whose creation was interrupted may lack all of these settings.
            device::prepare(self.netlink, name.as_str(), ifindex, mtu, &[]).await?;
        }
        for address in &to.remove {
            let message = RouteNetlinkMessage::DelAddress(device::address_message(ifindex, *address));
            let removed = ignore_missing(self.netlink.request(message, 0).await);
            removed.during(|| format!("removing address {address} from {name}"))?;
        }
        for address in &to.add {
            device::add_inner_address(self.netlink, name.as_str(), ifindex, *address).await?;
        }
        if to.parts.contains(&Part::Down) {
            self.netlink.set_up(ifindex).await.during(|| format!("setting {name} up"))?;
        }
        Ok(())
    }

    fn bond_id(&self, name: &InterfaceName) -> Result<&LinkId, HostError> {
        self.bond.as_ref().ok_or_else(|| tunnel::unplanned(name))
    }

    /// Sets the bond up, and waits until it carries traffic: the userspace backend binds to its addresses.
    async fn set_bond_up(&self, name: &InterfaceName, journal: &mut Journal) -> Result<(), HostError> {
        let link = self.bond_id(name)?.clone();
        let index = link.ifindex.unwrap_or(0);
        journal.record(Undo::SetDown { link })?;
        self.netlink.set_up(index).await.during(|| format!("setting {name} up"))?;
        let Some(bond) = &self.plan.bond else { return Ok(()) };
        warn_unless_ready(self.netlink, bond, self.options.bond_patience)
            .await
            .during(|| format!("waiting for {name} to carry traffic"))
    }
}

async fn warn_unless_ready(netlink: &Netlink, bond: &Bond, patience: Duration) -> io::Result<()> {
    if let Some(lack) = bond::wait_until_ready(netlink, bond, patience).await? {
        tracing::warn!("{lack}");
    }
    Ok(())
}
