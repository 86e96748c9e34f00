//! Changes the policy while traffic flows. Only the links may lose packets, and `policy show` must be right.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::interrupt;
use lab::sites::{Lab, Overrides};
use lab::traffic::{ShortLoad, UdpLoad};
use serde_json::{Value, json};

use crate::arguments::Arguments;
use crate::report::{self, number, verdict};
use lab::comparison::{Comparison, Links, PAUSE};

/// Number of changes in a run, and the time over which they are spread.
const CHANGES: u32 = 100;
const TIME: Duration = Duration::from_secs(10);
const RUNS: u32 = 1;
/// Both loads together fit into one tunnel of 10 Mbit/s, whatever a change does.
const UDP_FLOWS: usize = 8;
const UDP_PAYLOAD: usize = 500;
const UDP_RATE: f64 = 3.0;
const TCP_BYTES: usize = 30_000;
const TCP_RATE: f64 = 2.0;

/// A change, and the value that `policy show` must have after it.
struct Change {
    line: &'static str,
    pointer: &'static str,
    expected: Value,
}

fn changes() -> [Change; 10] {
    let change = |line, pointer, expected| Change { line, pointer, expected };
    let policy = "/peers/0/policy";
    let weight = "/peers/0/tunnels/1/weight";
    [
        change("set hash", policy, json!("hash")),
        change("weight wg1 3", weight, json!(3)),
        change("set flowlet", policy, json!("flowlet")),
        change("rule add --proto udp --policy hash --tunnels wg0,wg2", "/rules/0/tunnels", json!(["wg0", "wg2"])),
        change("set spray", policy, json!("spray")),
        change("rule del 1", "/rules", json!([])),
        change("weight wg1 1", weight, json!(1)),
        change("pin wg2 --dst 10.20.0.10 --proto tcp", "/rules/0/pin", json!(true)),
        change("set adaptive", policy, json!("adaptive")),
        change("unpin --dst 10.20.0.10 --proto tcp", "/rules", json!([])),
    ]
}

/// The result of one run.
struct Sample {
    took: Duration,
    sent: u32,
    lost: u32,
    dropped_by_links: u64,
    dropped_by_program: Value,
}

/// Measures and prints.
pub fn measure(arguments: &Arguments, program: &Path) -> Result<()> {
    let title = format!("{CHANGES} changes of policy under TCP and UDP load");
    eprintln!("==> {title}: building two sites");
    let links = Links::alike(arguments.simulated, arguments.rate());
    let comparison = Comparison::new(program, arguments.policy("adaptive"), &links, &Overrides::default())?;
    let mut table = report::table(&["run", "changes took", "datagrams", "lost", "dropped by the links", "target"]);
    let mut rows = Vec::new();
    for run in 1..=arguments.runs(RUNS) {
        interrupt::check()?;
        let sample = one_run(&comparison.lab, arguments.seed_of(run))?;
        let quiet = sample.dropped_by_program.as_object().is_some_and(|reasons| reasons.values().all(|n| n == 0));
        let met = u64::from(sample.lost) <= sample.dropped_by_links && quiet;
        let mut cells = vec![comfy_table::Cell::new(run)];
        let numbers = [
            format!("{:.1} s", sample.took.as_secs_f64()),
            sample.sent.to_string(),
            sample.lost.to_string(),
            sample.dropped_by_links.to_string(),
        ];
        cells.extend(numbers.map(number));
        cells.push(comfy_table::Cell::new(verdict("none lost but by the links", met)));
        table.add_row(cells);
        rows.push(json!({
            "seconds": sample.took.as_secs_f64(),
            "sent": sample.sent,
            "lost": sample.lost,
            "dropped_by_links": sample.dropped_by_links,
            "dropped_by_program": sample.dropped_by_program,
            "target": {"wanted": "lost <= dropped_by_links", "met": met},
        }));
    }
    println!("\n{title}; `policy show` was true after each\n{table}\n");
    report::json(&json!({"series": title, "rows": rows}));
    Ok(())
}

fn one_run(lab: &Lab, seed: u64) -> Result<Sample> {
    let before = dropped_by_links(lab)?;
    let program_before = lab.stats(0)?["dropped"].clone();
    let path = lab.path_v4();
    let seconds = (TIME + Duration::from_secs(2)).as_secs_f64();
    let (took, report) = thread::scope(|scope| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small positive numbers")]
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let udp = scope.spawn(move || {
            let each = UDP_RATE * 1e6 / (UDP_FLOWS * UDP_PAYLOAD * 8) as f64;
            let packets = (seconds * each) as u32;
            UdpLoad { flows: UDP_FLOWS, packets, payload: UDP_PAYLOAD, rate: UDP_RATE }.run(path)
        });
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small positive numbers")]
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let tcp = scope.spawn(move || {
            let gap = TCP_BYTES as f64 * 8.0 / (TCP_RATE * 1e6);
            let count = (seconds / gap) as usize;
            ShortLoad { count, bytes: TCP_BYTES, mean_gap: Duration::from_secs_f64(gap), seed }.run(path)
        });
        let took = change_all(lab);
        let report = udp.join().expect("the datagrams do not panic").context("the datagrams");
        // This fails unless every byte arrived.
        tcp.join().expect("the transfers do not panic").context("the TCP transfers")?;
        anyhow::Ok((took?, report?))
    })?;
    interrupt::sleep(PAUSE);
    let mut dropped_by_program = lab.stats(0)?["dropped"].clone();
    for (reason, count) in dropped_by_program.as_object_mut().context("stats count drops by reason")? {
        *count = json!(count.as_u64().unwrap_or(0) - program_before[reason].as_u64().unwrap_or(0));
    }
    Ok(Sample {
        took,
        sent: report.sent(),
        lost: report.sent() - report.received(),
        dropped_by_links: dropped_by_links(lab)? - before,
        dropped_by_program,
    })
}

/// Makes the changes and checks each one. Returns how long all took: [`TIME`], or longer on a slow machine.
fn change_all(lab: &Lab) -> Result<Duration> {
    let mut batch = lab.batch(0)?;
    let start = Instant::now();
    for (number, change) in (0..CHANGES).zip(changes().iter().cycle()) {
        interrupt::sleep((TIME / CHANGES * number).saturating_sub(start.elapsed()));
        interrupt::check()?;
        let shown = batch.change(change.line)?;
        let (found, expected) = (shown.pointer(change.pointer), &change.expected);
        ensure!(found == Some(expected), "after `{}` it shows {found:?} and not {expected}", change.line);
    }
    Ok(start.elapsed())
}

/// Packets that shapers and devices of the gateways have dropped so far, in both directions.
fn dropped_by_links(lab: &Lab) -> Result<u64> {
    let mut sum = 0;
    for site in &lab.sites {
        let qdiscs: Vec<Value> = serde_json::from_str(&site.gateway.query("tc", "-s -j qdisc show")?)?;
        sum += qdiscs.iter().filter_map(|qdisc| qdisc["drops"].as_u64()).sum::<u64>();
        let links: Vec<Value> = serde_json::from_str(&site.gateway.query("ip", "-s -j link show")?)?;
        let dropped = |link: &Value, side: &str| link["stats64"][side]["dropped"].as_u64().unwrap_or(0);
        sum += links.iter().map(|link| dropped(link, "tx") + dropped(link, "rx")).sum::<u64>();
    }
    Ok(sum)
}
