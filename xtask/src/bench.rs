//! `cargo xtask bench`: measurements, as tables on stdout and as JSON below `target/bench`.

mod long;
mod programs;
mod results;
mod simulated;

use std::io;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::setup::Part;
use crate::sh::Cmd;
use crate::vm;
use crate::vm::run::Request;
use long::Long;
use programs::{Kept, LIMIT, Place, Profile, build, built, finish};
use results::Results;
use simulated::Bench;

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Planning, and the steering program compared with one that only redirects; on the running kernel
    Micro {
        /// Passed to the measuring program: --rounds N, --plans N…; -- --help shows them all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    #[command(flatten)]
    Long(Long),
    /// Goodput of one tunnel, of kernel ECMP and of ecmpvpn, compared
    Goodput {
        #[command(flatten)]
        place: Place,
        /// Passed to the measuring program: --case NAME, --runs N, --seed N, --rate MBIT…; -- --help shows them all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// One flow of TCP, QUIC, RTP-like UDP and WireGuard inside, compared with one tunnel; in simulated time
    Transport {
        /// Simulations side by side, before all other options [default: as many as there are CPUs]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
        jobs: Option<u16>,
        /// Passed to the measuring program: --profile NAME, --transport NAME, --seeds A..B…; -- --help shows them all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

/// `cargo xtask bench`; returns the exit status.
pub fn main(args: Args) -> Result<i32> {
    match args.what {
        What::Micro { options } => {
            build(&[], Profile::Release, &["ecmpvpn-micro"])?;
            here(
                Cmd::root(built("ecmpvpn-micro", Profile::Release)).args(&options),
                &mut Results::new("micro", &options)?,
            )
        }
        What::Long(what) => long::run(what),
        What::Goodput { place, options } => goodput(place, options),
        What::Transport { jobs, options } => transport(jobs, &options),
    }
}

/// Runs a measuring program on this machine; returns its exit status.
fn here(program: Cmd, results: &mut Results) -> Result<i32> {
    let line = program.line();
    let mut child =
        program.into_inner().stdout(Stdio::piped()).spawn().with_context(|| format!("starting `{line}`"))?;
    finish(&mut child, results).with_context(|| format!("reading from `{line}`"))
}

fn transport(jobs: Option<u16>, options: &[String]) -> Result<i32> {
    const NAME: &str = "ecmpvpn-transport";
    build(&[Part::Lab, Part::Sim], Profile::Release, &["ecmpvpn", NAME])?;
    let programs = Kept::of(&[&built("ecmpvpn", Profile::Release), &built(NAME, Profile::Release)])?;
    simulated::measure(
        &Bench { programs: &programs, name: NAME, options },
        jobs,
        &mut Results::new("transport", options)?,
    )
}

fn goodput(place: Place, options: Vec<String>) -> Result<i32> {
    let machine = match place {
        Place { here: true, .. } => None,
        Place { kernel: Some(_), .. } => Some(Part::Vm),
        Place { .. } => Some(Part::Sim),
    };
    let needed: Vec<Part> = std::iter::once(Part::Lab).chain(machine).collect();
    build(&needed, Profile::Release, &["ecmpvpn", "ecmpvpn-bench"])?;
    let (program, bench) = (built("ecmpvpn", Profile::Release), built("ecmpvpn-bench", Profile::Release));
    let mut results = Results::new("goodput", &options)?;
    if place.here {
        return here(Cmd::root(bench).arg("--ecmpvpn").arg(program).args(&options), &mut results);
    }
    let Some(series) = place.kernel else {
        let programs = Kept::of(&[&program, &bench])?;
        let bench = Bench { programs: &programs, name: "ecmpvpn-bench", options: &options };
        return simulated::measure(&bench, None, &mut results);
    };
    let inside = |name: &str| PathBuf::from("/usr/local/bin").join(name);
    let words = ["ecmpvpn-bench", "--ecmpvpn", "/usr/local/bin/ecmpvpn"].map(str::to_owned);
    let request = Request {
        series,
        cpus: 2,
        memory_mib: 2048,
        timeout: LIMIT,
        copies: vec![(program, inside("ecmpvpn")), (bench, inside("ecmpvpn-bench"))],
        env: Vec::new(),
        command: words.into_iter().chain(options).collect(),
    };
    vm::run(&request, None, &mut |bytes| results.feed(bytes).map_err(io::Error::other))
}
