//! Parses the command line, dispatches, prints errors, sets the exit code.
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use std::env;
use std::io;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use ecmpvpn::cli::Cli;
use ecmpvpn::commands::{self, Failure};
use ecmpvpn::exit::Exit;
use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter. It overrides `-v`.
const LOG_VARIABLE: &str = "ECMPVPN_LOG";

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            failure.print();
            failure.exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    start_logging(cli.verbose)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.context("starting the runtime")?.block_on(commands::dispatch(cli))
}

fn start_logging(verbose: u8) -> Result<(), Failure> {
    let directives = match (env::var(LOG_VARIABLE), verbose) {
        (Ok(directives), _) => directives,
        (Err(_), 0) => "warn,ecmpvpn=info".to_owned(),
        (Err(_), 1) => "info,ecmpvpn=debug".to_owned(),
        (Err(_), _) => "debug,ecmpvpn=trace".to_owned(),
    };
    let filter = EnvFilter::try_new(&directives)
        .with_context(|| format!("{LOG_VARIABLE} is {directives:?}: give a list such as warn,ecmpvpn=debug"))
        .map_err(Failure::usage)?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        // A log line that cannot be written must not end the process: the tunnels stay up.
        .log_internal_errors(false)
        .init();
    Ok(())
}
