//! A site's session: from the start of `run` until the last change is undone.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::confirm::Confirmation;
use super::down::undo;
use super::firewall;
use super::health::{Handover, Health};
use super::holding::Holding;
use super::reconcile::{self, NotTakenOver};
use super::reload::Reloads;
use super::repair::{Damage, Repair};
use super::resolve::{self, NameWatcher};
use super::rotate::{self, Rotation};
use super::site::{Paths, SessionError, Site};
use super::{members, notify, steer};
use crate::config::{Config, InterfaceName};
use crate::dataplane::{self, Device, View};
use crate::error::chain;
use crate::host::run_dir::{Holder, RunDirError};
use crate::host::{self, HostLinks, Journal, Owned, RunDir};
use crate::live::ports;
use crate::plan::{self, Backend, Plan};

/// How often the handshake times of userspace tunnels are written to the map `HEALTH`.
const HANDSHAKES_EVERY: Duration = Duration::from_secs(1);

/// Lists what `run` would change, and what it would keep. Changes nothing.
pub async fn dry_run(
    config: &Config,
    paths: &Paths,
    take_management_port: bool,
) -> Result<Vec<host::Change>, SessionError> {
    let plan = Plan::new(config, host::detect_backend(config.steering.backend));
    let site = &config.site.name;
    if let Some(Holder { pid, .. }) = RunDir::holder(&paths.run_root, site)? {
        return Err(RunDirError::AlreadyRunning { site: site.clone(), pid }.into());
    }
    let journal = Journal::open(&RunDir::journal_path_of(&paths.run_root, site), site)?;
    let changes = host::preflight_since(&plan, Owned { journal: Some(&journal), ..Owned::default() }).await?;
    host::check_management(&plan, &changes, take_management_port).await?;
    Ok(changes)
}

/// The options of `run`.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file. SIGHUP reads it again.
    pub file: PathBuf,
    /// The text that the configuration was parsed from.
    pub text: String,
    /// Leave the site up when this process ends.
    pub persist: bool,
    /// Undo everything unless `ecmpvpn confirm` is run within this many seconds.
    pub confirm: Option<u32>,
    /// Also enslave a port that carries the default route or an SSH session.
    pub take_management_port: bool,
}

/// Why the main loop stopped waiting.
enum Event {
    Stop,
    Reload,
    NotConfirmed(u32),
    /// Nobody confirmed a reload.
    TakeBack,
    Rotate(rotate::Step),
    Damaged(Damage),
    /// The device that holds packets must be made or removed.
    Hold,
    Moved(resolve::AddressChange),
}

