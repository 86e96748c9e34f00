//! `cargo xtask fuzz`: feeds arbitrary bytes to everything that parses foreign input. The targets are in `fuzz/`.
//!
//! The engine is libFuzzer, from the crate `libfuzzer-sys`. Its coverage counters come from an LLVM pass that every
//! compiler contains, so neither a nightly compiler nor cargo-fuzz is needed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::build_ebpf;
use crate::setup::{self, Part};
use crate::sh::{self, Cmd};
use crate::side_by_side;
use crate::suites::cargo;

/// Compiler flags for coverage counters, and for reporting compared values to libFuzzer.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                        -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";
/// An input that takes longer is a finding, seconds. Most take microseconds, but libFuzzer measures wall clock time.
const SLOW: u32 = 60;
/// An input that uses more memory is a finding, MiB.
const MEMORY: u32 = 1024;
/// Time between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(60);
/// Time between two checks whether a target has ended.
const LOOK: Duration = Duration::from_millis(100);

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run only these targets
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
    /// How long each target runs, in seconds
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: u32,
}

impl Args {
    /// Every target, for `seconds` each.
    pub fn all(seconds: u32) -> Self {
        Self { targets: Vec::new(), seconds }
    }
}

/// The result of a target's run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    executions: u64,
    /// The input that made the target fail.
    crash: Option<PathBuf>,
}

/// `cargo xtask fuzz`; returns the exit status.
pub fn main(args: &Args) -> Result<i32> {
    let chosen = chosen(&args.targets, targets()?)?;
    setup::ensure(&[Part::Build, Part::Ebpf, Part::Fuzz])?;
    build_ebpf::build_ebpf(None)?;
    let programs = build()?;
    let mut failed = 0;
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let step = sh::step(format!("fuzz {}, {} s each, {workers} at a time", chosen.join(", "), args.seconds));
    let fuzz = |name: &String| (name.clone(), run(&programs.join(name), name, args.seconds));
    side_by_side::run(chosen.iter().collect(), workers, fuzz, &mut |(name, outcome)| {
        let outcome = outcome?;
        let result = if outcome.crash.is_some() { "failed" } else { "ok" };
        println!("{name:10}  {:>10} executions  {result}", outcome.executions);
        if let Some(input) = outcome.crash {
            println!("    input:  {}", input.display());
            println!("    replay: {}", Cmd::new(programs.join(&name)).arg(&input).line());
            failed += 1;
        }
        Ok(())
    })?;
    step.done("");
    Ok(i32::from(failed > 0))
}

fn directory() -> PathBuf {
    sh::root().join("fuzz")
}

