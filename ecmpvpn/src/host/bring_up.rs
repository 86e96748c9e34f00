//! Makes the changes one by one, and takes all of them back when one fails.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::alteration::{Alteration, Part};
use super::change::Change;
use super::device::{self, New};
use super::error::{During as _, HostError};
use super::journal::Journal;
use super::netlink::{Netlink, ignore_missing};
use super::owned::Made;
use super::record::{LinkId, Undo};
use super::run_dir::RunDir;
use super::survey::Survey;
use super::wireguard::userspace::Userspace;
use super::{bond, bpffs, member_routes, route, sysctl, tunnel, undo};
use netlink_packet_route::RouteNetlinkMessage;

use crate::config::{Bond, InterfaceName};
use crate::plan::{Backend, Plan, Route};

/// How long `take_down` waits for a running process to take everything down by itself.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// What may be chosen about bringing up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long to wait for the bond's members to carry traffic. Then it goes on with a warning.
    pub bond_patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { bond_patience: Duration::from_secs(5) }
    }
}

/// The links that were made.
#[derive(Default)]
pub struct HostLinks {
    /// The steering device's index.
    pub steering: u32,
    /// The tunnels and their indexes, in the plan's order.
    pub tunnels: Vec<(InterfaceName, u32)>,
    /// The tunnels live as long as this does; `None` with the kernel backend. Stop it before undoing the journal.
    pub userspace: Option<Userspace>,
}

/// What `plan` would change on this host, and where nothing needs changing.
pub async fn changes(plan: &Plan) -> Result<Vec<Change>, HostError> {
    changes_since(plan, Made::default()).await
}

/// As [`changes`], beside what is `made` already. Fails where that would have to be made anew.
pub async fn changes_since(plan: &Plan, made: Made<'_>) -> Result<Vec<Change>, HostError> {
    let netlink = open()?;
    Survey::take(&netlink).await?.changes(plan, made)
}

fn open() -> Result<Netlink, HostError> {
    Netlink::open().during(|| "opening a netlink socket".to_owned())
}

/// What was made so far.
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

/// Makes the host match `plan`; calls `on_change` before each change. If one fails, those made so far are undone and
/// its error is returned. If the future is dropped, `journal` knows what to undo.
///
/// Do [`super::preflight`] first: it says more clearly what stands in the way.
pub async fn bring_up(
    plan: &Plan,
    options: &Options,
    journal: &mut Journal,
    on_change: &mut dyn FnMut(&Change),
) -> Result<HostLinks, HostError> {
    let netlink = open()?;
    let changes = Survey::take(&netlink).await?.changes(plan, Made::default())?;
    let mut userspace = matches!(plan.backend, Backend::Userspace).then(Userspace::new);
    match apply(plan, options, &changes, journal, &mut userspace, on_change).await {
        Ok((steering, tunnels)) => Ok(HostLinks { steering, tunnels, userspace }),
        Err(first) => {
            if let Some(userspace) = userspace {
                userspace.stop().await;
            }
            match journal.undo(&netlink, &mut |_| {}).await {
                Ok(_) => Err(first),
                Err(undo) => Err(HostError::NotUndone { first: Box::new(first), undo }),
            }
        }
    }
}

/// The steering device's index, and the tunnels with theirs.
pub type Indexes = (u32, Vec<(InterfaceName, u32)>);

