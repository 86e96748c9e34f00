//! Changes by `policy` outlive the process. Changed values of the configuration are applied.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::kind::Kind;
use lab::sites::Lab;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::Value;

use super::stage::{lab, rewrite};

fn policy(lab: &Lab, words: &[&str]) -> Result<()> {
    let (code, _, complaint) = lab.ecmpvpn(0, &[&["policy"], words].concat())?;
    ensure!(code == 0, "`policy {}` ended with {code}: {complaint}", words.join(" "));
    Ok(())
}

/// The policy for B, wg0's weight, whether wg1 accepts flows, and the DSCPs of the rules.
fn observe(lab: &Lab) -> Result<(String, u64, bool, Vec<u64>)> {
    let (code, text, complaint) = lab.ecmpvpn(0, &["policy", "show", "--json"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    let shown: Value = serde_json::from_str(&text)?;
    let peer = &shown["peers"][0];
    let tunnel = |at: usize| &peer["tunnels"][at];
    let rules = shown["rules"].as_array().context("no rules")?;
    Ok((
        peer["policy"].as_str().context("no policy")?.to_owned(),
        tunnel(0)["weight"].as_u64().context("no weight")?,
        tunnel(1)["open"].as_bool().context("no state")?,
        rules.iter().filter_map(|rule| rule["dscp"].as_u64()).collect(),
    ))
}

/// `reload` and `policy` change the same records. While another process holds the lock of the maps, `reload` waits, and
/// gives up without a change; `run` still reacts.
pub fn a_reload_waits_for_the_lock_of_the_maps(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, b] = lab.run()?;
    let weigh = |weight: u32| {
        rewrite(&lab, 0, |text| {
            let line = |line: &str| {
                if line.starts_with("weight = ") { format!("weight = {weight}\n") } else { format!("{line}\n") }
            };
            text.lines().map(line).collect()
        })
    };
    let pins = Path::new("/sys/fs/bpf/ecmpvpn").join(&lab.sites[0].name);
    let dir = fs::read_dir(&pins)?.next().context("no pins")??.path();
    let held = File::open(&dir)?;
    flock(&held, FlockOperation::LockExclusive)?;
    weigh(3)?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(code == 1 && complaint.contains("held the lock"), "it ended with {code}: {complaint}");
    // It waits, and goes on when the lock is free.
    let waiting = std::thread::scope(|scope| {
        let reload = scope.spawn(|| lab.ecmpvpn(0, &["reload"]));
        std::thread::sleep(Duration::from_secs(1));
        drop(held);
        reload.join().expect("it does not panic")
    });
    let (code, _, complaint) = waiting?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    ensure!(observe(&lab)?.1 == 3, "{:?}", observe(&lab)?);
    // Held for ever, the lock does not keep `run` from ending.
    let held = File::open(&dir)?;
    flock(&held, FlockOperation::LockExclusive)?;
    ensure!(a.stop(Signal::TERM)?.success());
    drop(b);
    Ok(())
}

pub fn live_changes_stay_and_changed_values_are_taken(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, b] = lab.run()?;
    let drain = ["drain", "wg1", "--deadline", "1"];
    for words in
        [&["set", "spray"][..], &["weight", "wg0", "5"], &drain, &["rule", "add", "--dscp", "46", "--policy", "hash"]]
    {
        policy(&lab, words)?;
    }
    let changed = ("spray".to_owned(), 5, false, vec![46]);
    ensure!(observe(&lab)? == changed, "{:?}", observe(&lab)?);
    a.stop(Signal::KILL)?;
    let mut again = lab.start(0)?;
    again.wait_until_said("is up:")?;
    ensure!(observe(&lab)? == changed, "after SIGKILL: {:?}", observe(&lab)?);
    // The file changes some values. `reload` applies them and keeps the others.
    let rule = "\n[[rule]]\ndscp = 10\npolicy = \"spray\"\n";
    rewrite(&lab, 0, |text| {
        text.replacen("weight = 1 ", "weight = 3 ", 1).replacen("weight = 1\n", "weight = 3\n", 1) + rule
    })?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(code == 0, "`reload` ended with {code}: {complaint}");
    let reloaded = ("spray".to_owned(), 3, false, vec![10, 46]);
    ensure!(observe(&lab)? == reloaded, "after a reload: {:?}", observe(&lab)?);
    // The same between two runs.
    again.stop(Signal::KILL)?;
    rewrite(&lab, 0, |text| text.replacen("policy = \"hash\"", "policy = \"flowlet\"", 1).replacen(rule, "", 1))?;
    let mut last = lab.start(0)?;
    last.wait_until_said("is up:")?;
    let desired = ("flowlet".to_owned(), 3, false, vec![46]);
    ensure!(observe(&lab)? == desired, "after another run: {:?}", observe(&lab)?);
    lab.warm_up(&mut [last, b])
}
