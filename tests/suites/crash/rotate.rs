//! The leading site of a renewal of keys, killed.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::kind::Kind;
use lab::sites::Running;
use serde_json::Value;

use crate::rig::{After, Operation, Rig, State, stop};

/// How long a renewal of two tunnels may take.
const PATIENCE: Duration = Duration::from_secs(90);

fn rotate(rig: &Rig, site: usize, arguments: &[&str]) -> Result<String> {
    let (code, output, complaint) = rig.lab.ecmpvpn(site, &[&["rotate"], arguments].concat())?;
    ensure!(code == 0, "`rotate {}` ended with {code}: {complaint}", arguments.join(" "));
    Ok(output)
}

/// Both sites have the new keys, and none is in use yet.
fn prepared(rig: &Rig) -> Result<Option<Running>> {
    let running = rig.up()?;
    rig.answers()?;
    let file = rig.lab.dir().join("for-b").display().to_string();
    rotate(rig, 0, &["--prepare", "--output", &file])?;
    rotate(rig, 1, &["--apply", &file])?;
    fs::remove_file(file)?;
    Ok(Some(running))
}

/// Ends the command that only watches.
struct Watching(Child);

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn renew(rig: &Rig, running: Option<Running>) -> Result<Option<Running>> {
    let mut running = running.context("nothing runs")?;
    let mut watching = Watching(rig.lab.command(0, &["rotate"]).spawn()?);
    let since = Instant::now();
    while running.ended()?.is_none() && watching.0.try_wait()?.is_none() {
        ensure!(since.elapsed() < PATIENCE, "the renewal does not end:\n{}", running.output());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Some(running))
}

fn is_done(rig: &Rig, site: usize) -> Result<bool> {
    let state: Value = serde_json::from_str(&rotate(rig, site, &["--status", "--json"])?)?;
    let rotation = &state["rotation"];
    ensure!(rotation["stopped"].is_null() || rotation["done"] == true, "the renewal has stopped: {rotation}");
    Ok(rotation["done"] == true)
}

/// The renewal goes on by itself when `run` is started again, also after a `down`.
fn goes_on(rig: &Rig, state: &State, after: After) -> Result<()> {
    if after == After::Down {
        rig.down()?;
        rig.assert_before()?;
    }
    // The next `run` removes half files.
    let running = rig.up().context("`run` after the kill")?;
    let since = Instant::now();
    while !(is_done(rig, 0)? && is_done(rig, 1)?) {
        ensure!(since.elapsed() < PATIENCE, "the renewal does not end:\n{}", running.output());
        std::thread::sleep(Duration::from_millis(100));
    }
    rig.assert_state(state).with_context(|| format!("A:\n{}", running.output()))?;
    stop(running)?;
    rig.assert_before()?;
    rig.assert_no_drafts()?;
    let site = &rig.lab.sites[0];
    let text = fs::read_to_string(&site.config)?;
    for entry in fs::read_dir(site.config.with_file_name(""))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let is_named = text.contains(&format!("\"{name}\""));
        ensure!(is_named || !name.starts_with("wg"), "{name} was left, and the configuration does not name it");
    }
    Ok(())
}

pub fn killed_while_keys_are_renewed(kind: Kind) -> Result<()> {
    let operation = Operation {
        name: "rotate",
        tunnels: 2,
        configure: |_| Ok(()),
        prepare: prepared,
        act: renew,
        recover: goes_on,
    };
    operation.at_each_point(kind)
}