/// Makes `changes`, which are those of [`changes_since`] or a part of them; calls `on_change` before each. A failure
/// leaves the earlier ones made. The links that `changes` name, made or kept, in the order of the changes; the steering
/// device's index is 0 if it is not among them.
pub async fn apply(
    plan: &Plan,
    options: &Options,
    changes: &[Change],
    journal: &mut Journal,
    userspace: &mut Option<Userspace>,
    on_change: &mut dyn FnMut(&Change),
) -> Result<Indexes, HostError> {
    let netlink = open()?;
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
                self.bond = link.as_ref().map(LinkId::theirs);
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
                let planned = self.plan.tunnels.iter().find(|tunnel| tunnel.name == *name);
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
                self.steering = Some(self.ours(name.as_str(), *ifindex));
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
                for record in journal.records().filter(|undo| is_it(undo)) {
                    let removed = undo::undo(record, self.netlink).await;
                    removed.during(|| format!("removing the route to {prefix}"))?;
                }
                Ok(journal.forget(is_it)?)
            }
            Change::RemoveAddress { device, address } => {
                let is_it = |undo: &Undo| matches!(undo, Undo::DeleteAddress { link, address: other } if other == address && link.name == device.as_str());
                for record in journal.records().filter(|undo| is_it(undo)) {
                    let removed = undo::undo(record, self.netlink).await;
                    removed.during(|| format!("removing {address} from {device}"))?;
                }
                Ok(journal.forget(is_it)?)
            }
            Change::ReplaceRoute { prefix, device, source } => {
                let steering = self.steering.clone().ok_or_else(|| tunnel::unplanned(device))?;
                route::replace(self.netlink, journal, &Route { prefix: *prefix, source: *source }, steering).await
            }
            Change::AddRoute { prefix, device, source } => {
                let steering = self.steering.clone().ok_or_else(|| tunnel::unplanned(device))?;
                route::add(self.netlink, journal, &Route { prefix: *prefix, source: *source }, steering).await
            }
            Change::AcceptRouterAdvertisements { device } => sysctl::accept_router_advertisements(journal, device),
            Change::EnableForwarding { ipv4: true } => sysctl::enable_ipv4_forwarding(journal),
            Change::EnableForwarding { ipv4: false } => sysctl::enable_ipv6_forwarding(journal),
            Change::LooseReversePath { device } => sysctl::loose_reverse_path(device.as_str()),
            Change::KeepMember { .. }
            | Change::KeepAddress { .. }
            | Change::KeepForwarding { .. }
            | Change::KeepRoute { .. } => Ok(()),
        }
    }

    fn ours(&self, name: &str, ifindex: u32) -> LinkId {
        LinkId { name: name.to_owned(), ifindex: Some(ifindex), alias: Some(self.alias.clone()) }
    }

    /// Changes a tunnel or the steering device in what differs, and in nothing else.
    async fn alter(&mut self, name: &InterfaceName, ifindex: u32, to: &Alteration) -> Result<(), HostError> {
        let tunnel = self.plan.tunnels.iter().find(|tunnel| tunnel.name == *name);
        let mtu = tunnel.map_or(self.plan.steering.mtu, |tunnel| tunnel.mtu);
        if let Some(tunnel) = tunnel {
            if !to.parts.is_empty() {
                tunnel::alter(self.userspace.as_mut(), tunnel, &to.parts).await?;
            }
            self.tunnels.push((name.clone(), ifindex));
        }
        if to.parts.contains(&Part::Mtu) || to.parts.contains(&Part::Down) {
            // What was killed half-way may lack all of it.
            device::prepare(self.netlink, name.as_str(), ifindex, mtu, &[]).await?;
        }
        for address in &to.remove {
            let message = RouteNetlinkMessage::DelAddress(device::address_message(ifindex, *address));
            let removed = ignore_missing(self.netlink.request(message, 0).await);
            removed.during(|| format!("removing address {address} from {name}"))?;
        }
        for address in &to.add {
            device::add_address(self.netlink, name.as_str(), ifindex, *address).await?;
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

/// What [`take_down`] found to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenDown {
    /// The running process that was stopped, if any. It took its own changes back.
    pub stopped: Option<i32>,
    /// Changes undone here, left by a crash or by `run --persist`.
    pub undone: usize,
}

impl TakenDown {
    /// Whether there was nothing to do.
    pub fn is_nothing(&self) -> bool {
        self.stopped.is_none() && self.undone == 0
    }
}

/// Removes everything that `run` made for `site`, from any process: stops a running one, then undoes what is left.
pub async fn take_down(site: &str, run_root: &Path, on_undo: &mut dyn FnMut(&Undo)) -> Result<TakenDown, HostError> {
    if !run_root.join(site).exists() {
        return Ok(TakenDown { stopped: None, undone: 0 });
    }
    // Blocks this thread while another process ends; there is nothing else to do meanwhile.
    let (run_dir, stopped) = RunDir::lock_stopping(run_root, site, STOP_PATIENCE)?;
    let mut journal = Journal::open(&run_dir.journal_path(), site)?;
    let undone = if journal.is_empty() { 0 } else { journal.undo(&open()?, on_undo).await? };
    run_dir.remove()?;
    Ok(TakenDown { stopped, undone })
}
