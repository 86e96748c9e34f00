//! `cargo xtask sim fault`: faults by seed in simulated time, for one seed or many side by side, and the deliberate
//! defects that must be found. The program `ecmpvpn-fault` of the labs causes the faults.

mod sum;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::run::{Clock, Request};
use sum::Sum;

use crate::setup::{self, Part};
use crate::sh::{self, Cmd};
use crate::side_by_side;
use crate::vm::kernel::Series;
use crate::vm::run::to_stdout;

/// The prefix of a line for programs.
const JSON: &str = "@json ";
/// Time between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(30);
/// Memory of the simulated machine, MiB.
const MEMORY: u32 = 1024;
/// The defects, and the invariant that each of them breaks.
const DEFECTS: [(&str, &str); 4] = [
    ("clear", "nothing in the clear"),
    ("reorder", "nothing reordered but by counted moves"),
    ("recovery", "recovery within bounds"),
    ("restore", "host restored"),
];

/// Arguments of `cargo xtask sim fault`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Seed of all random choices: the same seed gives the same run
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Several seeds, from the first to the last
    #[arg(long, value_name = "A..B", value_parser = seeds, conflicts_with_all = ["seed", "count"])]
    seeds: Option<RangeInclusive<u64>>,
    /// Number of seeds, from --seed on
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Length of each seed's run, in simulated minutes
    #[arg(long, default_value_t = 5.0, value_name = "M")]
    minutes: f64,
    /// Runs side by side [default: as many as there are CPUs]
    #[arg(long, value_name = "J", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Break something on purpose, which must be found
    #[arg(long, value_name = "WHAT", value_parser = DEFECTS.map(|(name, _)| name))]
    defect: Option<String>,
    /// Check that each of those defects is found, and that its run replays byte for byte
    #[arg(long, conflicts_with_all = ["seeds", "count", "defect"])]
    self_test: bool,
    /// Print every interruption of a flow
    #[arg(long)]
    interruptions: bool,
    /// Only print a seed's schedule
    #[arg(long, conflicts_with_all = ["seeds", "count", "self_test"])]
    schedule: bool,
    /// The program to test, instead of this tree's
    #[arg(long, value_name = "PATH")]
    ecmpvpn: Option<PathBuf>,
    /// Kernel series
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Series,
}

/// Parses `A..B`; both ends are included.
fn seeds(text: &str) -> Result<RangeInclusive<u64>> {
    let (first, last) = text.split_once("..").context("expected A..B")?;
    let (first, last): (u64, u64) = (first.parse()?, last.trim_start_matches('=').parse()?);
    ensure!(first <= last, "{first} is more than {last}");
    Ok(first..=last)
}

/// A seed to run.
#[derive(Debug, Clone)]
struct Job {
    seed: u64,
    defect: Option<String>,
}

/// A run that has ended.
struct Ran {
    job: Job,
    status: Result<i32>,
    output: Vec<u8>,
    took: Duration,
}

impl Ran {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Its line for programs.
    fn json(&self) -> Option<Value> {
        serde_json::from_str(self.text().lines().rev().find_map(|line| line.strip_prefix(JSON))?).ok()
    }

    /// Its result in one line.
    fn verdict(&self) -> String {
        let text = self.text();
        let begin = format!("seed {}: ", self.job.seed);
        match &self.status {
            Err(error) => format!("{begin}{error:#}"),
            Ok(2..) => format!("{begin}it could not be tried: {}", sh::tail(&text, 1)),
            Ok(_) => text.lines().rev().find(|line| line.starts_with(&begin)).unwrap_or(&begin).to_owned(),
        }
    }
}

/// The arguments, and the directory of the programs.
struct Bench<'a> {
    args: &'a Args,
    programs: PathBuf,
}

/// `cargo xtask sim fault`; returns the exit status.
pub fn main(args: &Args) -> Result<i32> {
    setup::ensure(&[Part::Build, Part::Ebpf, Part::Lab, Part::Sim])?;
    setup::simulation(args.kernel)?;
    let bench = Bench { args, programs: programs(args)? };
    if args.self_test {
        return bench.self_test();
    }
    let seeds = match (&args.seeds, args.count) {
        (Some(seeds), _) => seeds.clone(),
        (None, Some(count)) => args.seed..=args.seed.saturating_add(count - 1),
        (None, None) => args.seed..=args.seed,
    };
    if seeds.start() == seeds.end() {
        let ran = bench.run(&Job { seed: args.seed, defect: args.defect.clone() }, &mut |line| {
            if line.starts_with(JSON.as_bytes()) { Ok(()) } else { to_stdout(line) }
        });
        return Ok(ran.status.unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            2
        }));
    }
    bench.many(seeds)
}

