//! What planning and the steering program cost by themselves, without network. `cargo xtask bench micro` builds and
//! starts it.

mod planning;
mod steering;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::Value;

/// What the JSON line begins with; `cargo xtask bench` collects it.
const JSON: &str = "@json ";

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
    /// Packets a variant and round; with fewer than there are flows, what is measured is mostly memory that was not used
    /// of late
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    packets: u32,
    /// Only the variants whose description contains this, beside the programs that only redirect: "adaptive, 2"
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Another build's object, such as target/ebpf/ecmpvpn.o of an earlier commit: both run in each round, and the ratio
    /// of their times is shown
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

/// Whether planning was as fast as it must be.
fn measure(arguments: &Arguments) -> Result<bool> {
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let other = arguments.against.as_ref().map(read).transpose()?;
    let in_time = planning::measure(arguments.plans)?;
    steering::measure(arguments.rounds, arguments.packets, &arguments.only, other.as_deref())?;
    Ok(in_time)
}

fn print(series: &Value) {
    println!("{JSON}{series}");
}

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
