//! Brings a site that is up in line with another plan: what an earlier run left, when a new one begins; or what this run
//! has made, when its configuration changes. Tunnels that stay carry the traffic meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::session::{Places, SessionError};
use crate::config::{Config, InterfaceName};
use crate::control::health::{Handover, Health};
use crate::dataplane::{self, Device, View};
use crate::host::wireguard::userspace::Userspace;
use crate::host::{self, Change, Conflict, HostError, HostLinks, Journal, Made, Netlink, RunDir};
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

/// Goes on with what an earlier run left, changed to `plan` where it differs.
pub async fn take_over(
    config: &Config,
    plan: &mut Plan,
    journal: &mut Journal,
    places: &Places,
    take_management_port: bool,
) -> Result<HostLinks, NotTakenOver> {
    let io = |source| SessionError::Io { operation: "looking for what an earlier run has left", source };
    let netlink = Netlink::open().map_err(io)?;
    journal.prune(&netlink).await.map_err(io)?;
    let held = dataplane::slots(&places.pins).map_err(|error| NotTakenOver::MadeOtherwise(error.to_string()))?;
    if let Some(held) = &held {
        plan.keep_slots(held).map_err(|error| NotTakenOver::MadeOtherwise(error.to_string()))?;
    }
    let mut userspace = (plan.backend == crate::plan::Backend::Userspace).then(Userspace::new);
    let steering = if held.is_some() { Steering::Adopt } else { Steering::Start };
    let changed = change(config, plan, None, journal, places, &mut userspace, steering, take_management_port).await;
    match changed {
        Ok((steering, tunnels)) => Ok(HostLinks { steering, tunnels, userspace }),
        Err(error) => {
            if let Some(userspace) = userspace {
                userspace.stop().await;
            }
            Err(error.into())
        }
    }
}

/// Changes a running site from `previous` to `plan`. Fails before anything is changed where that shows; else what was
/// changed until then stays, and changing back to `previous` is the caller's.
pub async fn reconcile_to(
    config: &Config,
    plan: &mut Plan,
    previous: &Plan,
    journal: &mut Journal,
    places: &Places,
    links: &mut HostLinks,
) -> Result<(), SessionError> {
    if let Some(held) = dataplane::slots(&places.pins)? {
        plan.keep_slots(&held)
            .map_err(|error| Conflict::MadeOtherwise { what: error.to_string() })
            .map_err(HostError::from)?;
    }
    let changed =
        change(config, plan, Some(previous), journal, places, &mut links.userspace, Steering::Update, false).await?;
    (links.steering, links.tunnels) = changed;
    Ok(())
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

#[expect(clippy::too_many_arguments, reason = "one step that its two callers share")]
async fn change(
    config: &Config,
    plan: &Plan,
    previous: Option<&Plan>,
    journal: &mut Journal,
    places: &Places,
    userspace: &mut Option<Userspace>,
    steering: Steering,
    take_management_port: bool,
) -> Result<(u32, Vec<(InterfaceName, u32)>), SessionError> {
    let made = Made { journal: Some(journal), userspace: userspace.as_ref(), previous };
    let changes = host::preflight_since(plan, made).await?;
    host::check_management(plan, &changes, take_management_port).await?;
    let (going, coming): (Vec<Change>, Vec<Change>) =
        changes.into_iter().flat_map(Change::staged).partition(Change::is_removal);
    let interrupts = |change: &Change| matches!(change, Change::Alter { alteration, .. } if alteration.interrupts());
    let (interrupting, coming): (Vec<Change>, Vec<Change>) = coming.into_iter().partition(interrupts);

    let options = host::Options::default();
    let mut tell = |change: &Change| {
        if change.is_needed() {
            tracing::info!("{change}");
        } else {
            tracing::debug!("{change}");
        }
    };
    let (index, mut tunnels) = host::apply(plan, &options, &coming, journal, userspace, &mut tell).await?;
    // They are on their devices already.
    tunnels.extend(interrupting.iter().chain(&going).filter_map(|change| match change {
        Change::Alter { name, ifindex, .. } if *name != plan.steering.name => Some((name.clone(), *ifindex)),
        _ => None,
    }));
    let device = Device { name: plan.steering.name.clone(), ifindex: index };
    let indexes: BTreeMap<InterfaceName, u32> = tunnels.iter().cloned().collect();
    match steering {
        Steering::Start => {
            // Of a start that was cut short.
            dataplane::remove(&places.pins)?;
            dataplane::start(&places.pins, &plan.table, &device, &indexes, &dataplane::Options::default())?;
        }
        Steering::Adopt => {
            let applied = Applied::read(&RunDir::applied_path(&places.run_root, &plan.site));
            let former = applied.map(|applied| applied.table(&plan.table));
            let options = dataplane::Options::default();
            dataplane::adopt(&places.pins, former.as_ref(), &plan.table, &device, &indexes, &options)?;
            follow_rules(plan, former.as_ref(), places)?;
        }
        Steering::Update => {
            let former = previous.map_or(&plan.table, |previous| &previous.table);
            dataplane::update(&places.pins, former, &plan.table, &device, &indexes)?;
            follow_rules(plan, Some(former), places)?;
        }
    }
    for change in &interrupting {
        interrupt(config, plan, change, journal, places, userspace, &mut tell).await?;
    }
    if going.iter().any(|change| matches!(change, Change::RemoveTunnel { .. })) {
        sleep(DRAIN).await;
    }
    host::apply(plan, &options, &going, journal, userspace, &mut tell).await?;
    Ok((index, tunnels))
}

/// Puts changed rules of the configuration in force, beside those that only the maps have.
fn follow_rules(plan: &Plan, former: Option<&SteeringTable>, places: &Places) -> Result<(), SessionError> {
    match former {
        Some(former) if former.rules != plan.table.rules => {
            Ok(Live::open(&plan.site, &places.pins)?.follow_rules(&former.rules, &plan.table.rules)?)
        }
        _ => Ok(()),
    }
}

/// Changes one tunnel while its peer's others carry the traffic, and waits until it works again. One that does not, as
/// its far end is yet to be changed, stays out of use until probing finds it alive.
async fn interrupt(
    config: &Config,
    plan: &Plan,
    change: &Change,
    journal: &mut Journal,
    places: &Places,
    userspace: &mut Option<Userspace>,
    tell: &mut dyn FnMut(&Change),
) -> Result<(), SessionError> {
    let Change::Alter { name, .. } = change else { return Ok(()) };
    let planned = plan.tunnels.iter().find(|tunnel| tunnel.name == *name);
    let number = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
    let Some((peer, slot)) = planned.map(|tunnel| (number(tunnel.peer), number(tunnel.slot))) else { return Ok(()) };
    let view = View::open(&places.pins)?;
    let live = view.peers().get(peer as usize).map_or(0, |peer| peer.live);
    let has_others = live & !(1 << slot) != 0;
    if has_others {
        view.set_live(peer, slot, false);
        sleep(DRAIN).await;
    }
    let options = host::Options::default();
    host::apply(plan, &options, std::slice::from_ref(change), journal, userspace, tell).await?;
    if has_others {
        let _health = Health::start(config, plan, &places.pins, &Handover::default());
        let until = Instant::now() + PATIENCE;
        let is_live = || view.peers().get(peer as usize).is_some_and(|peer| peer.live >> slot & 1 == 1);
        while !is_live() && Instant::now() < until {
            sleep(POLL).await;
        }
    }
    Ok(())
}
