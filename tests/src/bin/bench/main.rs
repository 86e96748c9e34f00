//! Measures the goodput of ecmpvpn, compared with one tunnel and with the kernel's ECMP, between two sites on this
//! machine.
//!
//! Each repetition measures every method, and ratios are taken within a repetition, so that differences between
//! repetitions do not matter. `cargo xtask bench goodput` builds and starts this program. In simulated time it is
//! started once for each repetition (`--mode list` names these jobs, `--only` runs one), and once more to merge the
//! results (`--mode report`).
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod arguments;
mod bulk;
mod cases;
mod changes;
mod draw;
mod reorder;
mod report;
mod series;
mod short;
mod target;

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use arguments::{Arguments, Case, Job, Mode};
use clap::Parser as _;
use lab::interrupt;
use lab::sites::binary;
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
    ensure!(arguments.rate() > 0.0, "--rate: too small");
    ensure!(arguments.seconds.is_none_or(|seconds| seconds >= 1.0), "--seconds: too small");
    match arguments.mode {
        Mode::Measure => measure(arguments),
        Mode::List => {
            list(arguments);
            Ok(())
        }
        Mode::Report => {
            let all: Vec<_> = arguments.case.iter().flat_map(|case| cases::of_case(*case, arguments)).collect();
            report::merge(&all, std::io::stdin().lock())
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let program = match &arguments.ecmpvpn {
        Some(path) => std::fs::canonicalize(path).with_context(|| format!("--ecmpvpn {}", path.display()))?,
        None => binary()?,
    };
    if let Some(Job { case, repetition: Some((table, repetition)) }) = arguments.only {
        let series = cases::of_case(case, arguments);
        let series = series.get(table).context("--only: there is no such table")?;
        for measured in series.measure(arguments, &program, &[repetition])? {
            report::json(&measured.json(&series.title));
        }
        return Ok(());
    }
    let cases = arguments.only.map_or_else(|| arguments.case.clone(), |job| vec![job.case]);
    for case in cases {
        for series in cases::of_case(case, arguments) {
            let repetitions: Vec<u32> = (1..=series.runs).collect();
            report::show(&series, &series.measure(arguments, &program, &repetitions)?);
        }
        match case {
            Case::Short => short::measure(arguments, &program)?,
            Case::Changes => changes::measure(arguments, &program)?,
            Case::Reorder => reorder::measure(arguments, &program)?,
            _ => {}
        }
    }
    Ok(())
}

/// Prints a line of JSON for each job: its name and its seed.
fn list(arguments: &Arguments) {
    let line = |job: Job, seed: u64| println!("{}", json!({ "job": job.to_string(), "seed": seed }));
    for case in &arguments.case {
        let tables = cases::of_case(*case, arguments);
        for (table, series) in tables.iter().enumerate() {
            for repetition in 1..=series.runs {
                let job = Job { case: *case, repetition: Some((table, repetition)) };
                line(job, arguments.seed_of(repetition));
            }
        }
        if tables.is_empty() {
            line(Job { case: *case, repetition: None }, arguments.seed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_read_as_they_are_named() {
        for (name, repetition) in [("main/0/20", Some((0, 20))), ("short", None)] {
            let job: Job = name.parse().unwrap();
            assert_eq!((job.repetition, job.to_string()), (repetition, name.to_owned()));
        }
        for wrong in ["", "nothing", "main/0", "main/x/1", "main/0/1/2", "main/0/-1"] {
            assert!(wrong.parse::<Job>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_repetition_has_a_seed_of_its_own() {
        let arguments = Arguments::parse_from(["bench", "--seed", "7"]);
        assert_eq!((arguments.seed_of(1), arguments.seed_of(20)), (7, 26));
        assert_eq!(arguments.case, [Case::Main]);
    }
}
