//! A lab whose site A is run by systemd.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::kind::Kind;
use lab::sites::{Lab, Running, binary};
use lab::traffic::{Stream, TcpLoad};
use serde_json::Value;

use super::machine::{Machine, without_persist};

const PATIENCE: Duration = Duration::from_secs(60);
/// Number of flows of a stream, and its packets a second.
const FLOWS: usize = 32;
const RATE: u32 = 1_000;
/// How long a stream runs before and after the event under test.
const MARGIN: Duration = Duration::from_millis(500);

/// A lab, in which ecmpvpn runs at B.
pub fn lab(kind: Kind) -> Result<(Lab, Running)> {
    let lab = Lab::new(kind.options(), &binary()?)?;
    let mut b = lab.start(1)?;
    b.wait_until_up()?;
    Ok((lab, b))
}

/// Boots systemd at A. `settings` change timings of the unit.
pub fn boot<'a>(lab: &'a Lab, kind: Kind, settings: &str) -> Result<Machine<'a>> {
    let command = if kind == Kind::Userspace { without_persist()? } else { String::new() };
    Machine::boot(lab, &(command + settings))
}

/// Waits until packets pass and A considers no tunnel down. Then bytes cross.
pub fn warm_up(lab: &Lab, machine: &Machine<'_>) -> Result<()> {
    lab.wait_until_reachable(PATIENCE)?;
    let start = Instant::now();
    while tunnels(&machine.stats()?).iter().any(|tunnel| tunnel["state"] == "down") {
        ensure!(start.elapsed() < PATIENCE, "a tunnel stays down: {}", machine.stats()?);
        thread::sleep(Duration::from_millis(100));
    }
    bytes_cross(lab)
}

pub fn bytes_cross(lab: &Lab) -> Result<()> {
    let received = TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received();
    ensure!(received == 400_000, "{received} bytes of 400000 came");
    Ok(())
}

/// The tunnels in what `stats --json` reports.
pub fn tunnels(stats: &Value) -> &[Value] {
    stats["tunnels"].as_array().map_or(&[], Vec::as_slice)
}

/// Changes the text of A's configuration with `change`, and returns the former text.
pub fn rewrite(lab: &Lab, change: impl FnOnce(&str) -> String) -> Result<String> {
    let path = &lab.sites[0].config;
    let text = fs::read_to_string(path)?;
    let changed = change(&text);
    ensure!(changed != text, "the configuration is not changed:\n{text}");
    fs::write(path, changed)?;
    Ok(text)
}

/// Runs a stream from A's LAN to B's during `meanwhile`, and a little longer.
///
/// # Errors
/// A packet was lost.
pub fn lossless<T>(lab: &Lab, meanwhile: impl FnOnce() -> Result<T>) -> Result<T> {
    let stream = Stream::start(lab.path_v4(), FLOWS, RATE)?;
    thread::sleep(MARGIN);
    let done = meanwhile();
    thread::sleep(MARGIN);
    let report = stream.stop()?;
    let done = done?;
    eprintln!("{} of {} packets were lost", report.lost(), report.sent());
    ensure!(report.lost() == 0, "packets were lost: {:?}", report.outages());
    Ok(done)
}
