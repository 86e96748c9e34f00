//! Formatting, clippy and cargo-deny. A check that passes is not counted as a test. A check that fails counts as a
//! failure.

use crate::count::Counts;
use crate::sh::{self, Cmd};

/// Runs every check.
pub fn run() -> Counts {
    let mut counts = Counts::default();
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    // These checks need no network: they read the lock file.
    let deny = ["deny", "--log-level", "error", "check", "licenses", "bans", "sources"];
    // The fuzz targets are a workspace of their own.
    let fuzz = ["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"];
    for arguments in [&["fmt", "--all", "--check"][..], &fuzz, &clippy, &deny] {
        let step = sh::step(format!("cargo {}", arguments.join(" ")));
        match cargo(arguments).run() {
            Ok(()) => drop(step.done("")),
            Err(error) => {
                eprintln!("error: {error:#}");
                counts.failed += 1;
            }
        }
    }
    advisories(&mut counts);
    counts
}

/// Checks the dependencies for known vulnerabilities. The database is only on the network.
fn advisories(counts: &mut Counts) {
    if let Err(error) = cargo(&["deny", "fetch", "db"]).quiet().run() {
        sh::note(format!("skipped: advisories are not checked, their database cannot be fetched: {error:#}"));
        counts.skipped += 1;
        return;
    }
    if let Err(error) = cargo(&["deny", "--log-level", "error", "--offline", "check", "advisories"]).run() {
        eprintln!("error: {error:#}");
        counts.failed += 1;
    }
}

fn cargo(arguments: &[&str]) -> Cmd {
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args(arguments).dir(&sh::root())
}