/// Builds the programs and copies them, so that another build does not change them during the run.
fn programs(args: &Args) -> Result<PathBuf> {
    crate::build_ebpf::build_ebpf(None)?;
    let step = sh::step("building ecmpvpn and the faults (a few minutes the first time)");
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--quiet",
            "-p",
            "ecmpvpn",
            "-p",
            "ecmpvpn-tests",
            "--bin",
            "ecmpvpn",
            "--bin",
            "ecmpvpn-fault",
        ])
        .dir(&sh::root())
        .run()?;
    step.done("");
    let debug = sh::target().join("debug");
    let sources = [args.ecmpvpn.clone().unwrap_or_else(|| debug.join("ecmpvpn")), debug.join("ecmpvpn-fault")];
    // The path is constant, since it influences the kernel's random numbers.
    let dir = sh::target().join("sim/fault/programs");
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    for (source, name) in sources.iter().zip(["ecmpvpn", "ecmpvpn-fault"]) {
        let copy = tempfile::NamedTempFile::new_in(&dir)?;
        fs::copy(source, copy.path()).with_context(|| format!("copying {}", source.display()))?;
        copy.persist(dir.join(name))?;
    }
    Ok(dir)
}

impl Bench<'_> {
    fn run(&self, job: &Job, line: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> Ran {
        let args = self.args;
        let program = |name: &str| self.programs.join(name).display().to_string();
        let mut command = vec![program("ecmpvpn-fault"), "--ecmpvpn".to_owned(), program("ecmpvpn")];
        command.extend(["--seed".to_owned(), job.seed.to_string(), "--minutes".to_owned(), args.minutes.to_string()]);
        command.extend(job.defect.iter().flat_map(|defect| ["--defect".to_owned(), defect.clone()]));
        command.extend(args.interruptions.then(|| "--interruptions".to_owned()));
        command.extend(args.schedule.then(|| "--schedule".to_owned()));
        let request = Request {
            series: args.kernel,
            clock: Clock::Simulated { seed: job.seed },
            memory_mib: MEMORY,
            // A busy machine needs a minute for a simulated minute.
            timeout: Duration::from_secs_f64(600.0 + args.minutes * 240.0),
            env: Vec::new(),
            command,
        };
        let since = Instant::now();
        let (mut output, mut pending) = (Vec::new(), Vec::new());
        let status = super::run(&request, &mut |bytes| {
            output.extend_from_slice(bytes);
            for byte in bytes {
                pending.push(*byte);
                if *byte == b'\n' {
                    line(&std::mem::take(&mut pending))?;
                }
            }
            Ok(())
        });
        Ran { job: job.clone(), status, output, took: since.elapsed() }
    }

    /// Runs jobs side by side and passes on each when it ends.
    fn side_by_side(&self, jobs: Vec<Job>, ended: &mut dyn FnMut(Ran) -> Result<()>) -> Result<()> {
        let machines =
            self.args.jobs.map_or_else(|| thread::available_parallelism().map_or(1, usize::from), usize::from);
        let count = jobs.len();
        // The simulated time of each running job, in seconds.
        let far: Mutex<BTreeMap<u64, String>> = Mutex::default();
        let work = |job: Job| {
            let note = |at: Option<String>| {
                let Ok(mut far) = far.lock() else { return };
                match at {
                    Some(at) => far.insert(job.seed, at),
                    None => far.remove(&job.seed),
                };
            };
            note(Some("0".to_owned()));
            let ran = self.run(&job, &mut |line| {
                let line = String::from_utf8_lossy(line);
                let at = line.split_whitespace().next().and_then(|word| word.split_once('.'));
                if let Some((seconds, _)) = at.filter(|(seconds, _)| seconds.parse::<u64>().is_ok()) {
                    note(Some(seconds.to_owned()));
                }
                Ok(())
            });
            note(None);
            ran
        };
        let done = Cell::new(0);
        let mut progress = || {
            let far = far.lock().map(|far| far.clone()).unwrap_or_default();
            let running: Vec<String> = far.iter().map(|(seed, at)| format!("seed {seed} at {at} s")).collect();
            sh::note(format!("{} of {count} done; {}", done.get(), running.join(", ")));
        };
        side_by_side::run_with_progress(jobs, machines.min(count), work, PROGRESS, &mut progress, &mut |ran| {
            done.set(done.get() + 1);
            ended(ran)
        })
    }

    /// Runs many seeds; returns the exit status.
    fn many(&self, seeds: RangeInclusive<u64>) -> Result<i32> {
        let dir = sh::target().join("sim/fault");
        let job = |seed| Job { seed, defect: self.args.defect.clone() };
        let mut sum = Sum::default();
        self.side_by_side(seeds.map(job).collect(), &mut |ran| {
            let log = dir.join(format!("seed-{}.log", ran.job.seed));
            fs::write(&log, &ran.output).with_context(|| format!("writing {}", log.display()))?;
            println!("{} ({:.0} s; {})", ran.verdict(), ran.took.as_secs_f64(), log.display());
            sum.add(ran.status.as_ref().ok().copied(), ran.json().as_ref());
            Ok(())
        })?;
        print!("{sum}");
        std::io::stdout().flush()?;
        Ok(i32::from(!sum.is_sound()))
    }

    /// Runs each defect twice; returns the exit status.
    fn self_test(&self) -> Result<i32> {
        let minutes = self.args.minutes.min(0.5);
        let args = Args { minutes, ..self.args.clone() };
        let bench = Bench { args: &args, programs: self.programs.clone() };
        let mut passed = 0;
        let mut failed = 0;
        for (defect, invariant) in DEFECTS {
            let mut runs = Vec::new();
            let job = Job { seed: args.seed, defect: Some(defect.to_owned()) };
            bench.side_by_side(vec![job.clone(), job], &mut |ran| {
                runs.push(ran);
                Ok(())
            })?;
            match found(&runs, invariant) {
                Ok(description) => {
                    passed += 1;
                    println!("{defect}: {description}");
                }
                Err(error) => {
                    failed += 1;
                    println!("{defect}: {error:#}\n{}", runs.first().map(Ran::text).unwrap_or_default());
                }
            }
        }
        println!("{passed} passed, {failed} failed");
        Ok(i32::from(failed > 0))
    }
}

