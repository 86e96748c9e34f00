//! How systemd rates the unit.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The unit's exposure must be less than this. `systemd-analyze` rates from 0 (none) to 10 (unsafe).
const LIMIT: f64 = 3.0;

pub fn the_unit_is_little_exposed() -> Result<()> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/ecmpvpn.service");
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--offline=true", "--no-pager"]).arg(unit).env("LC_ALL", "C");
    let output = analyze.output().context("starting systemd-analyze")?;
    let report = String::from_utf8_lossy(&output.stdout);
    // What is not marked as restricted, and the sum.
    for line in report.lines().filter(|line| line.starts_with("- ") || line.starts_with("-> ")) {
        eprintln!("{line}");
    }
    ensure!(output.status.success(), "it ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    let level = report.split_once("Overall exposure level for ecmpvpn.service: ").context("no level")?.1;
    let level: f64 = level.split_whitespace().next().context("no level")?.parse()?;
    ensure!(level < LIMIT, "systemd rates the unit {level}");
    Ok(())
}
