//! A site's session: from `run` to the last change undone.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{Config, InterfaceName};
use crate::control::health::Health;
use crate::control::{arrivals, ports, steer};
use crate::dataplane::{self, DataplaneError, Device, Pins, View};
use crate::host::journal::{JournalError, UndoErrors};
use crate::host::state::StateError;
use crate::host::{self, HostError, HostLinks, Journal, Netlink, RUN_ROOT, RunDir};
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
pub async fn dry_run(config: &Config) -> Result<Vec<host::Change>, SessionError> {
    let plan = Plan::new(config, host::detect_backend(config.steering.backend));
    host::preflight(&plan).await?;
    Ok(host::changes(&plan).await?)
}

/// Brings a site up, keeps it until SIGINT or SIGTERM, and takes it down again unless it shall `persist`.
///
/// What an earlier run that crashed left behind is taken down first. If a step fails, the ones before it are undone and
/// its error is returned.
pub async fn run(config: &Config, places: &Places, persist: bool) -> Result<(), SessionError> {
    let site = &config.site.name;
    // Asked for first: a signal that comes while the site is brought up must not end the process half way.
    let mut stop = Stop::new().map_err(|source| SessionError::Io { operation: "waiting for signals", source })?;
    let plan = Plan::new(config, host::detect_backend(config.steering.backend));
    if persist && plan.backend == Backend::Userspace {
        return Err(SessionError::CannotPersist);
    }
    // Without privilege this says so; the run directory would only say that it cannot be made.
    host::require_privilege()?;
    let run_dir = RunDir::lock(&places.run_root, site)?;
    let mut journal = Journal::open(&run_dir.journal_path(), site)?;
    if !journal.is_empty() || places.pins.exist() {
        tracing::info!("an earlier run of {site} left its changes behind: they are taken back first");
        undo(&mut journal, places).await?;
    }
    let links = match bring_up(&plan, &mut journal, places).await {
        Ok(links) => links,
        Err(error) => {
            run_dir.remove()?;
            return Err(error);
        }
    };
    announce(config, &plan);
    let mut health = Health::start(config, &plan, &places.pins);
    let kept = tokio::select! {
        kept = keep(&links, &plan, places, &mut stop) => kept,
        never = ports::advise(config) => match never {},
        never = steer::keep(config, &places.pins) => match never {},
        never = health.watch(&plan, links.userspace.as_ref()) => match never {},
        never = arrivals::follow(config, &plan, &places.pins) => match never {},
    };
    // Before the tunnels go: none of them dies.
    drop(health);
    if persist && kept.is_ok() {
        tracing::info!("{site} stays up; `ecmpvpn down` takes it down");
        return Ok(());
    }
    tracing::info!("taking {site} down");
    // Before the tunnels end; `undo` tries again what fails here, and goes on.
    if let Err(error) = dataplane::remove(&places.pins) {
        tracing::warn!("{error}");
    }
    if let Some(userspace) = links.userspace {
        userspace.stop().await;
    }
    let undone = undo(&mut journal, places).await;
    kept?;
    undone?;
    run_dir.remove()?;
    tracing::info!("{site} is down; the host is as it was");
    Ok(())
}

/// Waits for a signal. Meanwhile writes down what only this process knows: the userspace tunnels' handshakes.
async fn keep(links: &HostLinks, plan: &Plan, places: &Places, stop: &mut Stop) -> Result<(), SessionError> {
    let Some(userspace) = &links.userspace else {
        stop.wait().await;
        return Ok(());
    };
    let view = View::open(&places.pins)?;
    let mut every = tokio::time::interval(HANDSHAKES_EVERY);
    loop {
        tokio::select! {
            () = stop.wait() => return Ok(()),
            _ = every.tick() => {
                for (name, age) in userspace.last_handshakes().await {
                    let tunnel = plan.tunnels.iter().find(|tunnel| tunnel.name == name);
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
    if !places.run_root.join(site).exists() && !places.pins.exist() {
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

async fn bring_up(plan: &Plan, journal: &mut Journal, places: &Places) -> Result<HostLinks, SessionError> {
    host::preflight(plan).await?;
    let options = host::Options::default();
    let links = host::bring_up(plan, &options, journal, &mut |change| tracing::info!("{change}")).await?;
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

fn announce(config: &Config, plan: &Plan) {
    let peers: Vec<&str> = config.peers.iter().map(|peer| peer.name.as_str()).collect();
    tracing::info!(
        "{} is up: {} tunnels to {} through {}; Ctrl-C takes it down",
        config.site.name,
        plan.tunnels.len(),
        peers.join(", "),
        config.steering.device
    );
}

/// SIGINT and SIGTERM.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
