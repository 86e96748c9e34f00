//! The suites in the virtual machines.
//!
//! Each runs in a machine of one CPU, on which no code can be stale (`vm::death`); so many machines run side by side as
//! this host has CPUs.

use std::path::PathBuf;
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::count::{Counts, Watcher};
use crate::sh;
use crate::test::{Stage, Suite, binary};
use crate::vm::death::Died;
use crate::vm::kernel::{self, Series};
use crate::vm::run::{Request, to_stdout};
use crate::vm::{self, Accel};

/// What the suites leave out: the userspace backend is tested on the running kernel, and emulated ciphers are slow.
const SKIPPED: [&str; 2] = ["--skip", "userspace"];
/// What is left out besides unless a filter is given: what asks more than emulated CPUs can be relied on to give (changes by
/// the second, full links and nothing late), and what takes minutes there and concerns the process and not the kernel. With
/// the userspace backend the running kernel runs most of it; `-- NAME` runs each here.
const BY_NAME: [&str; 13] = [
    "no_packet_is_lost_by_policy_changes",
    "tcp_survives_and_full_tunnels_do_not_die",
    "full_and_lossy_links_are_no_false_alarm",
    "a_tunnel_started_anew_leaves_the_others_alone",
    "killed_and_started_again_nothing_is_forgotten",
    "a_reload_that_cannot_be_changes_nothing",
    "another_layout_is_left_running",
    "systemd_is_told",
    "renewing_that",
    "a_name_is_followed_to_where_the_site_is",
    "live_changes_stay_and_changed_values_are_taken",
    "cycles_leave_nothing_behind",
    "the_management_port_is_not_taken",
];
/// What only the newest kernel runs unless a filter is given, for the time it takes: it concerns the process more than the
/// kernel, or the older one has not carried it on an idle host yet.
const ON_THE_NEWEST: [&str; 7] = [
    "policy_changes_steer_at_once",
    "ctrl_c_leaves_nothing",
    "a_second_run_says_that_one_is_running",
    "dry_run_changes_nothing",
    "a_blackholed_tunnel_is_left_and_taken_again",
    "a_changed_configuration_is_taken_at_the_next_run",
    "keys_are_renewed_without_a_lost_packet",
];
/// When one suite counts as hung. An emulated CPU on a busy machine is slow.
const SUITE_LIMIT: Duration = Duration::from_secs(1800);
/// How often a suite may be run again after its machine died of stale code.
const REPEATS: u32 = 2;

/// A suite that ran on a kernel.
struct Ran {
    name: String,
    counts: Result<Counts>,
    took: Duration,
    output: Vec<u8>,
}

/// Runs `suites` on each kernel and hands what became of them to `stage`, in the order in which they end.
pub fn run(suites: &[&Suite], kernels: &[Series], filter: &[String], stage: &mut dyn FnMut(Stage)) -> Result<()> {
    // Before machines run side by side, which would both want to.
    for series in kernels {
        vm::prepare(*series)?;
    }
    let Some(first) = kernels.first() else { return Ok(()) };
    let accel = vm::detect(*first)?;
    // From the end of the alphabet on, where the longest are: then the machines end at about the same time.
    let jobs: Vec<(&Suite, Series)> =
        kernels.iter().flat_map(|series| suites.iter().rev().map(|suite| (*suite, *series))).collect();
    let jobs = Mutex::new(jobs.into_iter());
    let machines = thread::available_parallelism().map_or(1, usize::from);
    let (sender, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..machines {
            let (sender, jobs) = (sender.clone(), &jobs);
            scope.spawn(move || {
                while let Some((suite, series)) = jobs.lock().ok().and_then(|mut jobs| jobs.next()) {
                    // The receiver stays until all senders are gone.
                    let _ = sender.send(suite_on(suite, series, accel, filter));
                }
            });
        }
        drop(sender);
        for ran in results {
            eprintln!("==> {}: its output", ran.name);
            // As with the other suites, a closed stdout ends the whole test soon enough.
            let _ = to_stdout(&ran.output);
            stage((ran.name, ran.counts, ran.took));
        }
    });
    Ok(())
}

/// Runs one suite and keeps its output.
fn suite_on(suite: &Suite, series: Series, accel: Accel, filter: &[String]) -> Ran {
    let name = format!("{} on Linux {}", suite.name, series.name());
    eprintln!("==> {name}");
    let inside = format!("/root/{}", suite.name);
    let request = Request {
        series,
        cpus: 1,
        memory_mib: 2048,
        timeout: SUITE_LIMIT,
        copies: vec![(suite.program.clone(), PathBuf::from(&inside)), (binary(), PathBuf::from("/root/ecmpvpn"))],
        env: vec![format!("ECMPVPN_REQUIRE={}", series.features()), "ECMPVPN_BIN=/root/ecmpvpn".to_owned()],
        command: std::iter::once(inside)
            .chain(SKIPPED.map(str::to_owned))
            .chain(left_out(series, filter).flat_map(|name| ["--skip".to_owned(), name.to_owned()]))
            .chain(filter.iter().cloned())
            .collect(),
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

/// Tests that are left out on a kernel.
fn left_out(series: Series, filter: &[String]) -> impl Iterator<Item = &'static str> {
    let newest: &[&str] = if series == kernel::ALL[0] { &[] } else { &ON_THE_NEWEST };
    let all = BY_NAME.into_iter().chain(newest.iter().copied());
    all.filter(|_| filter.is_empty()).collect::<Vec<_>>().into_iter()
}

/// Does `run` again, in a new machine and from the start, if an emulated one died of stale code. Whatever the dead one
/// printed counts for nothing: a test may have failed because its kernel was dying. Every other end is final.
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

    /// The result, and how often it ran; `results` for each time.
    fn outcome(emulated: bool, results: &[fn() -> Result<Counts>]) -> (Result<Counts>, usize) {
        let mut runs = 0;
        let result = again_after_stale_code("suite on Linux 0", emulated, || {
            runs += 1;
            results[runs - 1]()
        });
        (result, runs)
    }

    const PASSED: Counts = Counts { passed: 3, failed: 0, skipped: 0 };

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
