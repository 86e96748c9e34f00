//! Runs the suites in the simulation and in the emulated machines, as many side by side as this host has CPUs.
//!
//! An emulated machine has one CPU: with one CPU no code can be stale (`vm::death`).

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::count::{Counts, Watcher};
use crate::suites::{Ran, Stage, Suite, binary, run_side_by_side};
use crate::tier::Tier;
use crate::vm::death::Died;
use crate::vm::kernel::{self, Series};
use crate::vm::run::Request;
use crate::vm::{self, Accel};
use crate::{setup, sh, sim};

/// Faults by seed: five simulated minutes, and the check that deliberate defects are found.
const FAULTS: [(&str, &[&str]); 2] =
    [("faults of seed 1", &["--seed", "1", "--minutes", "5"]), ("defects are found", &["--self-test", "--jobs", "1"])];
/// After this time a suite counts as hung. An emulated CPU on a busy machine is slow.
const SUITE_LIMIT: Duration = Duration::from_secs(1800);
/// The seed of the simulation's random numbers. It is fixed, so that a test that fails can be repeated.
const SEED: u64 = 1;
/// How many times at most a suite is run again after its machine died of stale code.
const REPEATS: u32 = 2;

/// A suite and the place where it runs.
#[derive(Clone, Copy)]
enum Job<'a> {
    Simulated(&'a Suite, Series),
    Emulated(&'a Suite, Series),
    /// A name, and the arguments of `cargo xtask sim fault`.
    Faults(&'static str, &'static [&'static str]),
}

/// The suites, kernels and tests to run.
#[derive(Clone, Copy)]
pub struct Selection<'a> {
    /// All suites.
    pub suites: &'a [Suite],
    pub simulated: &'a [Series],
    /// Kernels of the emulated machines.
    pub kernels: &'a [Series],
    /// Whether faults by seed run too.
    pub faults: bool,
    /// Passed to each suite, also when it lists its tests.
    pub filter: &'a [String],
}

/// Runs the selection and passes each result to `stage`, in the order in which the jobs end.
pub fn run(selection: Selection<'_>, stage: &mut dyn FnMut(Stage)) -> Result<()> {
    let (emulated, simulated) = (emulated(selection)?, simulated(selection)?);
    // Before machines run side by side: otherwise several of them would build the same kernel.
    for series in selection.simulated {
        setup::simulation(*series)?;
    }
    for series in selection.kernels {
        vm::prepare(*series)?;
    }
    let accel = selection.kernels.first().map(|first| vm::detect(*first)).transpose()?.unwrap_or(Accel::Tcg);
    let has_faults = selection.faults && selection.simulated.contains(&kernel::ALL[0]);
    let faults = FAULTS.iter().filter(|_| has_faults).map(|(name, words)| Job::Faults(name, words));
    let machines = thread::available_parallelism().map_or(1, usize::from);
    let work = |job: Job<'_>| match job {
        Job::Simulated(suite, series) => simulate(suite, series, selection.filter),
        Job::Faults(name, words) => try_faults(name, words),
        Job::Emulated(suite, series) => emulate(suite, series, accel, selection.filter),
    };
    run_side_by_side(emulated.into_iter().chain(faults).chain(simulated).collect(), machines, work, stage)
}

fn emulated(selection: Selection<'_>) -> Result<Vec<Job<'_>>> {
    if selection.kernels.is_empty() {
        return Ok(Vec::new());
    }
    let suites = Tier::Emulated.suites(selection.suites, selection.filter)?;
    let jobs = |series: &Series| suites.iter().map(|suite| Job::Emulated(suite, *series)).collect::<Vec<_>>();
    Ok(selection.kernels.iter().flat_map(jobs).collect())
}

fn simulated(selection: Selection<'_>) -> Result<Vec<Job<'_>>> {
    let mut found = Vec::new();
    for series in selection.simulated {
        let suites = Tier::simulated(*series).suites(selection.suites, selection.filter)?;
        found.extend(suites.into_iter().map(|suite| (suite, *series)));
    }
    // A long suite begins early on each kernel.
    found.sort_by_key(|(suite, series)| Tier::simulated(*series).order(&suite.name));
    Ok(found.into_iter().map(|(suite, series)| Job::Simulated(suite, series)).collect())
}

/// Runs one suite in the simulation and keeps its output.
fn simulate(suite: &Suite, series: Series, filter: &[String]) -> Ran {
    let name = format!("{} simulated on Linux {}", suite.name, series.name());
    let request = sim::run::Request {
        series,
        clock: sim::run::Clock::Simulated { seed: SEED },
        memory_mib: 2048,
        timeout: SUITE_LIMIT,
        env: sim::suite_env(series, Tier::simulated(series)),
        command: std::iter::once(suite.program.display().to_string()).chain(filter.iter().cloned()).collect(),
    };
    Ran::of(name, |sink| sim::run(&request, sink))
}

/// Runs faults by seed, as a user would.
fn try_faults(name: &str, words: &[&str]) -> Ran {
    eprintln!("==> {name}");
    let since = Instant::now();
    let run = || -> Result<(bool, Vec<u8>)> {
        // The program of this process, even if a build has replaced its file.
        let mut command = Command::new("/proc/self/exe");
        let output =
            command.args(["sim", "fault"]).args(words).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        Ok((output.status.success(), output.stdout))
    };
    let (counts, output) = match run() {
        Ok((true, output)) => (Ok(Counts { passed: 1, ..Counts::default() }), output),
        Ok((false, output)) => {
            let failures = String::from_utf8_lossy(&output).into_owned();
            (Ok(Counts { failures, ..Counts::FAILURE }), output)
        }
        Err(error) => (Err(error.context("starting `xtask sim fault`")), Vec::new()),
    };
    Ran { name: name.to_owned(), counts, took: since.elapsed(), output }
}

/// Runs one suite in an emulated machine and keeps its output.
fn emulate(suite: &Suite, series: Series, accel: Accel, filter: &[String]) -> Ran {
    let name = format!("{} on Linux {}", suite.name, series.name());
    eprintln!("==> {name}");
    let inside = format!("/root/{}", suite.name);
    let env = vec![
        Tier::Emulated.env(),
        format!("ECMPVPN_REQUIRE={}", series.features()),
        "ECMPVPN_BIN=/root/ecmpvpn".to_owned(),
    ];
    let request = Request {
        series,
        cpus: 1,
        memory_mib: 2048,
        timeout: SUITE_LIMIT,
        copies: vec![(suite.program.clone(), PathBuf::from(&inside)), (binary(), PathBuf::from("/root/ecmpvpn"))],
        env,
        command: std::iter::once(inside).chain(filter.iter().cloned()).collect(),
    };
    let since = Instant::now();
    let mut output = Vec::new();
    let counts = again_after_stale_code(&name, accel == Accel::Tcg, || {
        let mut watcher = Watcher::default();
        let status = vm::run(&request, Some(accel), &mut |bytes| {
            watcher.feed(bytes);
            output.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(watcher.finish(status == 0))
    });
    Ran { name, counts, took: since.elapsed(), output }
}

/// Calls `run` again, in a new machine and from the start, if an emulated machine died of stale code. The output of the
/// dead machine does not count, since a test may have failed because its kernel was dying. Every other result is final.
fn again_after_stale_code(name: &str, emulated: bool, mut run: impl FnMut() -> Result<Counts>) -> Result<Counts> {
    for repeat in 1..=REPEATS {
        let result = run();
        match &result {
            Err(error) if emulated && error.downcast_ref::<Died>().is_some_and(|died| died.by_stale_code) => {
                eprintln!("{error:#}");
                sh::note(format!("{name}: THE EMULATOR BROKE THE MACHINE (stale code, see xtask/src/vm/death.rs)"));
                sh::note(format!("{name}: nothing of that run counts; repeat {repeat} of at most {REPEATS}"));
            }
            _ => return result,
        }
    }
    run()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    fn died(by_stale_code: bool) -> Result<Counts> {
        Err(Died { why: "Kernel panic".to_owned(), by_stale_code }.into())
    }

    /// The result, and how many times it ran; `results` has one entry for each run.
    fn outcome(emulated: bool, results: &[fn() -> Result<Counts>]) -> (Result<Counts>, usize) {
        let mut runs = 0;
        let result = again_after_stale_code("suite on Linux 0", emulated, || {
            runs += 1;
            results[runs - 1]()
        });
        (result, runs)
    }

    const PASSED: Counts = Counts { passed: 3, failed: 0, skipped: 0, failures: String::new() };

    #[test]
    fn only_stale_code_in_an_emulated_machine_is_run_again() {
        let (result, runs) = outcome(true, &[|| died(true), || Ok(PASSED)]);
        assert_eq!((result.unwrap(), runs), (PASSED, 2));
        let (result, runs) = outcome(false, &[|| died(true)]);
        assert!(result.is_err() && runs == 1);
        let (result, runs) = outcome(true, &[|| died(false)]);
        assert!(result.is_err() && runs == 1);
        let (result, runs) = outcome(true, &[|| bail!("it took too long")]);
        assert!(result.is_err() && runs == 1);
        let (result, runs) = outcome(true, &[|| Ok(Counts::FAILURE)]);
        assert_eq!((result.unwrap(), runs), (Counts::FAILURE, 1));
    }

    #[test]
    fn it_is_run_again_at_most_twice_and_a_failure_then_counts() {
        let (result, runs) = outcome(true, &[|| died(true), || died(true), || died(true)]);
        assert!(result.is_err() && runs == 3);
        let (result, runs) = outcome(true, &[|| died(true), || died(true), || Ok(Counts::FAILURE)]);
        assert_eq!((result.unwrap(), runs), (Counts::FAILURE, 3));
    }
}
