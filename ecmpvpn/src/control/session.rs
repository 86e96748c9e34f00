//! A site's session: from `run` to the last change undone.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{Config, InterfaceName};
use crate::control::confirm::Confirmation;
use crate::control::health::{Handover, Health};
use crate::control::reconcile::{self, NotTakenOver};
use crate::control::reload::{self, Up};
use crate::control::repair::Repair;
use crate::control::resolve::{self, Names};
use crate::control::rotate::{self, Rotation};
use crate::control::{members, notify, steer};
use crate::dataplane::{self, DataplaneError, Device, Pins, View};
use crate::host::journal::{JournalError, UndoErrors};
use crate::host::run_dir::StateError;
use crate::host::{self, HostError, HostLinks, Journal, Made, Netlink, RUN_ROOT, RunDir};
use crate::live::policy::PolicyError;
use crate::live::policy::keep::Applied;
use crate::live::ports;
use crate::plan::{Backend, Plan};

/// How long `down` waits for a running `run` to take its changes back.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How often the userspace tunnels' handshakes are written down.
const HANDSHAKES_EVERY: Duration = Duration::from_secs(1);

/// A session failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The run directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The host cannot be made to match.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The steering programs.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// Rules that are in force.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A socket or signal of our own.
    #[error("{operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// `--persist` with tunnels that live in the process.
    #[error(
        "--persist leaves nothing in place with the userspace backend, whose tunnels end with the process: leave \
         --persist out, or use the kernel backend"
    )]
    CannotPersist,
    /// What runs was made by a version with other maps.
    #[error(
        "{site} is steered by another version of ecmpvpn, whose maps this one cannot use ({}): it goes on as it is; \
         `ecmpvpn down` takes it down, and then `ecmpvpn run` brings it up again", .dir.display()
    )]
    OtherVersion {
        /// The site.
        site: String,
        /// Its pins.
        dir: PathBuf,
    },
    /// `--confirm`, and nobody did.
    #[error("nobody confirmed {site} within {seconds} s: everything is undone")]
    NotConfirmed {
        /// The site.
        site: String,
        /// How long was waited.
        seconds: u32,
    },
    /// Something was left behind.
    #[error("not everything could be put back")]
    Undo(#[from] UndoErrors),
}

impl SessionError {
    /// Whether the host lacks a privilege, a kernel feature or a tool.
    pub fn is_lack(&self) -> bool {
        match self {
            Self::Host(error) => error.is_lack(),
            Self::Dataplane(error) => error.is_host_lacking(),
            _ => false,
        }
    }
}

/// One site's places on this host.
#[derive(Clone, Debug)]
pub struct Places {
    /// Below it each site has its lock and journal.
    pub run_root: PathBuf,
    /// Where the maps, programs and links are.
    pub pins: Pins,
}

impl Places {
    /// Where `site` is on every host.
    pub fn of(site: &str) -> Self {
        Self { run_root: RUN_ROOT.into(), pins: Pins::of(site) }
    }
}

/// What there was to take down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TakenDown {
    /// A running process that was stopped; it took its own changes back.
    pub stopped: Option<i32>,
    /// Host changes undone here.
    pub undone: usize,
}

/// What `run` would change, and where nothing needs changing. Changes nothing.
pub async fn dry_run(
    config: &Config,
    places: &Places,
    take_management_port: bool,
) -> Result<Vec<host::Change>, SessionError> {
    let plan = Plan::new(config, host::detect_backend(config.steering.backend));
    let site = &config.site.name;
    let journal = Journal::open(&places.run_root.join(site).join("journal.json"), site)?;
    let changes = host::preflight_since(&plan, Made { journal: Some(&journal), ..Made::default() }).await?;
    host::check_management(&plan, &changes, take_management_port).await?;
    Ok(changes)
}

/// How a site is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration, to be read again.
    pub file: PathBuf,
    /// Leave everything up at the end.
    pub persist: bool,
    /// Undo everything unless it is confirmed within so many seconds.
    pub confirm: Option<u32>,
    /// Enslave also a port that carries the default route or an SSH session.
    pub take_management_port: bool,
}

/// Why the waiting ended.
enum Event {
    Stop,
    Reload,
    NotConfirmed(u32),
    Rotate(rotate::Step),
    Missing(Vec<InterfaceName>),
    Moved(resolve::Moved),
}

