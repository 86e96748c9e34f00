//! One file a subcommand, each thin.

pub mod check;
pub mod confirm;
pub mod down;
pub mod explain;
pub mod init;
pub mod plan;
pub mod policy;
pub mod reload;
pub mod rotate;
pub mod run;
pub mod stats;

use std::fmt::Display;
use std::io::{self, Write as _};
use std::path::Path;

use crate::cli::{Cli, Command, DownArgs, ReloadArgs};
use crate::config::{self, Config, ConfigError};
use crate::control::resolve::{self, NameError};
use crate::control::site::SessionError;
use crate::exit::Exit;
use crate::live::stats::GatherError;

/// Carries out what the command line asks for.
pub async fn dispatch(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Check => check::run(&cli.config),
        Command::Init(args) => init::run(&args),
        Command::Plan(args) => plan::run(&cli.config, &args).await,
        Command::Run(args) => run::run(&cli.config, args).await,
        Command::Reload(ReloadArgs {}) => reload::run(&cli.config).await,
        Command::Rotate(args) => rotate::run(&cli.config, &args).await,
        Command::Confirm(args) => confirm::run(&cli.config, &args).await,
        Command::Down(DownArgs {}) => down::run(&cli.config).await,
        Command::Stats(args) => stats::run(&cli.config, args).await,
        Command::Explain(args) => explain::run(&cli.config, &args).await,
        Command::Policy(args) => policy::run(&cli.config, args).await,
    }
}

/// Why a command did not do what it was asked for. Its text is one chain, from what was being done to the cause; a text
/// of several lines is a list of problems.
#[derive(Debug)]
pub struct Failure {
    /// How the program ends.
    pub exit: Exit,
    /// What the user is told.
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

    /// `check` or `doctor` found problems.
    pub fn problems(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Problems, error: error.into() }
    }

    /// Prints the failure to standard error, each line marked as ours.
    pub fn print(&self) {
        let text = format!("{:#}", self.error);
        for line in text.lines() {
            // There is nobody left to tell when standard error is gone.
            let _ = writeln!(io::stderr(), "ecmpvpn: {line}");
        }
    }
}

/// It failed at run time.
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

/// The configuration at `path`, its remote endpoints resolved.
pub fn load(path: &Path) -> Result<Config, Failure> {
    let mut config = config::load(path)?;
    resolve::resolve(&mut config, None)?;
    Ok(config)
}

impl From<GatherError> for Failure {
    fn from(error: GatherError) -> Self {
        match error {
            GatherError::Dataplane(error) if error.is_host_lacking() => Self::host(error),
            error => anyhow::Error::new(error).into(),
        }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        if error.is_lack() { Self::host(error) } else { anyhow::Error::new(error).into() }
    }
}

/// Writes a result to standard output. A reader that has gone away, such as `head`, has seen all that it wanted.
pub fn print(result: impl Display) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{result}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("writing to standard output").into())
        }
        _ => Ok(()),
    }
}

/// `count` things, in words.
pub(crate) fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
