//! Changes a site that is up so that it matches another plan: a site that an earlier run left up, or the site of this
//! run when its configuration changes. Meanwhile the tunnels that stay carry the traffic.

use std::collections::BTreeMap;
use std::time::Duration;

use ecmpvpn_common::layout::TunnelId;
use tokio::time::{Instant, sleep};

use super::notify;
use super::site::{Paths, SessionError, Site};
use crate::config::{Config, InterfaceName};
use crate::control::health::{Handover, Health};
use crate::dataplane::{self, Device, View};
use crate::error::chain;
use crate::host::wireguard::userspace::Userspace;
use crate::host::{self, Change, Conflict, HostError, Netlink, Owned, RunDir};
use crate::live::policy::keep::Applied;
use crate::live::policy::lock::MapsLock;
use crate::live::policy::{Live, PolicyError};
use crate::plan::{Plan, SteeringTable, Tunnel};

/// How long to wait after a tunnel is taken out of use, for packets that are still in it.
const DRAIN: Duration = Duration::from_millis(100);

/// How long to wait for probes to find a changed tunnel up, before the next tunnel is changed, if it need not come up.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a tunnel that must come up again may take, plus two intervals between probes. WireGuard repeats a handshake
/// after 5 s.
const ANSWER: Duration = Duration::from_secs(8);
/// How long `ecmpvpn policy` may take to finish a change of the maps.
const LOCK: Duration = Duration::from_secs(5);
/// How long to wait until both ends have stopped using a tunnel.
const LEAVE: Duration = Duration::from_secs(1);
/// How often the tunnel's state is read meanwhile.
const POLL: Duration = Duration::from_millis(20);

/// Why what an earlier run left up cannot be adopted.
#[derive(Debug)]
pub enum NotTakenOver {
    /// It must be taken down and made again, for this reason. Nothing was changed.
    MadeOtherwise(String),
    /// A step failed. What was there is left as it is.
    Failed(SessionError),
}

impl From<SessionError> for NotTakenOver {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Host(HostError::Conflict(Conflict::MadeOtherwise { what })) => Self::MadeOtherwise(what),
            error => Self::Failed(error),
        }
    }
}

/// Adopts what an earlier run left up, and changes it where it differs from the site's plan. Tunnels and peers keep the
/// slots that they have in the maps.
pub async fn take_over(site: &mut Site, take_management_port: bool) -> Result<(), NotTakenOver> {
    let io = |source| SessionError::Io { operation: "looking for what an earlier run has left", source };
    let netlink = Netlink::open().map_err(SessionError::from)?;
    site.journal.prune(&netlink).await.map_err(io)?;
    let held = dataplane::slots(&site.paths.pins).map_err(|error| NotTakenOver::MadeOtherwise(chain(&error)))?;
    let mut plan = site.plan.clone();
    if let Some(held) = &held {
        plan.keep_slots(held).map_err(|error| NotTakenOver::MadeOtherwise(chain(&error)))?;
    }
    site.links.userspace = (plan.backend == crate::plan::Backend::Userspace).then(Userspace::new);
    let steering = if held.is_some() { Steering::Adopt } else { Steering::Start };
    let config = site.config.clone();
    let target = Target { config: &config, plan: &plan, previous: None, silence: Silence::Allowed };
    match change(site, &target, steering, take_management_port, None).await {
        Ok(()) => {
            site.plan = plan;
            Ok(())
        }
        Err(error) => {
            if let Some(userspace) = site.links.userspace.take() {
                userspace.stop().await;
            }
            Err(error.into())
        }
    }
}

/// What happens if a tunnel was up and answered probes, and does so no more once it is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// Go on: it stays out of use until it answers.
    Allowed,
    /// Stop with [`SessionError::Unanswered`].
    Refused,
}

/// Changes a running site from its plan to `plan`, which then becomes the site's plan. Tunnels and peers keep the slots
/// that they have in the maps. The tunnels that do not change are probed without a break.
///
/// # Errors
/// What can be checked beforehand fails before anything is changed, and before probing is touched. After a later failure
/// the changes made so far stay, and the site's plan says what is in force now: the caller must change back.
pub async fn reconcile(
    site: &mut Site,
    config: &Config,
    plan: &mut Plan,
    health: &mut Health,
    silence: Silence,
) -> Result<(), SessionError> {
    let previous = site.plan.clone();
    if let Some(held) = dataplane::slots(&site.paths.pins)? {
        plan.keep_slots(&held)
            .map_err(|error| Conflict::MadeOtherwise { what: error.to_string() })
            .map_err(HostError::from)?;
    }
    let target = Target { config, plan, previous: Some(&previous), silence };
    change(site, &target, Steering::Update, false, Some(health)).await?;
    site.plan = plan.clone();
    health.follow(config, plan).await;
    Ok(())
}

