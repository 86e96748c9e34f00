//! Changes the policy many times and checks after each change that `policy show` reports it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::sites::Lab;

#[derive(Clone, Copy, Debug)]
pub struct ChangeReport {
    /// Number of changes. `policy show` was right after each.
    pub changes: usize,
    /// How long all of them took together.
    pub time: Duration,
    /// How long the slowest change took, without `policy show`.
    pub longest: Duration,
}

/// Makes `count` changes at site A of a running lab, evenly over `time`: policies, weights, drains, rules and pins.
/// The lab must have three tunnels, wg0 to wg2.
///
/// # Errors
/// A change failed, or `policy show` does not report it.
pub fn make_changes(lab: &Lab, count: usize, time: Duration) -> Result<ChangeReport> {
    let start = Instant::now();
    let mut longest = Duration::ZERO;
    for number in 0..count {
        let due = time.mul_f64(f64::from(u32::try_from(number)?) / f64::from(u32::try_from(count)?));
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        let (arguments, is_true) = change(number);
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let began = Instant::now();
        policy(lab, &arguments)?;
        longest = longest.max(began.elapsed());
        let shown = show(lab)?;
        ensure!(is_true(&shown), "after `policy {}` it shows {shown:#}", arguments.join(" "));
    }
    Ok(ChangeReport { changes: count, time: start.elapsed(), longest })
}

type IsTrue = fn(&Value) -> bool;

/// The arguments of change `number`, and a check of what `policy show` must report after it. After a whole round the
/// policy is as it was before.
fn change(number: usize) -> (&'static str, IsTrue) {
    const ROUND: [(&str, IsTrue); 14] = [
        ("set flowlet", |shown| shown["peers"][0]["policy"] == "flowlet"),
        ("weight wg0 3", |shown| shown["peers"][0]["tunnels"][0]["weight"] == 3),
        ("rule add --proto udp --policy hash", |shown| shown["rules"][0]["proto"] == "udp"),
        ("set spray", |shown| shown["peers"][0]["policy"] == "spray"),
        ("drain wg1 --deadline 0", |shown| shown["peers"][0]["tunnels"][1]["open"] == false),
        ("rule add --proto tcp --tunnels wg0,wg2 --at 1", |shown| {
            shown["rules"][0]["tunnels"] == serde_json::json!(["wg0", "wg2"]) && shown["rules"][1]["proto"] == "udp"
        }),
        ("weight wg0 auto", |shown| shown["peers"][0]["tunnels"][0]["weight_is_learned"] == true),
        ("undrain wg1", |shown| shown["peers"][0]["tunnels"][1]["open"] == true),
        ("pin wg2 --proto tcp", |shown| shown["rules"][0]["pin"] == true && rules(shown) == 3),
        ("set adaptive", |shown| shown["peers"][0]["policy"] == "adaptive"),
        ("rule del 2", |shown| rules(shown) == 2 && shown["rules"][1]["proto"] == "udp"),
        ("unpin --proto tcp", |shown| rules(shown) == 1 && shown["rules"][0]["pin"] == false),
        ("weight wg0 1", |shown| shown["peers"][0]["tunnels"][0]["weight"] == 1),
        ("rule del 1", |shown| rules(shown) == 0),
    ];
    ROUND[number % ROUND.len()]
}

fn rules(shown: &Value) -> usize {
    shown["rules"].as_array().map_or(0, Vec::len)
}

/// Runs `ecmpvpn policy ARGUMENTS…` at site A and returns its standard output.
///
/// # Errors
/// Its exit code is not 0.
pub fn policy(lab: &Lab, arguments: &[&str]) -> Result<String> {
    let (code, output, complaint) = lab.ecmpvpn(0, &[&["policy"], arguments].concat())?;
    ensure!(code == 0, "`policy {}` ended with {code}: {complaint}", arguments.join(" "));
    Ok(output)
}

/// Returns what `ecmpvpn policy show --json` reports at site A.
///
/// # Errors
/// The command failed.
pub fn show(lab: &Lab) -> Result<Value> {
    let output = policy(lab, &["show", "--json"])?;
    serde_json::from_str(&output).with_context(|| format!("reading `policy show --json`: {output}"))
}
