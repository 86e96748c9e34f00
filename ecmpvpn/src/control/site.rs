//! The site that a process runs, and what can fail about it.

use std::io;
use std::path::PathBuf;

use crate::config::Config;
use crate::dataplane::{DataplaneError, Pins};
use crate::host::journal::JournalError;
use crate::host::run_dir::{RunDir, StateError};
use crate::host::{HostError, HostLinks, Journal, RUN_ROOT, UndoErrors};
use crate::live::policy::PolicyError;
use crate::live::policy::keep::Applied;
use crate::plan::Plan;

/// A site cannot be brought up, kept or taken down.
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

/// Where one site's files and pins are on this host.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Below it each site has its lock and journal.
    pub run_root: PathBuf,
    /// Where the maps, programs and links are.
    pub pins: Pins,
}

impl Paths {
    /// Where `site` is on every host.
    pub fn of(site: &str) -> Self {
        Self { run_root: RUN_ROOT.into(), pins: Pins::of(site) }
    }
}

/// A site that this process brings up and keeps.
pub struct Site {
    /// As it was last read.
    pub config: Config,
    /// What `config` asks for, in the slots that the maps have.
    pub plan: Plan,
    /// Its links; none until it is up.
    pub links: HostLinks,
    /// How everything that was made is undone.
    pub journal: Journal,
    /// Where its files and pins are.
    pub paths: Paths,
}

impl Site {
    /// Lets the next process know what this one's configuration said, so that it can tell what was changed beside it.
    pub fn leave_applied(&self) {
        let path = RunDir::applied_path(&self.paths.run_root, &self.config.site.name);
        if let Err(error) = Applied::of(&self.plan.table).write(&path) {
            tracing::warn!("writing {}: {error}; the next `ecmpvpn run` sets policies as configured", path.display());
        }
    }
}