/// Mends what somebody else has changed, see [`Change::damage`]. Keys, ports and peers stay as they are.
pub async fn repair(site: &mut Site, health: &mut Health) -> Result<(), SessionError> {
    let (config, plan) = (site.config.clone(), site.plan.clone());
    let target = Target { config: &config, plan: &plan, previous: Some(&plan), silence: Silence::Allowed };
    change(site, &target, Steering::Repair, false, Some(health)).await?;
    health.follow(&config, &plan).await;
    Ok(())
}

/// What [`reconcile`] would change on the host. Changes nothing.
///
/// # Errors
/// What [`reconcile`] checks beforehand.
pub async fn preview(site: &Site, mut plan: Plan) -> Result<Vec<Change>, SessionError> {
    if let Some(held) = dataplane::slots(&site.paths.pins)? {
        plan.keep_slots(&held)
            .map_err(|error| Conflict::MadeOtherwise { what: error.to_string() })
            .map_err(HostError::from)?;
    }
    let userspace = site.links.userspace.as_ref();
    let made = Owned { journal: Some(&site.journal), userspace, previous: Some(&site.plan) };
    let changes = host::preflight_since(&plan, made).await?;
    host::check_management(&plan, &changes, false).await?;
    Ok(changes.into_iter().filter(Change::is_needed).collect())
}

/// What the site is changed to.
struct Target<'a> {
    config: &'a Config,
    plan: &'a Plan,
    /// The plan in force, if this process brought the site up.
    previous: Option<&'a Plan>,
    silence: Silence,
}

impl Target<'_> {
    /// The plan with the tunnels of `interrupting` as they were: what is in force until they are changed.
    fn before(&self, interrupting: &[Change]) -> Plan {
        let mut plan = self.plan.clone();
        for tunnel in &mut plan.tunnels {
            let is_it = |change: &Change| matches!(change, Change::Alter { name, .. } if *name == tunnel.name);
            if let Some(former) = self.previous.and_then(|previous| previous.tunnel(&tunnel.name))
                && interrupting.iter().any(is_it)
            {
                // Its place in the maps is that of the new plan.
                *tunnel = Tunnel { peer: tunnel.peer, slot: tunnel.slot, ..former.clone() };
            }
        }
        plan
    }
}

/// What happens to the steering programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Steering {
    /// There are none: load and attach them.
    Start,
    /// Replace them by those of this version.
    Adopt,
    /// Keep them, and update the maps.
    Update,
    /// As [`Self::Update`], but only damage is mended.
    Repair,
}