/// Brings a site up, keeps it until SIGINT or SIGTERM, and takes it down again unless it shall persist. SIGHUP reads the
/// configuration again.
///
/// What an earlier run has left is gone on with, and changed where the configuration differs. If a step fails, the ones
/// before it are undone and its error is returned.
pub async fn run(config: Config, places: &Places, options: &Options) -> Result<(), SessionError> {
    let site = config.site.name.clone();
    // Asked for first: a signal that comes while the site is brought up must not end the process half way.
    let mut signals = Signals::new().map_err(|source| SessionError::Io { operation: "waiting for signals", source })?;
    let mut plan = Plan::new(&config, host::detect_backend(config.steering.backend));
    if options.persist && plan.backend == Backend::Userspace {
        return Err(SessionError::CannotPersist);
    }
    // Without privilege this says so; the run directory would only say that it cannot be made.
    host::require_privilege()?;
    let run_dir = RunDir::lock(&places.run_root, &site)?;
    let mut journal = Journal::open(&run_dir.journal_path(), &site)?;
    if let Some(dir) = places.pins.of_other_versions().into_iter().next() {
        return Err(SessionError::OtherVersion { site, dir });
    }
    let mut confirmation = Confirmation::ask(&run_dir, &options.file, options.confirm)?;
    let links = match go_on(&config, &mut plan, &mut journal, places, options).await? {
        Some(links) => links,
        None => match bring_up(&plan, &mut journal, places, options).await {
            Ok(links) => links,
            Err(error) => {
                run_dir.remove()?;
                return Err(error);
            }
        },
    };
    let mut up = Up { config, plan, links };
    confirmation.begin();
    leave_applied(&up, places);
    announce(&up);
    let handover = Handover::default();
    let mut rotation = Rotation::load(&options.file, &up, &handover);
    let (mut repair, mut names, mut health) = (Repair::default(), Names::default(), None);
    let mut end = loop {
        let probing = health.get_or_insert_with(|| Health::start(&up.config, &up.plan, &places.pins, &handover));
        let event = tokio::select! {
            event = keep(&up, places, &mut signals) => event,
            seconds = confirmation.is_missing() => Ok(Event::NotConfirmed(seconds)),
            never = ports::advise(&up.config) => match never {},
            never = steer::keep(&up.config, &places.pins) => match never {},
            never = probing.watch(&up.plan, up.links.userspace.as_ref()) => match never {},
            never = members::follow(&up.config, &up.plan, &places.pins) => match never {},
            never = notify::watchdog() => match never {},
            step = rotation.due(&up, &places.pins) => Ok(Event::Rotate(step)),
            moved = names.moved(&up, &places.pins) => Ok(Event::Moved(moved)),
            missing = repair.missing(&up) => Ok(Event::Missing(missing)),
        };
        // Before the tunnels go: none of them dies. It begins again with those that a reload leaves. When keys change it
        // goes on: it tells whether the tunnel works.
        if !matches!(event, Ok(Event::Rotate(_))) {
            health = None;
        }
        match event {
            Ok(Event::Reload) => {
                notify::reloading();
                let outcome = reload::reload(&mut up, &options.file, &mut journal, places).await;
                if let Err(error) = outcome.write(&RunDir::reload_path(&places.run_root, &site)) {
                    tracing::warn!("what became of the reload cannot be told: {error}");
                }
                notify::ready(&outcome.text);
                leave_applied(&up, places);
                rotation = Rotation::load(&options.file, &up, &handover);
            }
            Ok(Event::Stop) => break Ok(()),
            Ok(Event::NotConfirmed(seconds)) => {
                break Err(SessionError::NotConfirmed { site: site.clone(), seconds });
            }
            Ok(Event::Rotate(step)) => rotation.act(step, &mut up).await,
            Ok(Event::Moved(moved)) => names.follow(moved, &mut up, &mut journal, places).await,
            Ok(Event::Missing(missing)) => repair.restore(&missing, &mut up, &mut journal, places).await,
            Err(error) => break Err(error),
        }
    };
    if options.persist && end.is_ok() && !confirmation.is_awaited() {
        notify::stopping("it stays up without this process");
        tracing::info!("{site} stays up; the next `ecmpvpn run` goes on with it, `ecmpvpn down` takes it down");
        return Ok(());
    }
    let undone = stop(up, &mut journal, places).await;
    end = match (end, undone) {
        (Ok(()), Err(error)) => Err(error),
        (end, _) => end,
    };
    match end {
        Ok(()) => {
            run_dir.remove()?;
            tracing::info!("{site} is down; the host is as it was");
            Ok(())
        }
        Err(error) => {
            if journal.is_empty() {
                run_dir.remove()?;
            }
            Err(error)
        }
    }
}

/// Takes down what is up.
async fn stop(up: Up, journal: &mut Journal, places: &Places) -> Result<usize, SessionError> {
    notify::stopping("taking it down");
    tracing::info!("taking {} down", up.plan.site);
    // Before the tunnels end; `undo` tries again what fails here, and goes on.
    if let Err(error) = dataplane::remove(&places.pins) {
        tracing::warn!("{error}");
    }
    if let Some(userspace) = up.links.userspace {
        userspace.stop().await;
    }
    undo(journal, places).await
}

