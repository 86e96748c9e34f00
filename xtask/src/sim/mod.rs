//! The simulation: User-Mode Linux. The kernel, WireGuard, the bond and the programs are real; time is simulated. The
//! CPU's work takes no time there, so links are the only limit. Random numbers come from a seed, so a run repeats to
//! the digit.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

mod fault;
pub mod kernel;
pub mod run;

use crate::setup::{self, Part};
use crate::tier::Tier;
use crate::vm::kernel::Series;
use crate::vm::run::{Sink, to_stdout};
use run::{Clock, Request};

/// Arguments of `cargo xtask sim`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Use real time: the CPU's work takes time, and waiting takes time
    #[arg(long)]
    real: bool,
    /// Seed of the random numbers: the same seed gives the same run
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with = "real")]
    seed: u64,
    /// Kernel series
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Series,
    /// Memory, in MiB; it also holds the files that are written there
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    memory: u32,
    /// Time limit of the command, in seconds of this machine's time
    #[arg(long, default_value_t = 3600, value_name = "S")]
    timeout: u64,
    /// Set a variable for the command
    #[arg(long = "env", value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Build and run an integration suite; its options follow `--`, such as part of a test's name
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// The command to run; without it and without --suite, an interactive shell in real time
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Random faults by seed under numbered traffic, and checks of what must hold
    #[command(after_help = "Examples:\n  \
        cargo xtask sim fault --seed 7 --minutes 120\n  \
        cargo xtask sim fault --seeds 1..20\n  \
        cargo xtask sim fault --self-test\n\n\
        Exit status: 0 all invariants held, 1 one broke, 2 the test could not be run")]
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
        let suite = crate::suites::suite(name)?;
        let tier = if args.real { Tier::Here } else { Tier::simulated(args.kernel) };
        env.extend(suite_env(args.kernel, tier.or_where_named(&suite, &command)?));
        command.insert(0, suite.program.display().to_string());
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

/// A suite's environment: its tier, the features that must exist, and the path of the program. systemd is this machine's.
pub fn suite_env(series: Series, tier: Tier) -> Vec<String> {
    let features = format!("ECMPVPN_REQUIRE={},systemd", series.features());
    vec![tier.env(), features, format!("ECMPVPN_BIN={}", crate::suites::binary().display())]
}

/// Runs `request` and passes the command's output to `sink` as it arrives; returns the command's exit status.
pub fn run(request: &Request, sink: &mut Sink<'_>) -> Result<i32> {
    let linux = kernel::get(request.series)?;
    run::run(request, &linux, &dir(request.series), sink)
}

fn dir(series: Series) -> PathBuf {
    crate::sh::target().join("sim").join(series.name())
}
