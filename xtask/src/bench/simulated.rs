//! Goodput in simulated time: each repetition is a simulation of its own, as many side by side as there are CPUs. Random
//! numbers come from the repetition's seed, so the same seed gives the same figures.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::programs::{Kept, LIMIT, finish};
use super::results::{Line, Lines, Results};
use crate::sh::{self, Cmd};
use crate::sim;
use crate::sim::run::{Clock, Request};
use crate::vm::kernel::Series;
use crate::vm::run::to_stdout;

const SERIES: Series = Series::V6_12;

/// What is measured by itself.
#[derive(Debug, PartialEq, Eq)]
struct Job {
    name: String,
    seed: u64,
}

impl Job {
    /// Of a line of the measuring program's list.
    fn of(line: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(line).with_context(|| format!("a job: {line}"))?;
        let job = || Some(Self { name: json["job"].as_str()?.to_owned(), seed: json["seed"].as_u64()? });
        job().with_context(|| format!("a job without a name or a seed: {line}"))
    }

    /// Whether its output is put together with that of others; else it shows by itself what it measured.
    fn is_repetition(&self) -> bool {
        self.name.contains('/')
    }
}

/// What a job printed.
struct Done<'a> {
    job: &'a Job,
    lines: Result<Vec<Line>>,
    seconds: f64,
}

/// Measures in simulations what the options ask for; the exit status.
pub fn goodput(programs: &Kept, options: &[String], results: &mut Results) -> Result<i32> {
    let bench = |mode: &str| {
        let words = ["--simulated", "--mode", mode];
        Cmd::new(programs.path("ecmpvpn-bench")).args(words).args(options)
    };
    if options.iter().any(|option| option == "--help" || option == "-h") {
        return Ok(bench("list").status()?.code().unwrap_or(1));
    }
    let jobs = bench("list").output()?.lines().map(Job::of).collect::<Result<Vec<_>>>()?;
    crate::setup::simulation(SERIES)?;
    let cpus = thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    let step = sh::step(format!("{} simulations, {cpus} side by side", jobs.len()));
    let (mut repetitions, mut failed) = (Vec::new(), 0);
    side_by_side(&jobs, cpus, &|job| simulate(programs, options, job), &mut |done, so_far| {
        let Done { job, lines, seconds } = done;
        let lines = lines.inspect_err(|error| sh::note(format!("{}: {error:#}", job.name)));
        sh::note(format!("{so_far}/{}: {}, seed {}: {seconds:.0} s", jobs.len(), job.name, job.seed));
        failed += u32::from(lines.is_err());
        for line in lines.unwrap_or_default() {
            match line {
                Line::Json(json) if job.is_repetition() => repetitions.push(json),
                Line::Json(json) => results.add(json)?,
                // Its transfers; that labs are built goes without saying.
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
    let status = report(bench("report"), &repetitions, results)?;
    ensure!(failed == 0, "{failed} of {} simulations failed, see above", jobs.len());
    Ok(status)
}

/// Does `work` for each job in so many threads, and hands what came of each to `take`, in the order in which they end and
/// with how many have ended.
fn side_by_side<'a>(
    jobs: &'a [Job],
    threads: usize,
    work: &(dyn Fn(&'a Job) -> Done<'a> + Sync),
    take: &mut dyn FnMut(Done<'a>, usize) -> Result<()>,
) -> Result<()> {
    let jobs = Mutex::new(jobs.iter());
    let (sender, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, jobs) = (sender.clone(), &jobs);
            scope.spawn(move || {
                while let Some(job) = jobs.lock().ok().and_then(|mut jobs| jobs.next()) {
                    if sender.send(work(job)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        (1..).zip(results).try_for_each(|(so_far, done)| take(done, so_far))
    })
}

fn simulate<'a>(programs: &Kept, options: &[String], job: &'a Job) -> Done<'a> {
    let (bench, program) = (programs.path("ecmpvpn-bench"), programs.path("ecmpvpn"));
    let words = [&bench, "--simulated", "--ecmpvpn", &program, "--only", &job.name];
    let request = Request {
        series: SERIES,
        clock: Clock::Simulated { seed: job.seed },
        memory_mib: 2048,
        timeout: LIMIT,
        env: Vec::new(),
        command: words.into_iter().map(str::to_owned).chain(options.iter().cloned()).collect(),
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

/// Has the measuring program put repetitions together.
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

    #[test]
    fn every_job_is_done_once_and_an_error_ends_it() {
        let jobs: Vec<Job> = (0..20).map(|seed| Job { name: "main/0/1".to_owned(), seed }).collect();
        let work = |job| Done { job, lines: Ok(Vec::new()), seconds: 0.0 };
        let (mut seeds, mut counts) = (Vec::new(), Vec::new());
        side_by_side(&jobs, 3, &work, &mut |done, so_far| {
            seeds.push(done.job.seed);
            counts.push(so_far);
            Ok(())
        })
        .unwrap();
        seeds.sort_unstable();
        assert_eq!((seeds, counts), ((0..20).collect(), (1..=20).collect()));
        assert!(side_by_side(&jobs, 3, &work, &mut |_, _| anyhow::bail!("full")).is_err());
    }
}
