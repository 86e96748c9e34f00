//! The integration suites: builds, finds and runs them, and counts their tests.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::count::{Counts, Watcher};
use crate::sh::{self, Cmd};
use crate::side_by_side;
use crate::vm::run::{Sink, to_stdout};

/// The package that holds the suites.
const SUITES: &str = "ecmpvpn-tests";

/// An integration suite and its test program.
#[derive(Debug, PartialEq, Eq)]
pub struct Suite {
    pub name: String,
    pub program: PathBuf,
}

/// A stage that has been run: its name, its result, and its duration.
pub type Stage = (String, Result<Counts>, Duration);

/// A test program that ran.
pub struct Ran {
    pub name: String,
    pub counts: Result<Counts>,
    pub took: Duration,
    pub output: Vec<u8>,
}

impl Ran {
    /// Runs `program`, which passes on its output and returns its exit status. Counts its tests.
    pub fn of(name: String, program: impl FnOnce(&mut Sink<'_>) -> Result<i32>) -> Self {
        eprintln!("==> {name}");
        let since = Instant::now();
        let mut output = Vec::new();
        let mut watcher = Watcher::default();
        let status = program(&mut |bytes| {
            watcher.feed(bytes);
            output.extend_from_slice(bytes);
            Ok(())
        });
        Self { name, counts: status.map(|status| watcher.finish(status == 0)), took: since.elapsed(), output }
    }
}

/// Runs `jobs`, `workers` at a time, and passes on the output and the result of each when it ends.
pub fn run_side_by_side<J: Send>(
    jobs: Vec<J>,
    workers: usize,
    work: impl Fn(J) -> Ran + Sync,
    stage: &mut dyn FnMut(Stage),
) -> Result<()> {
    side_by_side::run(jobs, workers, work, &mut |ran| {
        eprintln!("==> {}: its output", ran.name);
        to_stdout(&ran.output)?;
        stage((ran.name, ran.counts, ran.took));
        Ok(())
    })
}

/// The cargo that started this program.
pub fn cargo() -> Cmd {
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).dir(&sh::root())
}

/// The program under test.
pub fn binary() -> PathBuf {
    sh::target().join("debug/ecmpvpn")
}

/// Compiles the suites; returns suite `name`.
pub fn suite(name: &str) -> Result<Suite> {
    let found = build_suites()?.into_iter().find(|suite| suite.name == name);
    found.with_context(|| format!("there is no suite {name}"))
}

/// Compiles the suites and finds their programs.
pub fn build_suites() -> Result<Vec<Suite>> {
    let mut build = cargo()
        .args(["test", "--no-run", "-p", SUITES, "--tests", "--message-format", "json-render-diagnostics"])
        .into_inner();
    // Progress and errors go to stderr at once.
    let output = build.stderr(Stdio::inherit()).output().context("starting cargo")?;
    ensure!(output.status.success(), "the suites do not compile");
    let messages = String::from_utf8_lossy(&output.stdout);
    let suites = programs(&messages);
    if suites.is_empty() {
        bail!("{SUITES} has no suite");
    }
    Ok(suites)
}

/// The integration suites in cargo's messages, sorted by name.
fn programs(messages: &str) -> Vec<Suite> {
    let suite = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        let target = &message["target"];
        let is_suite = message["reason"] == "compiler-artifact" && target["kind"][0] == "test";
        let program = Path::new(message["executable"].as_str()?).to_owned();
        is_suite.then(|| Some(Suite { name: target["name"].as_str()?.to_owned(), program }))?
    };
    let mut suites: Vec<Suite> = messages.lines().filter_map(suite).collect();
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    suites
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_found_among_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"lab"},"executable":"/t/lab-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"namespaces"},"executable":"/t/namespaces-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"bpf"},"executable":"/t/bpf-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"unbuilt"},"executable":null}
{"reason":"build-finished","success":true}"#;
        let names: Vec<String> = programs(messages).into_iter().map(|suite| suite.name).collect();
        assert_eq!(names, ["bpf", "namespaces"]);
    }

    #[test]
    fn the_tests_of_a_program_are_counted() {
        let mut stages = Vec::new();
        let job = |name: &str| {
            Ran::of(name.to_owned(), |sink| {
                sink(b"test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured\n")?;
                Ok(0)
            })
        };
        run_side_by_side(vec!["a", "b"], 2, job, &mut |(name, counts, _)| stages.push((name, counts.unwrap())))
            .unwrap();
        stages.sort_by(|a, b| a.0.cmp(&b.0));
        let counts = Counts { passed: 2, skipped: 1, ..Counts::default() };
        assert_eq!(stages, [("a".to_owned(), counts.clone()), ("b".to_owned(), counts)]);
    }

    #[test]
    fn a_program_that_cannot_be_started_is_reported() {
        let ran = Ran::of("broken".to_owned(), |_| anyhow::bail!("no such file"));
        assert!(ran.counts.is_err());
        let ran = Ran::of("silent".to_owned(), |_| Ok(0));
        assert!(ran.counts.unwrap().failed > 0, "it has not said that anything passed");
    }
}
