//! A running site while files cannot be written.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::kind::Kind;
use lab::sites::Running;
use rustix::process::Signal;

use crate::choice::Choice;
use crate::rig::{Rig, stop};

/// The two ways, and what the message must say.
const WAYS: [(i32, &str, &str); 2] =
    [(28, "No space left on device", "free some space"), (30, "Read-only file system", "mount it writable")];

fn wait_until_said(running: &mut Running, words: &str) -> Result<()> {
    let since = Instant::now();
    while !running.output().contains(words) {
        ensure!(running.ended()?.is_none(), "`run` has ended:\n{}", running.output());
        ensure!(since.elapsed() < Duration::from_secs(60), "it does not say {words:?}:\n{}", running.output());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// `run` ends and leaves nothing, or comes up. Then it goes down, still on the full disk.
fn bring_up(rig: &Rig, order: &str, what: &str, advice: &str) -> Result<()> {
    rig.order(order)?;
    let mut running = rig.start()?;
    rig.is_up_or_ended(&mut running)?;
    if running.ended()?.is_none() {
        stop(running)?;
    } else {
        let status = running.wait()?;
        let output = running.output();
        let complaints: Vec<&str> = output.lines().filter(|line| line.starts_with("ecmpvpn:")).collect();
        ensure!(status.code() == Some(1) && complaints.len() == 1, "{order}: it ended with {status}:\n{output}");
        ensure!(complaints[0].contains(what) && complaints[0].contains(advice), "{order}: {output}");
    }
    rig.assert_before()?;
    rig.disarm();
    Ok(())
}

/// The tunnels answer, as `before`.
fn goes_on(rig: &Rig, running: &mut Running) -> Result<()> {
    ensure!(running.ended()?.is_none(), "`run` has ended:\n{}", running.output());
    rig.answers()
}

pub fn a_full_disk_leaves_the_site_as_it_is(kind: Kind) -> Result<()> {
    let rig = Rig::new(kind, 2, |_| Ok(()))?;
    rig.order("count")?;
    stop(rig.up()?)?;
    let writes = rig.disarm().iter().filter(|point| point.starts_with("write ")).count();
    for number in Choice::among(writes)? {
        for (errno, what, advice) in WAYS {
            bring_up(&rig, &format!("full {number} {errno}"), what, advice)?;
        }
    }
    let config = &rig.lab.sites[0].config;
    let sound = fs::read_to_string(config)?;
    for (errno, what, advice) in WAYS {
        let mut running = rig.up()?;
        rig.answers()?;
        // A reload that would need an entry in the journal.
        let changed = sound.replacen("10.20.0.0/16", "10.20.0.0/17\", \"10.20.128.0/17", 1);
        ensure!(changed != sound, "no prefix in:\n{sound}");
        fs::write(config, &changed)?;
        rig.order(&format!("full 1 {errno}"))?;
        running.signal(Signal::HUP)?;
        wait_until_said(&mut running, "not reloaded")?;
        let output = running.output();
        let line = output.lines().find(|line| line.contains("not reloaded")).unwrap_or_default().to_owned();
        ensure!(line.contains(what) && line.contains(advice), "{line}");
        fs::write(config, &sound)?;
        goes_on(&rig, &mut running)?;
        // What is saved, is in force but not saved.
        let ended = rig.output(&["policy", "set", "flowlet", "--save"])?;
        let complaint = String::from_utf8_lossy(&ended.stderr).into_owned();
        ensure!(ended.status.code() == Some(1), "{}: {complaint}", ended.status);
        ensure!(complaint.lines().count() == 1 && complaint.contains(what), "{complaint}");
        ensure!(complaint.contains(advice), "{complaint}");
        ensure!(fs::read_to_string(config)? == sound, "the configuration was changed");
        goes_on(&rig, &mut running)?;
        stop(running)?;
        rig.disarm();
        rig.assert_before()?;
    }
    Ok(())
}
