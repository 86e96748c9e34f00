//! Formatting, clippy and cargo-deny. A check that passes is no test and is not counted; one that fails is a failure.

use crate::count::Counts;
use crate::sh::{self, Cmd};

/// Runs every check; each failing one counts.
pub fn run() -> Counts {
    let mut counts = Counts::default();
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    // What needs no network. The graph it looks at is the lock file's.
    let deny = ["deny", "--log-level", "error", "check", "licenses", "bans", "sources"];
    for arguments in [&["fmt", "--all", "--check"][..], &clippy, &deny] {
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

/// Known vulnerabilities among the dependencies; their list is on the network only.
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
