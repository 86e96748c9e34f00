//! The subcommands: one file or folder each, all thin.

pub mod check;
pub mod confirm;
pub mod down;
pub mod explain;
mod failure;
pub mod init;
mod known;
mod output;
pub mod plan;
pub mod policy;
pub mod reload;
pub mod rotate;
pub mod run;
pub mod stats;

pub use failure::Failure;
pub use known::{Invocation, Known};
pub use output::{count_of, load, print, warn};

use crate::cli::{Cli, Command};
use crate::host;

/// Checks the privilege that a command needs, before anything is read: otherwise the first file that this user may not
/// read would be reported instead.
fn require_privilege(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Check | Command::Init(_) | Command::Plan(_) => {}
        Command::Rotate(args) if args.prepare || args.status => {}
        Command::Stats(_) | Command::Explain(_) | Command::Policy(_) => host::require_maps()?,
        Command::Run(_) | Command::Reload(_) | Command::Rotate(_) | Command::Confirm(_) | Command::Down(_) => {
            host::require_privilege()?;
        }
    }
    Ok(())
}

/// Checks the privilege that the subcommand needs. If it is `run`, gives up every other privilege. Call it before there
/// is another thread.
///
/// # Errors
/// A privilege is missing, or the configuration of `run` cannot be used.
pub fn confine(cli: &Cli) -> Result<(), Failure> {
    require_privilege(&cli.command)?;
    match &cli.command {
        Command::Run(args) if !args.dry_run => run::confine(&cli.config),
        _ => Ok(()),
    }
}

/// Runs the subcommand. Call [`confine`] before.
pub async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let file = cli.config.as_path();
    match cli.command {
        Command::Check => check::run(file).await,
        Command::Init(args) => init::run(&args),
        Command::Plan(args) => plan::run(file, &args).await,
        Command::Run(args) => run::run(file, args).await,
        Command::Reload(args) => reload::run(Invocation::new(file, &args.site), &args).await,
        Command::Rotate(args) => rotate::run(file, &args).await,
        Command::Confirm(args) => confirm::run(Invocation::new(file, &args.site), &args).await,
        Command::Down(args) => down::run(Invocation::new(file, &args.site)).await,
        Command::Stats(args) => stats::run(Invocation::new(file, &args.site), &args).await,
        Command::Explain(args) => explain::run(Invocation::new(file, &args.site), &args).await,
        Command::Policy(args) => {
            policy::run(Invocation { file, name: args.site.as_deref(), is_batch: false }, args.action).await
        }
    }
}