/// Waits for a signal. Meanwhile writes down what only this process knows: the userspace tunnels' handshakes.
async fn keep(up: &Up, places: &Places, signals: &mut Signals) -> Result<Event, SessionError> {
    let Some(userspace) = &up.links.userspace else {
        return Ok(signals.wait().await);
    };
    let view = View::open(&places.pins)?;
    let mut every = tokio::time::interval(HANDSHAKES_EVERY);
    loop {
        tokio::select! {
            event = signals.wait() => return Ok(event),
            _ = every.tick() => {
                for (name, age) in userspace.last_handshakes().await {
                    let tunnel = up.plan.tunnels.iter().find(|tunnel| tunnel.name == name);
                    if let (Some(tunnel), Some(age)) = (tunnel, age) {
                        let number = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
                        view.set_last_handshake(number(tunnel.peer), number(tunnel.slot), age);
                    }
                }
            }
        }
    }
}

/// Removes everything that `run` made for `site`, from any process; a running one is stopped first.
pub async fn down(site: &str, places: &Places) -> Result<TakenDown, SessionError> {
    let pinned = places.pins.exist() || !places.pins.of_other_versions().is_empty();
    if !places.run_root.join(site).exists() && !pinned {
        return Ok(TakenDown::default());
    }
    host::require_privilege()?;
    let (root, name) = (places.run_root.clone(), site.to_owned());
    let locking = tokio::task::spawn_blocking(move || RunDir::lock_stopping(&root, &name, STOP_PATIENCE));
    let (run_dir, stopped) = locking.await.expect("locking does not panic")?;
    let mut journal = Journal::open(&run_dir.journal_path(), site)?;
    let undone = undo(&mut journal, places).await?;
    run_dir.remove()?;
    Ok(TakenDown { stopped, undone })
}

/// Goes on with what an earlier run has left; `None` if there is nothing. What cannot be gone on with is taken down.
async fn go_on(
    config: &Config,
    plan: &mut Plan,
    journal: &mut Journal,
    places: &Places,
    options: &Options,
) -> Result<Option<HostLinks>, SessionError> {
    let why = if journal.is_empty() {
        if !places.pins.exist() {
            return Ok(None);
        }
        "its journal is gone".to_owned()
    } else {
        tracing::info!("an earlier run of {} left it up: going on with that", plan.site);
        let mut kept = plan.clone();
        match reconcile::take_over(config, &mut kept, journal, places, options.take_management_port).await {
            Ok(links) => {
                *plan = kept;
                return Ok(Some(links));
            }
            Err(NotTakenOver::Failed(error)) => {
                tracing::info!("what is up of {} is left as it is; `ecmpvpn down` takes it down", plan.site);
                return Err(error);
            }
            Err(NotTakenOver::MadeOtherwise(why)) => why,
        }
    };
    tracing::info!("what an earlier run of {} left is taken down first: {why}", plan.site);
    undo(journal, places).await?;
    Ok(None)
}

async fn bring_up(
    plan: &Plan,
    journal: &mut Journal,
    places: &Places,
    options: &Options,
) -> Result<HostLinks, SessionError> {
    let changes = host::preflight_since(plan, Made::default()).await?;
    host::check_management(plan, &changes, options.take_management_port).await?;
    let links =
        host::bring_up(plan, &host::Options::default(), journal, &mut |change| tracing::info!("{change}")).await?;
    let steering = Device { name: plan.steering.name.clone(), ifindex: links.steering };
    let tunnels: BTreeMap<InterfaceName, u32> = links.tunnels.iter().cloned().collect();
    match dataplane::start(&places.pins, &plan.table, &steering, &tunnels, &dataplane::Options::default()) {
        Ok(hook) => {
            tracing::info!("attach the steering program to {} ({hook})", steering.name);
            Ok(links)
        }
        Err(first) => {
            if let Some(userspace) = links.userspace {
                userspace.stop().await;
            }
            if let Err(error) = undo(journal, places).await {
                tracing::error!("undoing what was made before: {error}");
            }
            Err(first.into())
        }
    }
}

/// Detaches the programs, then undoes the host's changes: programs must not outlive the devices that they redirect to.
/// Goes on past a failure and returns the first one.
async fn undo(journal: &mut Journal, places: &Places) -> Result<usize, SessionError> {
    let detached = dataplane::remove(&places.pins);
    let netlink =
        Netlink::open().map_err(|source| SessionError::Io { operation: "opening a netlink socket", source })?;
    let undone = journal.undo(&netlink, &mut |undo| tracing::info!("{undo}")).await?;
    detached?;
    Ok(undone)
}

/// Lets the next process know what this one's configuration said, so that it can tell what was changed beside it.
fn leave_applied(up: &Up, places: &Places) {
    let path = RunDir::applied_path(&places.run_root, &up.config.site.name);
    if let Err(error) = Applied::of(&up.plan.table).write(&path) {
        tracing::warn!("writing {}: {error}; the next `ecmpvpn run` sets policies as configured", path.display());
    }
}

fn announce(up: &Up) {
    let Up { config, plan, .. } = up;
    let peers: Vec<&str> = config.peers.iter().map(|peer| peer.name.as_str()).collect();
    let text = format!(
        "{} is up: {} tunnels to {} through {}",
        config.site.name,
        plan.tunnels.len(),
        peers.join(", "),
        config.steering.device
    );
    notify::ready(&text);
    tracing::info!("{text}; Ctrl-C takes it down");
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