/// Changes the host, the maps and `site.links` to match `target`.
async fn change(
    site: &mut Site,
    target: &Target<'_>,
    steering: Steering,
    take_management_port: bool,
    mut health: Option<&mut Health>,
) -> Result<(), SessionError> {
    let Target { config, plan, previous, .. } = *target;
    let made = Owned { journal: Some(&site.journal), userspace: site.links.userspace.as_ref(), previous };
    let mut changes = host::preflight_since(plan, made).await?;
    if steering == Steering::Repair {
        changes = changes.into_iter().filter_map(|change| change.repair(&plan.steering.name)).collect();
    }
    host::check_management(plan, &changes, take_management_port).await?;
    let (going, coming): (Vec<Change>, Vec<Change>) =
        changes.into_iter().flat_map(Change::split_removals).partition(Change::is_removal);
    let interrupts = |change: &Change| matches!(change, Change::Alter { alteration, .. } if alteration.interrupts());
    let (interrupting, coming): (Vec<Change>, Vec<Change>) = coming.into_iter().partition(interrupts);

    let options = host::Options::default();
    let mut on_change = |change: &Change| {
        notify::progress();
        if change.is_needed() {
            tracing::info!("{change}");
        } else {
            tracing::debug!("{change}");
        }
    };
    // Until the maps are changed. Taken before anything is, so that a failure changes nothing.
    let lock = match steering {
        Steering::Start | Steering::Repair => None,
        Steering::Adopt | Steering::Update => {
            Some(MapsLock::within(&site.paths.pins, LOCK).await.map_err(PolicyError::from)?)
        }
    };
    if let Some(health) = &health {
        let made = coming.iter().filter_map(|change| match change {
            Change::CreateTunnel { name, .. } => Some(name.clone()),
            _ => None,
        });
        health.leave_out(&made.collect::<Vec<_>>()).await;
    }
    let (index, mut tunnels) =
        host::apply(plan, &options, &coming, &mut site.journal, &mut site.links.userspace, &mut on_change).await?;
    let lock = match steering {
        // What is mended on the host does not wait for others that change the maps.
        Steering::Repair => Some(MapsLock::within(&site.paths.pins, LOCK).await.map_err(PolicyError::from)?),
        Steering::Start | Steering::Adopt | Steering::Update => lock,
    };
    // These tunnels exist already; their devices stay.
    tunnels.extend(interrupting.iter().chain(&going).filter_map(|change| match change {
        Change::Alter { name, ifindex, .. } if *name != plan.steering.name => Some((name.clone(), *ifindex)),
        _ => None,
    }));
    let device = Device { name: plan.steering.name.clone(), ifindex: index };
    let indexes: BTreeMap<InterfaceName, u32> = tunnels.iter().cloned().collect();
    if previous.is_some() {
        site.plan = target.before(&interrupting);
    }
    let paths = &site.paths;
    match steering {
        Steering::Start => {
            // Remains of a start that was interrupted.
            dataplane::remove(&paths.pins)?;
            dataplane::start(&paths.pins, &plan.table, &device, &indexes, &dataplane::Options::default())?;
        }
        Steering::Adopt => {
            let applied = Applied::read(&RunDir::applied_path(&paths.run_root, &plan.site));
            let former = applied.map(|applied| applied.table(&plan.table));
            let options = dataplane::Options::default();
            dataplane::adopt(&paths.pins, former.as_ref(), &plan.table, &device, &indexes, &options)?;
            follow_rules(plan, former.as_ref(), paths, lock)?;
        }
        Steering::Update | Steering::Repair => {
            let former = previous.map_or(&plan.table, |previous| &previous.table);
            dataplane::update(&paths.pins, former, &plan.table, &device, &indexes)?;
            follow_rules(plan, Some(former), paths, lock)?;
        }
    }
    // Before tunnels are removed, so that none of them counts as dead.
    if let Some(health) = &mut health {
        health.follow(config, &site.plan).await;
    }
    if !interrupting.is_empty() {
        let mut own = None;
        let health = match health {
            Some(health) => health,
            None => own.insert(Health::start(config, plan, &site.paths.pins, &Handover::default())),
        };
        for change in &interrupting {
            interrupt(site, target, change, health, &mut on_change).await?;
        }
    }
    if going.iter().any(|change| matches!(change, Change::RemoveTunnel { .. })) {
        sleep(DRAIN).await;
    }
    host::apply(plan, &options, &going, &mut site.journal, &mut site.links.userspace, &mut on_change).await?;
    (site.links.steering, site.links.tunnels) = (index, tunnels);
    Ok(())
}

/// Applies changed rules of the configuration. Rules that only the maps have (from `ecmpvpn policy`) stay.
/// Needs the lock of the maps, and releases it.
fn follow_rules(
    plan: &Plan,
    former: Option<&SteeringTable>,
    paths: &Paths,
    lock: Option<MapsLock>,
) -> Result<(), SessionError> {
    match (former, lock) {
        (Some(former), Some(lock)) if former.rules != plan.table.rules => {
            Ok(Live::with(&plan.site, &paths.pins, lock)?.follow_rules(&former.rules, &plan.table.rules)?)
        }
        _ => Ok(()),
    }
}

