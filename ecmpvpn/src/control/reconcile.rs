//! Changes a site that is up so that it matches another plan: a site that an earlier run left up, or the site of this
//! run when its configuration changes. Meanwhile the tunnels that stay carry the traffic.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::site::{Paths, SessionError, Site};
use crate::config::{Config, InterfaceName};
use crate::control::health::{Handover, Health};
use crate::dataplane::{self, Device, View};
use crate::error::chain;
use crate::host::wireguard::userspace::Userspace;
use crate::host::{self, Change, Conflict, HostError, Netlink, Owned, RunDir};
use crate::live::policy::Live;
use crate::live::policy::keep::Applied;
use crate::plan::{Plan, SteeringTable, Tunnel};

/// How long to wait after a tunnel is taken out of use, for packets that are still in it.
const DRAIN: Duration = Duration::from_millis(100);

/// How long to wait for probes to find a changed tunnel up, before the next tunnel is changed. A tunnel whose far end
/// is not changed yet does not come up within this time.
const PATIENCE: Duration = Duration::from_secs(3);
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
    let target = Target { config: &config, plan: &plan, previous: None };
    match change(site, &target, steering, take_management_port).await {
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

/// Changes a running site from `previous` to `plan`, which then becomes the site's plan. Tunnels and peers keep the
/// slots that they have in the maps.
///
/// # Errors
/// What can be checked beforehand fails before anything is changed. After a later failure the changes made so far stay:
/// the caller must change back to `previous`.
pub async fn reconcile(site: &mut Site, config: &Config, plan: &mut Plan, previous: &Plan) -> Result<(), SessionError> {
    if let Some(held) = dataplane::slots(&site.paths.pins)? {
        plan.keep_slots(&held)
            .map_err(|error| Conflict::MadeOtherwise { what: error.to_string() })
            .map_err(HostError::from)?;
    }
    change(site, &Target { config, plan, previous: Some(previous) }, Steering::Update, false).await?;
    site.plan = plan.clone();
    Ok(())
}

/// What the site is changed to.
struct Target<'a> {
    config: &'a Config,
    plan: &'a Plan,
    /// The plan in force, if this process brought the site up.
    previous: Option<&'a Plan>,
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
}

/// Changes the host, the maps and `site.links` to match `target`.
async fn change(
    site: &mut Site,
    target: &Target<'_>,
    steering: Steering,
    take_management_port: bool,
) -> Result<(), SessionError> {
    let Target { plan, previous, .. } = *target;
    let made = Owned { journal: Some(&site.journal), userspace: site.links.userspace.as_ref(), previous };
    let changes = host::preflight_since(plan, made).await?;
    host::check_management(plan, &changes, take_management_port).await?;
    let (going, coming): (Vec<Change>, Vec<Change>) =
        changes.into_iter().flat_map(Change::split_removals).partition(Change::is_removal);
    let interrupts = |change: &Change| matches!(change, Change::Alter { alteration, .. } if alteration.interrupts());
    let (interrupting, coming): (Vec<Change>, Vec<Change>) = coming.into_iter().partition(interrupts);

    let options = host::Options::default();
    let mut on_change = |change: &Change| {
        if change.is_needed() {
            tracing::info!("{change}");
        } else {
            tracing::debug!("{change}");
        }
    };
    let (index, mut tunnels) =
        host::apply(plan, &options, &coming, &mut site.journal, &mut site.links.userspace, &mut on_change).await?;
    // These tunnels exist already; their devices stay.
    tunnels.extend(interrupting.iter().chain(&going).filter_map(|change| match change {
        Change::Alter { name, ifindex, .. } if *name != plan.steering.name => Some((name.clone(), *ifindex)),
        _ => None,
    }));
    let device = Device { name: plan.steering.name.clone(), ifindex: index };
    let indexes: BTreeMap<InterfaceName, u32> = tunnels.iter().cloned().collect();
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
            follow_rules(plan, former.as_ref(), paths)?;
        }
        Steering::Update => {
            let former = previous.map_or(&plan.table, |previous| &previous.table);
            dataplane::update(&paths.pins, former, &plan.table, &device, &indexes)?;
            follow_rules(plan, Some(former), paths)?;
        }
    }
    for change in &interrupting {
        interrupt(site, target, change, &mut on_change).await?;
    }
    if going.iter().any(|change| matches!(change, Change::RemoveTunnel { .. })) {
        sleep(DRAIN).await;
    }
    host::apply(plan, &options, &going, &mut site.journal, &mut site.links.userspace, &mut on_change).await?;
    (site.links.steering, site.links.tunnels) = (index, tunnels);
    Ok(())
}

/// Applies changed rules of the configuration. Rules that only the maps have (from `ecmpvpn policy`) stay.
fn follow_rules(plan: &Plan, former: Option<&SteeringTable>, paths: &Paths) -> Result<(), SessionError> {
    match former {
        Some(former) if former.rules != plan.table.rules => {
            Ok(Live::open(&plan.site, &paths.pins)?.follow_rules(&former.rules, &plan.table.rules)?)
        }
        _ => Ok(()),
    }
}

/// Changes one tunnel while the peer's other tunnels carry the traffic, and waits until it is up again. If its far end
/// is not changed yet it stays out of use until probes find it up.
async fn interrupt(
    site: &mut Site,
    target: &Target<'_>,
    change: &Change,
    on_change: &mut dyn FnMut(&Change),
) -> Result<(), SessionError> {
    let Target { config, plan, .. } = *target;
    let Change::Alter { name, .. } = change else { return Ok(()) };
    let planned = plan.tunnel(name);
    let Some(id) = planned.map(Tunnel::id) else { return Ok(()) };
    let view = View::open(&site.paths.pins)?;
    let live = view.peers().get(id.peer() as usize).map_or(0, |peer| peer.live);
    let has_others = live & !(1 << id.slot()) != 0;
    if has_others {
        view.set_live(id, false);
        sleep(DRAIN).await;
    }
    let options = host::Options::default();
    host::apply(plan, &options, std::slice::from_ref(change), &mut site.journal, &mut site.links.userspace, on_change)
        .await?;
    if has_others {
        let _health = Health::start(config, plan, &site.paths.pins, &Handover::default());
        let until = Instant::now() + PATIENCE;
        let is_live = || view.is_live(id);
        while !is_live() && Instant::now() < until {
            sleep(POLL).await;
        }
    }
    Ok(())
}
