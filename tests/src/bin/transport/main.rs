//! Measures one flow of several transports over all tunnels, compared with the same flow over one tunnel, in simulated
//! time.
//!
//! `cargo xtask bench transport` builds this program and starts it once for each profile of links and each seed, in a
//! simulation of its own (`--mode list` names these jobs, `--only` runs one), and once more to merge the results (`--mode
//! report`).
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod arguments;
mod beside;
mod job;
mod load;
mod measure;
mod mixed;
mod profile;
mod report;
mod sample;
mod target;
mod transport;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use arguments::{Arguments, Mode};
use clap::Parser as _;
use lab::interrupt;
use lab::sites::binary;
use sample::JSON;
use serde_json::json;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.mode == Mode::Measure && !rustix::process::geteuid().is_root() {
        eprintln!("error: network namespaces need root: run this with sudo");
        return ExitCode::from(3);
    }
    interrupt::catch();
    match act(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupt::requested() => {
            eprintln!("interrupted; everything is taken down");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &Arguments) -> Result<()> {
    match arguments.mode {
        Mode::List => {
            for job in arguments.jobs() {
                println!("{}", json!({ "job": job.to_string(), "seed": job.seed }));
            }
            Ok(())
        }
        Mode::Report => report::merge(std::io::stdin().lock()),
        Mode::Measure => {
            let program = match &arguments.ecmpvpn {
                Some(path) => std::fs::canonicalize(path).with_context(|| format!("--ecmpvpn {}", path.display()))?,
                None => binary()?,
            };
            let jobs = arguments.only.map_or_else(|| arguments.jobs(), |job| vec![job]);
            for job in jobs {
                let measured = measure::measure(arguments, &program, job)?;
                println!("{JSON}{}", measured.json());
            }
            Ok(())
        }
    }
}
