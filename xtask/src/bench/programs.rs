//! What all measurements share: the place, the programs, the time limit.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result};

use super::results::{self, Results};
use crate::build_ebpf;
use crate::setup::{self, Part};
use crate::sh::{self, Cmd};
use crate::vm::kernel::Series;

/// Time limit of a measurement in the simulation or in an emulated machine.
pub const LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Where to measure, if not in the simulation.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Place {
    /// Run in an emulated machine with a kernel of this series, not in the simulation
    #[arg(long, value_enum)]
    pub kernel: Option<Series>,
    /// Run on the running kernel, with the features that it has
    #[arg(long, conflicts_with = "kernel")]
    pub here: bool,
}

/// Measurements use the release build, which users install. Tests use the debug build.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    Dev,
    Release,
}

/// Builds `programs`: the measured one, and those that measure.
pub fn build(needed: &[Part], profile: Profile, programs: &[&str]) -> Result<()> {
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

pub fn built(name: &str, profile: Profile) -> PathBuf {
    let directory = if profile == Profile::Release { "release" } else { "debug" };
    sh::target().join(directory).join(name)
}

/// Copies of programs. A later build does not change them. They are deleted when this value is dropped.
pub struct Kept(tempfile::TempDir);

impl Kept {
    pub fn of(programs: &[&Path]) -> Result<Self> {
        let dir = results::dir()?;
        let kept = tempfile::Builder::new().prefix("programs-").tempdir_in(&dir)?;
        for program in programs {
            let name = program.file_name().context("a program has a name")?;
            std::fs::copy(program, kept.path().join(name)).with_context(|| format!("copying {}", program.display()))?;
        }
        Ok(Self(kept))
    }

    /// A program's path, for a command line.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

/// Passes on what a measuring program prints until it ends; returns its exit status.
pub fn finish(child: &mut Child, results: &mut Results) -> Result<i32> {
    let mut output = child.stdout.take().context("it has no output")?;
    let mut buffer = [0; 1 << 14];
    while let length @ 1.. = output.read(&mut buffer)? {
        results.feed(&buffer[..length])?;
    }
    Ok(child.wait()?.code().unwrap_or(1))
}
