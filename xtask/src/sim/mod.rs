//! The simulation: User-Mode Linux, where the kernel, WireGuard, the bond and the programs are real and time is not.
//! The CPU's work takes no time there, so links are the only limit; and what is drawn at random comes from a seed, so a run
//! repeats to the digit.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

mod fault;
pub mod kernel;
pub mod run;

use crate::setup::{self, Part};
use crate::vm::kernel::Series;
use crate::vm::run::{Sink, to_stdout};
use run::{Clock, Request};

/// Arguments of `cargo xtask sim`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Let time pass as it does outside: the CPU's work takes time, and idle moments are waited for
    #[arg(long)]
    real: bool,
    /// What is drawn at random follows from this number: the same one gives the same run
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with = "real")]
    seed: u64,
    /// Kernel series
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Series,
    /// Memory, in MiB; what is written there lives in it too
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    memory: u32,
    /// Seconds, of this machine's time, that the command may take
    #[arg(long, default_value_t = 3600, value_name = "S")]
    timeout: u64,
    /// Set a variable for the command
    #[arg(long = "env", value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Build and run an integration suite; what follows `--` are its options, such as part of a test's name
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// What to run; without it and without --suite, an interactive shell in real time
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Random faults by seed under numbered traffic, and what must hold meanwhile
    #[command(after_help = "Examples:\n  \
        cargo xtask sim fault --seed 7 --minutes 120\n  \
        cargo xtask sim fault --seeds 1..20\n  \
        cargo xtask sim fault --self-test\n\n\
        Exit status: 0 all held, 1 something broke, 2 it could not be tried")]
    Fault(fault::Args),
}

/// `cargo xtask sim`; returns the command's exit status.
pub fn main(args: Args) -> Result<i32> {
    if let Some(What::Fault(args)) = &args.what {
        return fault::main(args);
    }
    setup::ensure(&[Part::Lab, Part::Sim])?;
    setup::simulation(args.kernel)?;
    let (mut env, mut command) = (args.env, args.command);
    if let Some(name) = &args.suite {
        setup::ensure(&[Part::Build, Part::Ebpf])?;
        crate::build_ebpf::build_ebpf(None)?;
        let program = crate::suites::suite(name)?;
        command.insert(0, program.display().to_string());
        env.extend(suite_env(args.kernel));
    }
    let clock = if args.real || command.is_empty() { Clock::Real } else { Clock::Simulated { seed: args.seed } };
    let request = Request {
        series: args.kernel,
        clock,
        memory_mib: args.memory,
        timeout: Duration::from_secs(args.timeout),
        env,
        command,
    };
    run(&request, &mut to_stdout)
}

/// What a suite is told: what it may rely on, and where the program is.
pub fn suite_env(series: Series) -> Vec<String> {
    vec![format!("ECMPVPN_REQUIRE={}", series.features()), format!("ECMPVPN_BIN={}", crate::suites::binary().display())]
}

/// Runs `request`, handing the command's output to `sink` as it comes; returns the command's exit status.
pub fn run(request: &Request, sink: &mut Sink<'_>) -> Result<i32> {
    let linux = kernel::get(request.series)?;
    run::run(request, &linux, &dir(request.series), sink)
}

fn dir(series: Series) -> PathBuf {
    crate::sh::target().join("sim").join(series.name())
}
