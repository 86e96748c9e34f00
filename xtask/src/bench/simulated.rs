//! Measurements in simulated time. Each repetition is a separate simulation; as many run side by side as there are CPUs.
//! Random numbers come from the repetition's seed, so the same seed gives the same figures.

use std::io::Write as _;
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::programs::{Kept, LIMIT, finish};
use super::results::{Line, Lines, Results};
use crate::sh::{self, Cmd};
use crate::side_by_side;
use crate::sim;
use crate::sim::run::{Clock, Request};
use crate::vm::kernel::Series;
use crate::vm::run::to_stdout;

const SERIES: Series = Series::V6_12;

/// A measurement that runs in its own simulation.
#[derive(Debug, PartialEq, Eq)]
struct Job {
    name: String,
    seed: u64,
}

impl Job {
    /// Reads a line of the measuring program's list.
    fn of(line: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(line).with_context(|| format!("a job: {line}"))?;
        let job = || Some(Self { name: json["job"].as_str()?.to_owned(), seed: json["seed"].as_u64()? });
        job().with_context(|| format!("a job without a name or a seed: {line}"))
    }

    /// Whether its output is combined with that of others. Otherwise it prints its own results.
    fn is_repetition(&self) -> bool {
        self.name.contains('/')
    }
}

/// The output of a job.
struct Done<'a> {
    job: &'a Job,
    lines: Result<Vec<Line>>,
    seconds: f64,
}

/// A program that measures in simulations: `--mode list` prints its jobs, `--only JOB` runs one, and `--mode report`
/// combines the results of all.
pub struct Bench<'a> {
    pub programs: &'a Kept,
    pub name: &'a str,
    /// Options for that program.
    pub options: &'a [String],
}

impl Bench<'_> {
    fn command(&self, mode: &str) -> Cmd {
        Cmd::new(self.programs.path(self.name)).args(["--simulated", "--mode", mode]).args(self.options)
    }
}

/// Runs the measurements that the options select, in simulations; returns the exit status. `at_once` is how many run side
/// by side, if not as many as there are CPUs.
pub fn measure(bench: &Bench<'_>, at_once: Option<u16>, results: &mut Results) -> Result<i32> {
    if bench.options.iter().any(|option| option == "--help" || option == "-h") {
        return Ok(bench.command("list").status()?.code().unwrap_or(1));
    }
    let jobs = bench.command("list").output()?.lines().map(Job::of).collect::<Result<Vec<_>>>()?;
    crate::setup::simulation(SERIES)?;
    let cpus = || thread::available_parallelism().map_or(1, usize::from);
    let cpus = at_once.map_or_else(cpus, usize::from).min(jobs.len());
    let step = sh::step(format!("{} simulations, {cpus} side by side", jobs.len()));
    let (mut repetitions, mut failed) = (Vec::new(), 0);
    let mut so_far = 0;
    side_by_side::run(jobs.iter().collect(), cpus, |job| simulate(bench, job), &mut |done| {
        let Done { job, lines, seconds } = done;
        so_far += 1;
        let lines = lines.inspect_err(|error| sh::note(format!("{}: {error:#}", job.name)));
        sh::note(format!("{so_far}/{}: {}, seed {}: {seconds:.0} s", jobs.len(), job.name, job.seed));
        failed += u32::from(lines.is_err());
        for line in lines.unwrap_or_default() {
            match line {
                Line::Json(json) if job.is_repetition() => repetitions.push(json),
                Line::Json(json) => results.add(json)?,
                // Lines about transfers. Lines about building the lab are left out.
                Line::Text(text) if job.is_repetition() && text.starts_with(b" ") => {
                    eprint!("{}", String::from_utf8_lossy(&text));
                }
                Line::Text(_) if job.is_repetition() => {}
                Line::Text(text) => to_stdout(&text)?,
            }
        }
        Ok(())
    })?;
    step.done("");
    let status = report(bench.command("report"), &repetitions, results)?;
    ensure!(failed == 0, "{failed} of {} simulations failed, see above", jobs.len());
    Ok(status)
}

fn simulate<'a>(bench: &Bench<'_>, job: &'a Job) -> Done<'a> {
    let (measuring, program) = (bench.programs.path(bench.name), bench.programs.path("ecmpvpn"));
    let words = [&measuring, "--simulated", "--ecmpvpn", &program, "--only", &job.name];
    let request = Request {
        series: SERIES,
        clock: Clock::Simulated { seed: job.seed },
        memory_mib: 2048,
        timeout: LIMIT,
        env: Vec::new(),
        command: words.into_iter().map(str::to_owned).chain(bench.options.iter().cloned()).collect(),
    };
    let since = Instant::now();
    let (mut lines, mut found) = (Lines::default(), Vec::new());
    let status = sim::run(&request, &mut |bytes| {
        found.extend(lines.feed(bytes).map_err(std::io::Error::other)?);
        Ok(())
    });
    let ended = status.and_then(|status| {
        let text = found.iter().filter_map(|line| match line {
            Line::Text(text) => Some(String::from_utf8_lossy(text)),
            Line::Json(_) => None,
        });
        ensure!(status == 0, "it ended with {status}:\n{}", sh::tail(&text.collect::<String>(), 60));
        Ok(())
    });
    Done { job, lines: ended.map(|()| found), seconds: since.elapsed().as_secs_f64() }
}

/// Lets the measuring program combine the repetitions.
fn report(program: Cmd, repetitions: &[Value], results: &mut Results) -> Result<i32> {
    let line = program.line();
    let mut child = program
        .into_inner()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{line}`"))?;
    let mut input = child.stdin.take().context("it has no input")?;
    for repetition in repetitions {
        writeln!(input, "{repetition}").with_context(|| format!("writing to `{line}`"))?;
    }
    drop(input);
    finish(&mut child, results).with_context(|| format!("reading from `{line}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_read_from_the_list() {
        let job = Job::of(r#"{"job":"main/0/3","seed":9}"#).unwrap();
        assert_eq!(job, Job { name: "main/0/3".to_owned(), seed: 9 });
        assert!(job.is_repetition() && !Job::of(r#"{"job":"short","seed":1}"#).unwrap().is_repetition());
        assert!(Job::of(r#"{"job":"short"}"#).is_err() && Job::of("no").is_err());
    }
}
