//! Brings a site that is up in line with another plan: what an earlier run left, when a new one begins; or what this run
//! has made, when its configuration changes. Tunnels that stay carry the traffic meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::site::{Paths, SessionError, Site};
use crate::config::{Config, InterfaceName};
use crate::control::health::{Handover, Health};
use crate::dataplane::{self, Device, View};
use crate::host::wireguard::userspace::Userspace;
use crate::host::{self, Change, Conflict, HostError, Made, Netlink, RunDir};
use crate::live::policy::Live;
use crate::live::policy::keep::Applied;
use crate::plan::{Plan, SteeringTable};

/// What is on its way through a tunnel when it is taken out of use gets this long to leave.
const DRAIN: Duration = Duration::from_millis(100);

/// How long probing may take to find a changed tunnel alive before the next one is changed. One whose far end is not
/// changed yet does not come back until then.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often it is looked at meanwhile.
const POLL: Duration = Duration::from_millis(20);

/// What an earlier run left cannot be gone on with.
#[derive(Debug)]
pub enum NotTakenOver {
    /// It has to be made anew, for this reason; nothing was changed.
    MadeOtherwise(String),
    /// Something failed. What was there is left as it is.
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

/// Adopts what an earlier run left, changed to the site's plan where it differs. The plan keeps the slots that the maps have.
pub async fn take_over(site: &mut Site, take_management_port: bool) -> Result<(), NotTakenOver> {
    let io = |source| SessionError::Io { operation: "looking for what an earlier run has left", source };
    let netlink = Netlink::open().map_err(io)?;
    site.journal.prune(&netlink).await.map_err(io)?;
    let held = dataplane::slots(&site.paths.pins).map_err(|error| NotTakenOver::MadeOtherwise(error.to_string()))?;
    let mut plan = site.plan.clone();
    if let Some(held) = &held {
        plan.keep_slots(held).map_err(|error| NotTakenOver::MadeOtherwise(error.to_string()))?;
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

/// Changes a running site from `previous` to `plan`, which keeps the slots that the maps have and becomes the site's. Fails
/// before anything is changed where that shows; else what was changed until then stays, and changing back to `previous` is
/// the caller's.
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

/// What a site is to become.
struct Target<'a> {
    config: &'a Config,
    plan: &'a Plan,
    /// What it is, if this process has made it.
    previous: Option<&'a Plan>,
}

/// What becomes of the steering programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Steering {
    /// There are none.
    Start,
    /// They are replaced by those of this version.
    Adopt,
    /// They stay.
    Update,
}

/// Changes the host and the maps to `target`; the site's links follow.
async fn change(
    site: &mut Site,
    target: &Target<'_>,
    steering: Steering,
    take_management_port: bool,
) -> Result<(), SessionError> {
    let Target { plan, previous, .. } = *target;
    let made = Made { journal: Some(&site.journal), userspace: site.links.userspace.as_ref(), previous };
    let changes = host::preflight_since(plan, made).await?;
    host::check_management(plan, &changes, take_management_port).await?;
    let (going, coming): (Vec<Change>, Vec<Change>) =
        changes.into_iter().flat_map(Change::staged).partition(Change::is_removal);
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
    // They are on their devices already.
    tunnels.extend(interrupting.iter().chain(&going).filter_map(|change| match change {
        Change::Alter { name, ifindex, .. } if *name != plan.steering.name => Some((name.clone(), *ifindex)),
        _ => None,
    }));
    let device = Device { name: plan.steering.name.clone(), ifindex: index };
    let indexes: BTreeMap<InterfaceName, u32> = tunnels.iter().cloned().collect();
    let paths = &site.paths;
    match steering {
        Steering::Start => {
            // Of a start that was cut short.
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

/// Puts changed rules of the configuration in force, beside those that only the maps have.
fn follow_rules(plan: &Plan, former: Option<&SteeringTable>, paths: &Paths) -> Result<(), SessionError> {
    match former {
        Some(former) if former.rules != plan.table.rules => {
            Ok(Live::open(&plan.site, &paths.pins)?.follow_rules(&former.rules, &plan.table.rules)?)
        }
        _ => Ok(()),
    }
}

/// Changes one tunnel while its peer's others carry the traffic, and waits until it works again. One that does not, as
/// its far end is yet to be changed, stays out of use until probing finds it alive.
async fn interrupt(
    site: &mut Site,
    target: &Target<'_>,
    change: &Change,
    on_change: &mut dyn FnMut(&Change),
) -> Result<(), SessionError> {
    let Target { config, plan, .. } = *target;
    let Change::Alter { name, .. } = change else { return Ok(()) };
    let planned = plan.tunnels.iter().find(|tunnel| tunnel.name == *name);
    let number = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
    let Some((peer, slot)) = planned.map(|tunnel| (number(tunnel.peer), number(tunnel.slot))) else { return Ok(()) };
    let view = View::open(&site.paths.pins)?;
    let live = view.peers().get(peer as usize).map_or(0, |peer| peer.live);
    let has_others = live & !(1 << slot) != 0;
    if has_others {
        view.set_live(peer, slot, false);
        sleep(DRAIN).await;
    }
    let options = host::Options::default();
    host::apply(plan, &options, std::slice::from_ref(change), &mut site.journal, &mut site.links.userspace, on_change)
        .await?;
    if has_others {
        let _health = Health::start(config, plan, &site.paths.pins, &Handover::default());
        let until = Instant::now() + PATIENCE;
        let is_live = || view.peers().get(peer as usize).is_some_and(|peer| peer.live >> slot & 1 == 1);
        while !is_live() && Instant::now() < until {
            sleep(POLL).await;
        }
    }
    Ok(())
}
