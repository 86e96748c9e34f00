//! `cargo xtask bench`: measurements, as tables on stdout and as JSON below `target/bench`.

mod long;
mod results;
mod simulated;

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::setup::{self, Part};
use crate::sh::{self, Cmd};
use crate::vm::kernel::Series;
use crate::vm::run::Request;
use crate::{build_ebpf, vm};
use long::Long;
use results::Results;

/// How long measuring may take in the simulation, or in an emulated machine.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

/// Where something is measured, if not in the simulation.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Place {
    /// In an emulated machine with a kernel of this series, not in the simulation
    #[arg(long, value_enum)]
    kernel: Option<Series>,
    /// On the running kernel, with what it has
    #[arg(long, conflicts_with = "kernel")]
    here: bool,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Planning, and the steering program beside one that only redirects; on the running kernel
    Micro {
        /// Passed to the measuring program: --rounds N, --plans N…; -- --help shows them all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    #[command(flatten)]
    Long(Long),
    /// Traffic over one tunnel, over kernel ECMP and by ecmpvpn, side by side
    Goodput {
        #[command(flatten)]
        place: Place,
        /// Passed to the measuring program: --case NAME, --runs N, --seed N, --rate MBIT…; -- --help shows them all
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
    }
}

/// What is measured is what is installed; tests run with what they are built with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Profile {
    Dev,
    Release,
}

/// Builds these programs: what is measured, and what measures.
fn build(needed: &[Part], profile: Profile, programs: &[&str]) -> Result<()> {
    setup::ensure(&[&[Part::Build, Part::Ebpf], needed].concat())?;
    build_ebpf::build_ebpf(None)?;
    let step = sh::step("building ecmpvpn and the measuring programs (a few minutes the first time)");
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "-p", "ecmpvpn", "-p", "ecmpvpn-tests"])
        .args(programs.iter().flat_map(|program| ["--bin", program]))
        .args((profile == Profile::Release).then_some("--release"))
        .dir(&sh::root())
        .run()?;
    step.done("");
    Ok(())
}

fn built(name: &str, profile: Profile) -> PathBuf {
    let directory = if profile == Profile::Release { "release" } else { "debug" };
    sh::target().join(directory).join(name)
}

/// Copies of programs, which stay what they are while the next ones are built. They go with this value.
struct Kept(tempfile::TempDir);

impl Kept {
    fn of(programs: &[&Path]) -> Result<Self> {
        let dir = results::dir()?;
        let kept = tempfile::Builder::new().prefix("programs-").tempdir_in(&dir)?;
        for program in programs {
            let name = program.file_name().context("a program has a name")?;
            std::fs::copy(program, kept.path().join(name)).with_context(|| format!("copying {}", program.display()))?;
        }
        Ok(Self(kept))
    }

    /// A program's words for a command line.
    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

/// Runs a measuring program on this machine; its exit status.
fn here(program: Cmd, results: &mut Results) -> Result<i32> {
    let line = program.line();
    let mut child =
        program.into_inner().stdout(Stdio::piped()).spawn().with_context(|| format!("starting `{line}`"))?;
    finish(&mut child, results).with_context(|| format!("reading from `{line}`"))
}

/// Passes on what a measuring program prints until it ends; its exit status.
fn finish(child: &mut Child, results: &mut Results) -> Result<i32> {
    let mut output = child.stdout.take().context("it has no output")?;
    let mut buffer = [0; 1 << 14];
    while let length @ 1.. = output.read(&mut buffer)? {
        results.feed(&buffer[..length])?;
    }
    Ok(child.wait()?.code().unwrap_or(1))
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
        return simulated::goodput(&Kept::of(&[&program, &bench])?, &options, &mut results);
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
