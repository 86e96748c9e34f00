//! Random faults from a seed. Two sites are joined by a bond of three links and exchange numbered traffic, while one
//! fault follows another. The program checks its invariants all the time. The first broken invariant ends the run.
//!
//! `cargo xtask sim fault` builds this program and runs it in simulated time, where the same seed gives the same run.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod act;
mod bounds;
mod defect;
mod draw;
mod edit;
mod event;
mod exchange;
mod hostile;
mod judge;
mod ledger;
mod links;
mod play;
mod ports;
mod random;
mod report;
mod sabotage;
mod schedule;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use defect::Defect;
use schedule::Schedule;

/// Random faults under numbered traffic between two sites in network namespaces; the same seed gives the same faults.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Seed of all random numbers
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Length of the run, in minutes
    #[arg(long, default_value_t = 5.0, value_name = "M")]
    minutes: f64,
    /// Break something on purpose; the run must find it
    #[arg(long, value_enum, value_name = "WHAT")]
    defect: Option<Defect>,
    /// Only print the schedule
    #[arg(long)]
    schedule: bool,
    /// Print every interruption of a flow
    #[arg(long)]
    interruptions: bool,
    /// The program under test [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    ecmpvpn: Option<PathBuf>,
}

fn main() -> ExitCode {
    match tried(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            for line in lab::log::last(40) {
                eprintln!("  {line}");
            }
            // The run gave no result.
            ExitCode::from(2)
        }
    }
}

/// Plays the schedule, or prints it. Returns whether all invariants held.
fn tried(arguments: &Arguments) -> Result<bool> {
    ensure!((0.1..=100_000.0).contains(&arguments.minutes), "--minutes is from 0.1 to 100000");
    let length = Duration::from_secs_f64(arguments.minutes * 60.0);
    let schedule = Schedule::new(arguments.seed, length, arguments.defect);
    if arguments.schedule {
        for event in &schedule.events {
            println!("{}", play::describe(event));
        }
        return Ok(true);
    }
    ensure!(rustix::process::geteuid().is_root(), "network namespaces need root: run this with sudo");
    let program = match &arguments.ecmpvpn {
        Some(path) => path.canonicalize().with_context(|| format!("--ecmpvpn {}", path.display()))?,
        None => lab::sites::binary()?,
    };
    let defect = arguments.defect.map_or(String::new(), |defect| {
        format!(" --defect {}", clap::ValueEnum::to_possible_value(&defect).expect("it has one").get_name())
    });
    let again = format!("cargo xtask sim fault --seed {} --minutes {}{defect}", arguments.seed, arguments.minutes);
    play::play(&schedule, &program, &again, arguments.interruptions)
}