/// Changes one tunnel while the peer's other tunnels carry the traffic, and waits until it is up again. If its far end
/// is not changed yet it stays out of use until probes find it up.
///
/// # Errors
/// The change failed, or the tunnel was up and answered before, and does not now ([`Silence::Refused`]).
async fn interrupt(
    site: &mut Site,
    target: &Target<'_>,
    change: &Change,
    health: &mut Health,
    on_change: &mut dyn FnMut(&Change),
) -> Result<(), SessionError> {
    let Target { config, plan, previous, silence } = *target;
    let Change::Alter { name, alteration, .. } = change else { return Ok(()) };
    let Some(planned) = plan.tunnel(name) else { return Ok(()) };
    let id = planned.id();
    let view = View::open(&site.paths.pins)?;
    let live = view.peers().get(id.peer() as usize).map_or(0, |peer| peer.live);
    let has_others = live & !(1 << id.slot()) != 0;
    let answered = live >> id.slot() & 1 == 1 && view.health(id).is_some_and(|health| health.rtt_us.get() != 0);
    if has_others {
        leave(name, id, &view, health.handover()).await;
    }
    health.leave_out(std::slice::from_ref(name)).await;
    if has_others {
        view.set_live(id, false);
        sleep(DRAIN).await;
    }
    let options = host::Options::default();
    let altered = host::apply(
        plan,
        &options,
        std::slice::from_ref(change),
        &mut site.journal,
        &mut site.links.userspace,
        on_change,
    );
    let altered = altered.await;
    health.handover().ask(name, false);
    if previous.is_some()
        && let Some(tunnel) = site.plan.tunnels.iter_mut().find(|tunnel| tunnel.name == *name)
    {
        tunnel.clone_from(planned);
    }
    altered?;
    let in_force = if previous.is_some() { &site.plan } else { plan };
    health.follow(config, in_force).await;
    let must_answer = answered && silence == Silence::Refused;
    let patience = if must_answer { ANSWER + 2 * interval(config) } else { PATIENCE };
    let userspace = site.links.userspace.as_ref();
    let has_answered =
        wait_for_answer(&Awaited { name, id, is_taken_out: has_others }, in_force, health, userspace, &view, patience)
            .await;
    if must_answer && !has_answered {
        let (tunnel, changed) = (name.clone(), alteration.changed_settings());
        return Err(SessionError::Unanswered { tunnel, changed, seconds: patience.as_secs() });
    }
    Ok(())
}

fn interval(config: &Config) -> Duration {
    Duration::from_millis(config.health.interval_ms.into())
}

/// Stops using a tunnel that is up, at both ends if the far end understands that.
async fn leave(name: &InterfaceName, id: TunnelId, view: &View, handover: &Handover) {
    if !view.is_live(id) || !handover.is_understood(name) {
        return;
    }
    handover.ask(name, true);
    let until = Instant::now() + LEAVE;
    while Instant::now() < until && (view.is_live(id) || !handover.peer_message(name).has_left) {
        notify::progress();
        sleep(POLL).await;
    }
}

/// A tunnel that was changed.
struct Awaited<'a> {
    name: &'a InterfaceName,
    id: TunnelId,
    /// It carries nothing until its probes are answered.
    is_taken_out: bool,
}

/// Waits until a tunnel answers probes and is in use, at most for `patience`. Returns whether it has answered.
async fn wait_for_answer(
    tunnel: &Awaited<'_>,
    plan: &Plan,
    health: &mut Health,
    userspace: Option<&Userspace>,
    view: &View,
    patience: Duration,
) -> bool {
    let since = Instant::now();
    let handover = health.handover().clone();
    let has_answered = || handover.last_answer(tunnel.name).is_some_and(|at| at >= since.into_std());
    let is_back = || view.is_live(tunnel.id) && (tunnel.is_taken_out || has_answered());
    while !is_back() && since.elapsed() < patience {
        notify::progress();
        health.restart_due(plan, userspace).await;
        sleep(POLL).await;
    }
    is_back() || has_answered()
}

/// Waits until the tunnel `name` of the running site is in use again. Returns whether it is.
pub async fn is_in_use_again(site: &Site, name: &InterfaceName, health: &mut Health) -> Result<bool, SessionError> {
    let Some(planned) = site.plan.tunnel(name) else { return Ok(false) };
    let view = View::open(&site.paths.pins)?;
    let (until, id) = (Instant::now() + ANSWER + 2 * interval(&site.config), planned.id());
    while !view.is_live(id) && Instant::now() < until {
        notify::progress();
        health.restart_due(&site.plan, site.links.userspace.as_ref()).await;
        sleep(POLL).await;
    }
    Ok(view.is_live(id))
}
