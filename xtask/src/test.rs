//! `cargo xtask test`: runs every test, on the running kernel, in the simulation and in emulated machines, and counts
//! them.

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::count::{Counts, Watcher};
use crate::setup;
use crate::sh::{self, Cmd};
use crate::suites::{Ran, Stage, Suite, binary, build_suites, cargo, run_side_by_side};
use crate::tier::Tier;
use crate::vm::kernel::{self, Series};
use crate::vm::run::{Sink, to_stdout};
use crate::{build_ebpf, fuzz, lint, machines};

/// How many suites run at a time on the running kernel. They wait most of the time, and their sites have different
/// names.
const TOGETHER: usize = 3;

/// Stages that can be run alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// rustfmt, clippy, cargo-deny.
    Lint,
    /// Unit and property tests; they need no privilege.
    Unit,
    /// Each fuzz target for ten seconds.
    Fuzz,
    /// The integration suites on the running kernel, as root.
    Suites,
    /// The integration suites in simulated time, with kernel WireGuard and a real bond.
    Sim,
    /// The integration suites in emulated machines with Debian's own kernels.
    Vm,
}

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run only these stages
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Run only these suites
    #[arg(long, value_name = "NAME")]
    suite: Vec<String>,
    /// Use only these kernels in the simulation and in emulated machines
    #[arg(long, value_enum)]
    kernel: Vec<Series>,
    /// Passed to every test runner: part of a test's name, or options
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<String>,
}

impl Args {
    fn runs(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn runs_suite(&self, name: &str) -> bool {
        self.suite.is_empty() || self.suite.iter().any(|suite| suite == name)
    }

    fn runs_kernel(&self, series: Series) -> bool {
        self.kernel.is_empty() || self.kernel.contains(&series)
    }
}

/// The stages that have run so far.
#[derive(Default)]
struct Tally {
    stages: Vec<(String, Counts, Duration)>,
}

impl Tally {
    /// Runs a stage. A stage that cannot be carried out counts as a failure, and the next ones still run.
    fn stage(&mut self, name: impl Into<String>, work: impl FnOnce() -> Result<Counts>) -> bool {
        let name = name.into();
        let since = Instant::now();
        eprintln!("==> {name}");
        let result = work();
        self.add((name, result, since.elapsed()))
    }

    /// Adds a stage that has been run.
    fn add(&mut self, (name, result, took): Stage) -> bool {
        let counts = result.unwrap_or_else(|error| {
            let failures = format!("error: {name}: {error:#}\n");
            eprint!("{failures}");
            Counts { failures, ..Counts::FAILURE }
        });
        let passed = counts.failed == 0;
        self.stages.push((name, counts, took));
        passed
    }

    /// Runs stages that add their own results. If `work` fails, that counts as a failure called `name`.
    fn group(&mut self, name: &str, work: impl FnOnce(&mut Self) -> Result<()>) {
        let since = Instant::now();
        let result = work(self);
        if result.is_err() {
            self.add((name.to_owned(), result.map(|()| Counts::default()), since.elapsed()));
        }
    }