/// The names of all targets, sorted.
fn targets() -> Result<Vec<String>> {
    let directory = directory().join("fuzz_targets");
    let files = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut names: Vec<String> =
        files.flatten().filter_map(|file| Some(file.path().file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// The requested targets, in the requested order; all targets if none is requested.
fn chosen(asked: &[String], all: Vec<String>) -> Result<Vec<String>> {
    if let Some(unknown) = asked.iter().find(|name| !all.contains(name)) {
        bail!("there is no target {unknown}: there are {}", all.join(", "));
    }
    Ok(if asked.is_empty() { all } else { asked.to_vec() })
}

/// Compiles the targets; returns their directory.
fn build() -> Result<PathBuf> {
    let host = Cmd::new("rustc").args(["--print", "host-tuple"]).dir(&directory()).output()?;
    let host = host.trim();
    let target = sh::target().join("fuzz/build");
    let step = sh::step("compile the fuzz targets");
    // `--target` keeps the counters out of build scripts and macros, which do not link libFuzzer.
    cargo()
        .dir(&directory())
        .args(["build", "--quiet", "--locked", "--release", "--bins", "--target", host])
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", COVERAGE)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .run()?;
    step.done("");
    Ok(target.join(host).join("release"))
}

/// Runs a target. Its findings are kept below `target/fuzz`: libFuzzer writes to the first directory of its arguments,
/// and reads the others.
fn run(program: &Path, name: &str, seconds: u32) -> Result<Outcome> {
    let kept = sh::target().join("fuzz").join(name);
    let found = kept.join("corpus");
    fs::create_dir_all(&found).with_context(|| format!("making {}", found.display()))?;
    let log = kept.join("log");
    let mut command = Cmd::new(program)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={SLOW}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg(format!("-artifact_prefix={}/", kept.display()))
        .arg("-print_final_stats=1");
    let dictionary = directory().join("dictionaries").join(format!("{name}.dict"));
    if dictionary.is_file() {
        command = command.arg(format!("-dict={}", dictionary.display()));
    }
    let command = command.arg(&found).arg(directory().join("corpus").join(name));
    let line = command.line();
    let output = File::create(&log).with_context(|| format!("writing {}", log.display()))?;
    let mut child = command
        .into_inner()
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("starting `{line}`"))?;
    let text = || fs::read(&log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let mut noted = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("waiting for `{line}`"))? {
            break status;
        }
        if noted.elapsed() >= PROGRESS {
            sh::note(format!("{name}: {} executions so far", executions(&text())));
            noted = Instant::now();
        }
        thread::sleep(LOOK);
    };
    let text = text();
    let outcome = Outcome { executions: executions(&text), crash: crash(&text) };
    if !status.success() {
        eprintln!("{}", failure(&text));
        if outcome.crash.is_none() {
            bail!("`{line}` failed ({status}): see {}", log.display());
        }
    }
    Ok(outcome)
}

/// How many inputs were tried, from libFuzzer's output so far.
fn executions(log: &str) -> u64 {
    let count = |line: &str| {
        let number = line.strip_prefix("stat::number_of_executed_units:").or_else(|| line.strip_prefix('#'))?;
        number.split_whitespace().next()?.trim_end_matches(':').parse().ok()
    };
    log.lines().filter_map(count).max().unwrap_or(0)
}

/// The file with the input that made the target fail.
fn crash(log: &str) -> Option<PathBuf> {
    log.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1.trim().into()))
}

/// What the target printed when it failed: the panic, or else the end of the log.
fn failure(log: &str) -> String {
    const MOST: usize = 30;
    let panic: Vec<&str> = log
        .lines()
        .skip_while(|line| !line.contains("panicked at"))
        .take_while(|line| !line.starts_with("stack backtrace"))
        .take(MOST)
        .collect();
    if panic.is_empty() { sh::tail(log, MOST) } else { panic.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRASHED: &str = "#2\tINITED cov: 43 ft: 44\n#16384\tpulse  cov: 43\n\
                           thread '<unnamed>' (7) panicked at src/lib.rs:30:9:\na key is shown\nstack backtrace:\n   0: rust\n\
                           artifact_prefix='/t/'; Test unit written to /t/crash-0a1b\n\
                           stat::number_of_executed_units: 20000\n";

    #[test]
    fn executions_and_the_input_that_failed_are_read_from_the_log() {
        assert_eq!(executions(CRASHED), 20_000);
        assert_eq!(crash(CRASHED), Some("/t/crash-0a1b".into()));
        assert_eq!(failure(CRASHED), "thread '<unnamed>' (7) panicked at src/lib.rs:30:9:\na key is shown");
        let under_way = "#2\tINITED cov: 43\n#16384\tpulse  cov: 43\n";
        assert_eq!((executions(under_way), crash(under_way), failure(under_way).lines().count()), (16_384, None, 2));
        assert_eq!(executions(""), 0);
    }

    #[test]
    fn targets_are_chosen_by_name() {
        let all = || vec!["config".to_owned(), "packet".to_owned()];
        assert_eq!(chosen(&[], all()).unwrap(), all());
        assert_eq!(chosen(&["packet".to_owned()], all()).unwrap(), ["packet"]);
        assert!(chosen(&["pocket".to_owned()], all()).unwrap_err().to_string().contains("config, packet"));
    }

    #[test]
    fn every_target_has_a_corpus_and_is_built() {
        let manifest = fs::read_to_string(directory().join("Cargo.toml")).unwrap();
        for name in targets().unwrap() {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
            assert!(fs::read_dir(directory().join("corpus").join(&name)).unwrap().count() >= 5, "{name}");
        }
    }
}
