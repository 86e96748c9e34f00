//! Changes by `policy` outlive the process. Changed values of the configuration are applied.

use anyhow::{Context as _, Result, ensure};
use lab::sites::Lab;
use rustix::process::Signal;
use serde_json::Value;

use super::stage::{Kind, rewrite};

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

pub fn live_changes_stay_and_changed_values_are_taken(kind: Kind) -> Result<()> {
    let lab = kind.lab(3)?;
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
