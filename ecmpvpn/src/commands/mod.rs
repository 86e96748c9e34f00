//! The subcommands: one file or folder each, all thin.

pub mod check;
pub mod confirm;
pub mod down;
pub mod explain;
mod failure;
pub mod init;
mod output;
pub mod plan;
pub mod policy;
pub mod reload;
pub mod rotate;
pub mod run;
pub mod stats;

pub use failure::Failure;
pub use output::{count_of, load, print};

use crate::cli::{Cli, Command, DownArgs, ReloadArgs};

/// Runs the subcommand.
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
