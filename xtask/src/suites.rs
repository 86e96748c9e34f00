//! The integration suites: how they are built and found, and what is told of one that ran.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::count::Counts;
use crate::sh::{self, Cmd};

/// The package that holds the suites.
const SUITES: &str = "ecmpvpn-tests";

/// An integration suite and its test program.
#[derive(Debug, PartialEq, Eq)]
pub struct Suite {
    pub name: String,
    pub program: PathBuf,
}

/// A stage that has been run: its name, what came of it, and how long it took.
pub type Stage = (String, Result<Counts>, Duration);

/// Cargo, as this program was started by.
pub fn cargo() -> Cmd {
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).dir(&sh::root())
}

/// The program under test.
pub fn binary() -> PathBuf {
    sh::target().join("debug/ecmpvpn")
}

/// Compiles the suites; the program of the one called `name`.
pub fn suite(name: &str) -> Result<PathBuf> {
    let found = build_suites()?.into_iter().find(|suite| suite.name == name);
    Ok(found.with_context(|| format!("there is no suite {name}"))?.program)
}

/// Compiles the suites and finds their programs.
pub fn build_suites() -> Result<Vec<Suite>> {
    let mut build = cargo()
        .args(["test", "--no-run", "-p", SUITES, "--tests", "--message-format", "json-render-diagnostics"])
        .into_inner();
    // Progress and errors go to stderr, as they come.
    let output = build.stderr(Stdio::inherit()).output().context("starting cargo")?;
    ensure!(output.status.success(), "the suites do not compile");
    let messages = String::from_utf8_lossy(&output.stdout);
    let suites = programs(&messages);
    if suites.is_empty() {
        bail!("{SUITES} has no suite");
    }
    Ok(suites)
}

/// The integration suites among cargo's messages, by name.
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
}