/// Brings a site up and keeps it until SIGINT or SIGTERM. Then takes it down, unless `options.persist` is set. SIGHUP
/// reads the configuration again.
///
/// If an earlier run left the site up, adopts it and changes it where the configuration differs.
///
/// # Errors
/// A step failed. The steps before it are undone.
pub async fn run(config: Config, paths: &Paths, options: &Options) -> Result<(), SessionError> {
    let name = config.site.name.clone();
    // First of all: a signal that arrives while the site is brought up must not end the process half-way.
    let mut signals = Signals::new().map_err(|source| SessionError::Io { operation: "waiting for signals", source })?;
    let plan = Plan::new(&config, host::detect_backend(config.steering.backend));
    if options.persist && plan.backend == Backend::Userspace {
        return Err(SessionError::CannotPersist);
    }
    // Checked here for a clear error: without privilege the run directory would only fail to be created.
    host::require_privilege()?;
    let run_dir = RunDir::lock(&paths.run_root, &name)?;
    let journal = Journal::open(&run_dir.journal_path(), &name)?;
    paths.pins.claim()?;
    if let Some(dir) = paths.pins.of_other_versions().into_iter().next() {
        return Err(SessionError::OtherVersion { site: name, dir });
    }
    let mut confirmation = match Confirmation::ask(&run_dir, &options.file, options.confirm) {
        Ok(confirmation) => confirmation,
        Err(error) => return give_up(run_dir, &journal, error),
    };
    let mut site =
        Site { config, text: options.text.clone(), plan, links: HostLinks::default(), journal, paths: paths.clone() };
    if !adopt(&mut site, options).await?
        && let Err(error) = bring_up(&mut site, options).await
    {
        return give_up(run_dir, &site.journal, error);
    }
    confirmation.begin();
    site.leave_applied();
    firewall::report(&site.plan).await;
    firewall::warn_of_managers(&site.config).await;
    // A trial that was cut off has been taken back.
    let _ = fs::remove_file(RunDir::unconfirmed_reload_path(&paths.run_root, &name));
    announce(&site);
    let _watchdog = notify::Watchdog::start();
    let handover = Handover::default();
    let mut holding = Holding::begin(&mut site, &handover).await;
    let mut rotation = Rotation::load(&options.file, &site, &handover);
    let (mut repair, mut names, mut reloads) = (Repair::default(), NameWatcher::default(), Reloads::default());
    // Probing goes on while tunnels are changed: it leaves out only those that change.
    let mut health = Health::start(&site.config, &site.plan, &paths.pins, &handover);
    let mut end = loop {
        let event = tokio::select! {
            event = keep(&site, &mut signals) => event,
            seconds = confirmation.is_missing() => Ok(Event::NotConfirmed(seconds)),
            () = reloads.is_unconfirmed() => Ok(Event::TakeBack),
            never = ports::advise(&site.config) => match never {},
            never = steer::keep(&site.config, &paths.pins, &handover) => match never {},
            never = health.watch(&site.plan, site.links.userspace.as_ref()) => match never {},
            never = members::follow(&site.config, &site.plan, &paths.pins) => match never {},
            never = notify::idle() => match never {},
            step = rotation.next_step(&site) => Ok(Event::Rotate(step)),
            moved = names.address_change(&site) => Ok(Event::Moved(moved)),
            damage = repair.damage(&site) => Ok(Event::Damaged(damage)),
            () = holding.is_due(&site) => Ok(Event::Hold),
        };
        match event {
            Ok(Event::Reload) => {
                if reloads.act(&mut site, &options.file, &mut health).await {
                    site.leave_applied();
                    rotation = Rotation::load(&options.file, &site, &handover);
                }
            }
            Ok(Event::TakeBack) => {
                reloads.take_back(&mut site, &mut health).await;
                site.leave_applied();
                rotation = Rotation::load(&options.file, &site, &handover);
            }
            Ok(Event::Stop) => break Ok(()),
            Ok(Event::NotConfirmed(seconds)) => {
                break Err(SessionError::NotConfirmed { site: name.clone(), seconds });
            }
            Ok(Event::Rotate(step)) => rotation.act(step, &mut site).await,
            Ok(Event::Moved(moved)) => names.follow(moved, &mut site, &mut health).await,
            Ok(Event::Hold) => holding.keep(&mut site).await,
            Ok(Event::Damaged(damage)) => repair.mend(&damage, &mut site, &mut health).await,
            Err(error) => break Err(error),
        }
    };
    // Probing ends before tunnels are removed, so that none of them counts as dead.
    drop((health, reloads));
    if options.persist && end.is_ok() && !confirmation.is_awaited() {
        notify::stopping("it stays up without this process");
        tracing::info!("{name} stays up; the next `ecmpvpn run` adopts it, `ecmpvpn down` takes it down");
        return Ok(());
    }
    let undone = stop(&mut site).await;
    end = match (end, undone) {
        (Ok(()), undone) => undone.map(drop),
        (Err(first), Ok(_)) => Err(first),
        (Err(first), Err(error)) => {
            tracing::error!("{}", chain(&error));
            Err(first)
        }
    };
    match end {
        Ok(()) => {
            run_dir.remove()?;
            tracing::info!("{name} is down; the host is as it was");
            Ok(())
        }
        Err(error) => give_up(run_dir, &site.journal, error),
    }
}

/// Ends with `error`. Removes the run directory, unless something is left to undo.
fn give_up(run_dir: RunDir, journal: &Journal, error: SessionError) -> Result<(), SessionError> {
    if journal.is_empty() {
        run_dir.remove()?;
    }
    Err(error)
}

/// Takes the site down. Returns the number of changes undone.
async fn stop(site: &mut Site) -> Result<usize, SessionError> {
    notify::stopping("taking it down");
    tracing::info!("taking {} down", site.plan.site);
    // Must come before the tunnels end. `undo` repeats what fails here.
    if let Err(error) = dataplane::remove(&site.paths.pins) {
        tracing::warn!("{}", chain(&error));
    }
    if let Some(userspace) = site.links.userspace.take() {
        userspace.stop().await;
    }
    undo(&mut site.journal, &site.paths).await
}

