//! Mends what somebody else changes while the site is up: devices that are deleted or set down, routes, addresses, MTUs,
//! forwarding. Compares the host with the plan when the kernel tells of a change, and at intervals.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use super::health::Health;
use super::log_once::LogOnce;
use super::reconcile;
use super::site::{SessionError, Site};
use crate::config::InterfaceName;
use crate::error::chain;
use crate::host::events::{Events, Interest};
use crate::host::{self, Change, HostError, Netlink, Owned};

/// How often the switches of the kernel are read, for which there are no events.
const LOOK: Duration = Duration::from_secs(1);
/// How often everything is compared although no event came.
const COMPARE: Duration = Duration::from_secs(10);
/// How long to wait after an event: changes come in groups.
const SETTLE: Duration = Duration::from_millis(5);
/// How long to wait when somebody else keeps changing the same things, and after many failures.
const PAUSE: Duration = Duration::from_secs(5);
/// How long to wait after the first failure: somebody else may be in the midst of several changes. It doubles with each
/// failure, up to [`PAUSE`].
const RETRY: Duration = Duration::from_millis(50);
/// More repairs than this within [`PAUSE`] mean that somebody else changes everything back.
const REPAIRS: usize = 20;

/// What differs from the plan. Not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Devices that are gone.
    pub gone: Vec<InterfaceName>,
    /// For the log, for example `ecmp0 was set down`.
    pub texts: Vec<String>,
}

impl Damage {
    fn of(changes: &[Change]) -> Self {
        let gone = changes.iter().filter_map(|change| match change {
            Change::CreateTunnel { name, .. } | Change::CreateSteering { name, .. } => Some(name.clone()),
            _ => None,
        });
        let gone: Vec<InterfaceName> = gone.collect();
        // What was on a device is gone with it, which need not be said as well.
        let follows = |change: &&Change| match change {
            Change::AddRoute { device, .. } | Change::LooseReversePath { device } => gone.contains(device),
            _ => false,
        };
        let texts = changes.iter().filter(|change| !follows(change)).filter_map(Change::damage).collect();
        Self { gone, texts }
    }
}

/// Watches the site's devices, routes and settings.
#[derive(Default)]
pub struct Repair {
    recent: VecDeque<Instant>,
    /// How many times in a row it has failed.
    failures: u32,
    pause: Option<Duration>,
    events: Option<Events>,
    troubles: LogOnce,
}

impl Repair {
    /// Waits until something differs from the plan, and returns it.
    pub async fn damage(&mut self, site: &Site) -> Damage {
        if let Some(pause) = self.pause {
            sleep(pause).await;
            self.pause = None;
        }
        let interest = interest(site);
        loop {
            // Before comparing, so that no change between the two is missed.
            if self.events.is_none() {
                self.events = Events::open().ok();
            }
            match compare(site).await {
                Ok(damage) if damage.texts.is_empty() => self.troubles.clear(),
                Ok(damage) => return damage,
                Err(error) => self
                    .troubles
                    .warn(format!("what somebody else changes on this host cannot be mended: {}", chain(&error))),
            }
            self.wait(site, &interest).await;
        }
    }

    /// Waits until something may differ.
    async fn wait(&mut self, site: &Site, interest: &Interest) {
        let started = Instant::now();
        while started.elapsed() < COMPARE {
            let Some(events) = &mut self.events else { return sleep(LOOK).await };
            match timeout(LOOK, events.next(interest)).await {
                Ok(true) => return sleep(SETTLE).await,
                Ok(false) => {
                    self.events = None;
                    return sleep(SETTLE).await;
                }
                Err(_) if host::switches_differ(&site.plan) => return,
                Err(_) => {}
            }
        }
    }

    /// Mends the damage.
    pub async fn mend(&mut self, damage: &Damage, site: &mut Site, health: &mut Health) {
        let what = damage.texts.join("; ");
        let now = Instant::now();
        self.recent.retain(|repair| now.duration_since(*repair) < PAUSE);
        self.recent.push_back(now);
        let mended = mend(damage, site, health).await;
        self.failures = if mended.is_ok() { 0 } else { self.failures.saturating_add(1) };
        match mended {
            Ok(()) if self.recent.len() > REPAIRS => {
                self.pause = Some(PAUSE);
                tracing::error!(
                    "somebody else keeps changing this host, and it is mended each time: {what}; looking again in {} s",
                    PAUSE.as_secs()
                );
            }
            Ok(()) => tracing::warn!("somebody else changed this host, and it is mended: {what}"),
            Err(error) => {
                self.pause = Some(RETRY.saturating_mul(1 << (self.failures - 1).min(7)).min(PAUSE));
                self.troubles.warn(format!(
                    "somebody else changed this host ({what}), and it cannot be mended yet: {}",
                    chain(&error)
                ));
            }
        }
    }
}

fn interest(site: &Site) -> Interest {
    let names = site.plan.tunnels.iter().map(|tunnel| tunnel.name.to_string());
    let tunnels = site.links.tunnels.iter().map(|(_, index)| *index);
    Interest {
        links: tunnels.chain([site.links.steering]).collect(),
        names: names.chain([site.plan.steering.name.to_string()]).collect(),
        prefixes: site.plan.routes.iter().map(|route| route.prefix).collect(),
    }
}

async fn compare(site: &Site) -> Result<Damage, HostError> {
    let userspace = site.links.userspace.as_ref();
    let made = Owned { journal: Some(&site.journal), userspace, previous: Some(&site.plan) };
    Ok(Damage::of(&host::changes_since(&site.plan, made).await?))
}

async fn mend(damage: &Damage, site: &mut Site, health: &mut Health) -> Result<(), SessionError> {
    let io = |source| SessionError::Io { operation: "looking for deleted devices", source };
    if let Some(userspace) = &mut site.links.userspace {
        for name in &damage.gone {
            userspace.forget(name).await;
        }
    }
    if !damage.gone.is_empty() {
        // Removes the records of these devices, and of what was on them.
        site.journal.prune(&Netlink::open()?).await.map_err(io)?;
    }
    reconcile::repair(site, health).await
}
