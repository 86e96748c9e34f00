//! The site that a process runs, and its errors.

use std::io;
use std::path::PathBuf;

use crate::config::{Config, InterfaceName};
use crate::dataplane::{DataplaneError, Pins};
use crate::host::journal::JournalError;
use crate::host::run_dir::{RunDir, RunDirError};
use crate::host::{HostError, HostLinks, Journal, RUN_ROOT, UndoErrors};
use crate::live::policy::PolicyError;
use crate::live::policy::keep::Applied;
use crate::plan::Plan;

/// Why a site cannot be brought up, kept running or taken down.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    State(#[from] RunDirError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A socket, file or signal of this process; `operation` in the form "waiting for signals".
    #[error("{operation}")]
    Io {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    /// `--persist` with the userspace backend.
    #[error(
        "--persist leaves nothing in place with the userspace backend, whose tunnels end with the process: leave \
         --persist out, or use the kernel backend"
    )]
    CannotPersist,
    /// The running site was made by a version with another map layout.
    #[error(
        "{site} is steered by another version of ecmpvpn, whose maps this one cannot use ({}): it keeps running \
         unchanged; `ecmpvpn down` takes it down, then `ecmpvpn run` brings it up again", .dir.display()
    )]
    OtherVersion {
        site: String,
        /// The pins of the other version.
        dir: PathBuf,
    },
    /// A reload changed a tunnel that answered probes before, and it answers no more.
    #[error("{tunnel} does not answer with its new {changed} (waited {seconds} s)")]
    Unanswered {
        tunnel: InterfaceName,
        /// What was changed.
        changed: String,
        seconds: u64,
    },
    /// The process that must act is stopped.
    #[error(
        "`ecmpvpn run` (pid {pid}) is stopped and can do nothing: continue it with `kill -CONT {pid}`, then try again"
    )]
    Stopped { pid: i32 },
    /// The process that must reload does not answer.
    #[error(
        "`ecmpvpn run` (pid {pid}) has not {} the reload within {seconds} s: its log says what it does",
        if *.has_begun { "finished" } else { "begun" }
    )]
    NoAnswer { pid: i32, seconds: u64, has_begun: bool },
    #[error("nobody confirmed {site} within {seconds} s: everything is undone")]
    NotConfirmed { site: String, seconds: u32 },
    #[error("not every change could be undone, `ecmpvpn down` tries the rest again")]
    Undo(#[from] UndoErrors),
}

impl SessionError {
    /// Whether the cause is a missing privilege, kernel feature or tool.
    pub fn is_lack(&self) -> bool {
        match self {
            Self::Host(error) => error.is_lack(),
            Self::Dataplane(error) => error.is_host_lacking(),
            _ => false,
        }
    }
}

/// Where one site's files and pins are on this host.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Each site has its lock and journal in a directory below.
    pub run_root: PathBuf,
    /// Where the maps, programs and links are.
    pub pins: Pins,
}

impl Paths {
    /// The standard paths of `site`.
    pub fn of(site: &str) -> Self {
        Self { run_root: RUN_ROOT.into(), pins: Pins::of(site) }
    }
}

/// A site that this process brings up and keeps running.
pub struct Site {
    /// The configuration as it was last read.
    pub config: Config,
    /// The text of `config`, which names its key files. Empty: not known.
    pub text: String,
    /// The plan for `config`. Tunnels and peers have the slots that they have in the maps.
    pub plan: Plan,
    /// The site's links. Empty until the site is up.
    pub links: HostLinks,
    /// How every change made so far is undone.
    pub journal: Journal,
    /// Where its files and pins are.
    pub paths: Paths,
}

impl Site {
    /// Saves what the configuration of this process says. The next process compares with it, and so finds what was
    /// changed by other means, for example by `ecmpvpn policy`.
    pub fn leave_applied(&self) {
        let path = RunDir::applied_path(&self.paths.run_root, &self.config.site.name);
        if let Err(error) = Applied::of(&self.plan.table).write(&path) {
            tracing::warn!("writing {}: {error}; the next `ecmpvpn run` sets policies as configured", path.display());
        }
    }
}