/// Waits for a signal. Meanwhile writes the handshake times of userspace tunnels to the maps: only this process knows
/// them.
async fn keep(site: &Site, signals: &mut Signals) -> Result<Event, SessionError> {
    let Some(userspace) = &site.links.userspace else {
        return Ok(signals.wait().await);
    };
    let view = View::open(&site.paths.pins)?;
    let mut every = tokio::time::interval(HANDSHAKES_EVERY);
    loop {
        tokio::select! {
            event = signals.wait() => return Ok(event),
            _ = every.tick() => {
                for (name, age) in userspace.last_handshakes().await {
                    let tunnel = site.plan.tunnel(&name);
                    if let (Some(tunnel), Some(age)) = (tunnel, age) {
                        view.set_last_handshake(tunnel.id(), age);
                    }
                }
            }
        }
    }
}

/// Adopts what an earlier run left up, and returns whether it did. What cannot be adopted is taken down.
async fn adopt(site: &mut Site, options: &Options) -> Result<bool, SessionError> {
    let why = if site.journal.is_empty() {
        if !site.paths.pins.exist() {
            return Ok(false);
        }
        "its journal is gone".to_owned()
    } else {
        tracing::info!("an earlier run left {} up: adopting it", site.plan.site);
        match reconcile::take_over(site, options.take_management_port).await {
            Ok(()) => return Ok(true),
            Err(NotTakenOver::Failed(error)) => {
                tracing::info!("{} is left as it is; `ecmpvpn down` takes it down", site.plan.site);
                return Err(error);
            }
            Err(NotTakenOver::MadeOtherwise(why)) => why,
        }
    };
    tracing::info!(
        "an earlier run left {} up, and this run cannot adopt it: taking it down first: {why}",
        site.plan.site
    );
    undo(&mut site.journal, &site.paths).await?;
    Ok(false)
}

async fn bring_up(site: &mut Site, options: &Options) -> Result<(), SessionError> {
    let plan = &site.plan;
    let changes = host::preflight_since(plan, Owned::default()).await?;
    host::check_management(plan, &changes, options.take_management_port).await?;
    let journal = &mut site.journal;
    let links =
        host::bring_up(plan, &host::Options::default(), journal, &mut |change| tracing::info!("{change}")).await?;
    let steering = Device { name: plan.steering.name.clone(), ifindex: links.steering };
    let tunnels: BTreeMap<InterfaceName, u32> = links.tunnels.iter().cloned().collect();
    match dataplane::start(&site.paths.pins, &plan.table, &steering, &tunnels, &dataplane::Options::default()) {
        Ok(hook) => {
            tracing::info!("attached the steering program to {} ({hook})", steering.name);
            site.links = links;
            Ok(())
        }
        Err(first) => {
            if let Some(userspace) = links.userspace {
                userspace.stop().await;
            }
            if let Err(error) = undo(&mut site.journal, &site.paths).await {
                tracing::error!("undoing the changes made so far failed: {}", chain(&error));
            }
            Err(first.into())
        }
    }
}

fn announce(site: &Site) {
    let config = &site.config;
    let peers: Vec<&str> = config.peers.iter().map(|peer| peer.name.as_str()).collect();
    let text = format!(
        "{} is up: {} tunnels to {} through {}",
        config.site.name,
        site.plan.tunnels.len(),
        peers.join(", "),
        config.steering.device
    );
    // It stands in `systemctl status` as long as the site is up, so it does not say what changes.
    notify::ready(&text);
    tracing::info!("{text}{}; Ctrl-C takes it down", answered(site));
}

/// How many tunnels have ever answered, to be added to a sentence: a site is up before the other one is.
fn answered(site: &Site) -> String {
    let view = View::open(&site.paths.pins).ok();
    let has_answered = |tunnel: &&plan::Tunnel| {
        view.as_ref().and_then(|view| view.health(tunnel.id())).is_some_and(|health| health.rtt_us.get() != 0)
    };
    match site.plan.tunnels.iter().filter(has_answered).count() {
        0 => ", none of which has answered yet".to_owned(),
        all if all == site.plan.tunnels.len() => String::new(),
        some => format!(", of which {some} have answered"),
    }
}

/// SIGINT, SIGTERM and SIGHUP.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn wait(&mut self) -> Event {
        tokio::select! {
            _ = self.interrupt.recv() => Event::Stop,
            _ = self.terminate.recv() => Event::Stop,
            _ = self.hangup.recv() => Event::Reload,
        }
    }
}