    /// Prints why tests failed, one line for each stage, and the sum; returns the exit status.
    fn finish(self) -> i32 {
        let width = self.stages.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
        for (name, counts, _) in self.stages.iter().filter(|(_, counts, _)| counts.failed > 0) {
            println!("\n==> {name}: what failed\n{}", counts.failures.trim());
        }
        println!();
        let mut sum = Counts::default();
        for (name, counts, took) in self.stages {
            println!("{name:width$}  {:7.1} s  {counts}", took.as_secs_f64());
            sum += counts;
        }
        println!("{sum}");
        i32::from(sum.failed > 0 || sum.passed == 0)
    }
}

/// `cargo xtask test`; returns the exit status.
pub fn main(args: &Args) -> i32 {
    let mut tally = Tally::default();
    let mut parts = vec![setup::Part::Build, setup::Part::Ebpf];
    let has_suites = [Part::Suites, Part::Sim, Part::Vm].into_iter().any(|part| args.runs(part));
    parts.extend(has_suites.then_some(setup::Part::Lab));
    parts.extend(args.runs(Part::Sim).then_some(setup::Part::Sim));
    parts.extend(args.runs(Part::Vm).then_some(setup::Part::Vm));
    parts.extend(args.runs(Part::Lint).then_some(setup::Part::Lint));
    parts.extend(args.runs(Part::Fuzz).then_some(setup::Part::Fuzz));
    let mut suites = Vec::new();
    let built = tally.stage("setup", || setup::ensure(&parts).map(|()| Counts::default()))
        && tally.stage("build", || {
            build_ebpf::build_ebpf(None)?;
            cargo().arg("build").run()?;
            if has_suites {
                suites = build_suites()?;
            }
            Ok(Counts::default())
        });
    if !built {
        return tally.finish();
    }
    suites.retain(|suite| args.runs_suite(&suite.name));

    if args.runs(Part::Lint) {
        tally.stage("lint", || Ok(lint::run()));
    }
    if args.runs(Part::Unit) {
        tally.stage("unit tests", || unit(args));
    }
    if args.runs(Part::Fuzz) && args.filter.is_empty() {
        tally.stage("fuzz", || {
            let status = fuzz::main(&fuzz::Args::all(10))?;
            Ok(if status == 0 { Counts { passed: 1, ..Counts::default() } } else { Counts::FAILURE })
        });
    }
    if args.runs(Part::Suites) {
        tally.group("suites on the running kernel", |tally| {
            let here = Tier::Here.suites(&suites, &args.filter)?;
            run_side_by_side(here, TOGETHER, |suite| run_here(suite, args), &mut |stage| {
                tally.add(stage);
            })
        });
    }
    let series =
        |part| kernel::ALL.into_iter().filter(|one| args.runs(part) && args.runs_kernel(*one)).collect::<Vec<_>>();
    let (simulated, emulated) = (series(Part::Sim), series(Part::Vm));
    let selection = machines::Selection {
        suites: &suites,
        simulated: &simulated,
        faults: args.suite.is_empty() && args.filter.is_empty(),
        kernels: &emulated,
        filter: &args.filter,
    };
    tally.group("simulation and emulated machines", |tally| {
        machines::run(selection, &mut |stage| {
            tally.add(stage);
        })
    });
    tally.finish()
}

fn unit(args: &Args) -> Result<Counts> {
    let mut counts = watched(cargo().args(["test", "--lib", "--bins", "--no-fail-fast", "--"]).args(&args.filter))?;
    // The packages with a library, except the labs.
    counts +=
        watched(cargo().args(["test", "--doc", "-p", "ecmpvpn", "-p", "ecmpvpn-common", "--"]).args(&args.filter))?;
    Ok(counts)
}

fn run_here(suite: &Suite, args: &Args) -> Ran {
    // `env` because sudo does not keep the environment.
    let program = Cmd::root("env").args([Tier::Here.env(), format!("ECMPVPN_BIN={}", binary().display())]);
    let program = program.arg(&suite.program).args(&args.filter).dir(&sh::root().join("tests"));
    Ran::of(format!("{} here", suite.name), |sink| pass_output(program, sink))
}

/// Runs a test runner, passes its output on and counts its tests.
fn watched(runner: Cmd) -> Result<Counts> {
    let mut watcher = Watcher::default();
    let status = pass_output(runner, &mut |bytes| {
        watcher.feed(bytes);
        to_stdout(bytes)
    })?;
    Ok(watcher.finish(status == 0))
}

/// Runs a test runner and passes its output to `sink`; returns the exit status.
fn pass_output(runner: Cmd, sink: &mut Sink<'_>) -> Result<i32> {
    let line = runner.line();
    let mut child = runner
        .into_inner()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{line}`"))?;
    let mut output = child.stdout.take().context("the runner has no output")?;
    let mut buffer = [0; 1 << 14];
    loop {
        let length = output.read(&mut buffer).with_context(|| format!("reading from `{line}`"))?;
        if length == 0 {
            break;
        }
        sink(&buffer[..length])?;
    }
    let status = child.wait().with_context(|| format!("waiting for `{line}`"))?;
    Ok(status.code().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_stage_that_cannot_run_fails_and_nothing_run_is_no_success() {
        let mut tally = Tally::default();
        assert!(!tally.stage("broken", || bail!("no")));
        assert_eq!(tally.finish(), 1);
        let mut tally = Tally::default();
        assert!(tally.stage("empty", || Ok(Counts::default())));
        assert_eq!(tally.finish(), 1);
        let mut tally = Tally::default();
        assert!(tally.stage("fine", || Ok(Counts { passed: 1, ..Counts::default() })));
        assert_eq!(tally.finish(), 0);
    }
}
