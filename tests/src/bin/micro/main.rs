//! Measures the cost of planning and of the steering program, without a network. `cargo xtask bench micro` builds and
//! starts this program.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod output;
mod planning;
mod steering;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

/// Measures planning, and the steering program by test runs of the kernel.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Random endpoint pairs to plan for
    #[arg(long, default_value_t = 4000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    plans: u32,
    /// Rounds of test runs; each runs every variant
    #[arg(long, default_value_t = 11, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Packets for each variant and round; with fewer packets than flows, the result is mostly the cost of memory that
    /// is not in the cache
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    packets: u32,
    /// Measure only variants whose description contains this text, for example "adaptive, 2", and the programs that
    /// only redirect
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// The eBPF object of another build, such as target/ebpf/ecmpvpn.o of an earlier commit: both run in each round,
    /// and the ratio of their times is shown
    #[arg(long, value_name = "OBJECT")]
    against: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match measure(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures everything. Returns whether planning was as fast as it must be.
fn measure(arguments: &Arguments) -> Result<bool> {
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let other = arguments.against.as_ref().map(read).transpose()?;
    let in_time = planning::measure(arguments.plans)?;
    steering::measure(arguments.rounds, arguments.packets, &arguments.only, other.as_deref())?;
    Ok(in_time)
}
