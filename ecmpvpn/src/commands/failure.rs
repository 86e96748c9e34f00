//! How a command fails: the message for the user, and the exit status.

use std::io::{self, Write as _};

use crate::config::{ConfigError, EditError};
use crate::control::resolve::NameError;
use crate::control::site::SessionError;
use crate::dataplane::DataplaneError;
use crate::exit::Exit;
use crate::host::HostError;
use crate::live::policy::PolicyError;
use crate::live::stats::StatsError;
use crate::plan::init::InitError;

/// Why a command failed. The text is one chain, from the operation to the cause. A text of several lines is a list of
/// problems.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    /// The message for the user.
    pub error: anyhow::Error,
}

impl Failure {
    /// The command line or the configuration is wrong.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Usage, error: error.into() }
    }

    /// The host lacks a privilege, a kernel feature or a tool.
    pub fn host(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Host, error: error.into() }
    }

    /// `check` found problems.
    pub fn problems(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Problems, error: error.into() }
    }

    /// Prints the failure to standard error. Each line starts with `ecmpvpn:`.
    pub fn print(&self) {
        let text = format!("{:#}", self.error);
        for line in text.lines() {
            // If standard error is closed, nobody can read the message.
            let _ = writeln!(io::stderr(), "ecmpvpn: {line}");
        }
    }
}

/// A failure at run time.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { exit: Exit::Failed, error }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error)
    }
}

impl From<NameError> for Failure {
    fn from(error: NameError) -> Self {
        anyhow::Error::new(error).into()
    }
}

impl From<StatsError> for Failure {
    fn from(error: StatsError) -> Self {
        match error {
            StatsError::Dataplane(error) if error.is_host_lacking() => Self::host(error),
            error => anyhow::Error::new(error).into(),
        }
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        SessionError::from(error).into()
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        if error.is_lack() { Self::host(error) } else { anyhow::Error::new(error).into() }
    }
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Self {
        match error {
            error if error.is_usage() => Self::usage(error),
            PolicyError::Dataplane(error) => error.into(),
            error => anyhow::Error::new(error).into(),
        }
    }
}

impl From<DataplaneError> for Failure {
    fn from(error: DataplaneError) -> Self {
        if error.is_host_lacking() { Self::host(error) } else { anyhow::Error::new(error).into() }
    }
}

impl From<EditError> for Failure {
    fn from(error: EditError) -> Self {
        anyhow::Error::new(error).into()
    }
}

impl From<InitError> for Failure {
    fn from(error: InitError) -> Self {
        Self::usage(error)
    }
}
