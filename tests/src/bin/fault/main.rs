//! Faults by seed: two sites over a bond of three links, numbered traffic both ways, and one thing after another that goes
//! wrong. What must hold meanwhile is looked at all the time; the first thing that does not ends the run.
//!
//! `cargo xtask sim fault` builds it and runs it in simulated time, where the same seed gives the same run.

mod act;
mod bounds;
mod clear;
mod defect;
mod draw;
mod edit;
mod exchange;
mod judge;
mod ledger;
mod links;
mod play;
mod ports;
mod random;
mod report;
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
    /// What all that is drawn follows from
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// How long, in minutes
    #[arg(long, default_value_t = 5.0, value_name = "M")]
    minutes: f64,
    /// Break something on purpose, which has to be found
    #[arg(long, value_enum, value_name = "WHAT")]
    defect: Option<Defect>,
    /// Only print the schedule
    #[arg(long)]
    schedule: bool,
    /// Tell every interruption of a flow
    #[arg(long)]
    interruptions: bool,
    /// The program to try; the one beside this program unless given
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
            // Nothing was shown either way.
            ExitCode::from(2)
        }
    }
}

/// Whether all invariants held.
fn tried(arguments: &Arguments) -> Result<bool> {
    ensure!((0.1..=100_000.0).contains(&arguments.minutes), "--minutes is from 0.1 to 100000");
    let length = Duration::from_secs_f64(arguments.minutes * 60.0);
    let schedule = Schedule::new(arguments.seed, length, arguments.defect);
    if arguments.schedule {
        for event in &schedule.events {
            println!("{}", play::told(event));
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