/// Checks that a defect was found in both runs, with the same output.
fn found(runs: &[Ran], invariant: &str) -> Result<String> {
    let [first, second] = runs else { bail!("it ran {} times", runs.len()) };
    let text = first.text();
    let line = text.lines().find(|line| line.starts_with("broken invariant: ")).context("no invariant was broken")?;
    ensure!(line.contains(invariant), "the wrong one was found: {line}");
    ensure!(first.status.as_ref().is_ok_and(|status| *status == 1), "the exit status was {:?}", first.status);
    if first.output != second.output {
        let other = second.text();
        let differs = text.lines().zip(other.lines()).find(|(a, b)| a != b);
        bail!("a second run differs: {differs:?}");
    }
    Ok(format!("found, and replayed byte for byte: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(status: i32, output: &str) -> Ran {
        let job = Job { seed: 7, defect: None };
        Ran { job, status: Ok(status), output: output.as_bytes().to_vec(), took: Duration::ZERO }
    }

    #[test]
    fn a_range_of_seeds_has_both_its_ends() {
        assert_eq!(seeds("3..5").unwrap(), 3..=5);
        assert_eq!(seeds("3..=5").unwrap(), 3..=5);
        assert!(seeds("5..3").is_err() && seeds("5").is_err() && seeds("a..b").is_err());
    }

    #[test]
    fn a_defect_is_found_only_if_both_runs_say_the_same() {
        let output = "broken invariant: host restored, at 3\nseed 7: broken invariant: host restored; again: x\n";
        let runs = |status, other: &str| vec![ran(status, output), ran(status, other)];
        assert!(found(&runs(1, output), "host restored").is_ok());
        assert!(found(&runs(1, output), "nothing in the clear").is_err());
        assert!(found(&runs(0, output), "host restored").is_err());
        assert!(found(&runs(1, "something else"), "host restored").is_err());
        assert!(found(&runs(1, output)[..1], "host restored").is_err());
        assert_eq!(runs(1, output)[0].verdict(), "seed 7: broken invariant: host restored; again: x");
    }
}
