//! A lab, a stream through it, and helpers for both.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lab::kind::Kind;
use lab::log;
use lab::sites::{Lab, Options, binary};
use lab::traffic::Stream;
use serde_json::Value;

/// Packets a second.
const RATE: u32 = 1_000;
/// Number of flows. They are spread over all tunnels.
const FLOWS: usize = 32;
/// How long a stream runs before and after the event under test.
const MARGIN: Duration = Duration::from_millis(500);

pub fn lab(kind: Kind, tunnels: usize) -> Result<Lab> {
    Lab::new(Options { tunnels, ..kind.options() }, &binary()?)
}

/// Runs a stream from A's LAN to B's during `meanwhile`, and a little longer. Returns how many packets were sent.
///
/// # Errors
/// More than `allowed` packets were lost. The error says which.
pub fn stream(lab: &Lab, allowed: usize, meanwhile: impl FnOnce() -> Result<()>) -> Result<u64> {
    let stream = Stream::start(lab.path_v4(), FLOWS, RATE)?;
    let since = stream.started();
    log::note("the stream begins");
    thread::sleep(MARGIN);
    let done = meanwhile();
    thread::sleep(MARGIN);
    log::note("the stream ends");
    let report = stream.stop()?;
    done?;
    let outages = report.outages();
    let description = outages.iter().take(20).map(|outage| {
        let (from, to) = (outage.from - since, outage.last - since);
        format!("\n  {} of flow {}, sent {from:.3?} to {to:.3?} after the first", outage.lost, outage.flow)
    });
    let description =
        format!("{} of {} packets were lost{}", report.lost(), report.sent(), description.collect::<String>());
    if report.lost() > allowed {
        bail!("{description}\n{}", whereabouts(lab)?);
    }
    eprintln!("{description}");
    Ok(u64::try_from(report.sent())?)
}

/// The counters of every device, bond, network stack and `ecmpvpn`, which show where packets may have been dropped.
fn whereabouts(lab: &Lab) -> Result<String> {
    let mut parts = Vec::new();
    for site in &lab.sites {
        for machine in [&site.gateway, &site.host] {
            let of_kernel = |file: &str| {
                machine.run(|| fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default())
            };
            parts.extend([site.name.clone(), machine.query("ip", "-s -o link show")?]);
            parts.extend(["snmp", "softnet_stat", "bonding/bond0"].map(of_kernel));
        }
    }
    parts.extend([lab.ecmpvpn(0, &["stats"])?.1, lab.ecmpvpn(1, &["stats"])?.1]);
    Ok(parts.join("\n"))
}

/// The sum of a counter over all tunnels.
pub fn total(stats: &Value, field: &str) -> u64 {
    let tunnels = stats["tunnels"].as_array().expect("stats list the tunnels");
    tunnels.iter().filter_map(|tunnel| tunnel[field].as_u64()).sum()
}

/// The interfaces' indexes, by name.
pub fn indexes(lab: &Lab, site: usize) -> Result<Vec<(String, u64)>> {
    let text = lab.sites[site].gateway.query("ip", "-j link show")?;
    let links: Vec<Value> = serde_json::from_str(&text)?;
    let index = |link: &Value| Some((link["ifname"].as_str()?.to_owned(), link["ifindex"].as_u64()?));
    links.iter().map(|link| index(link).context("a link without a name")).collect()
}

/// Changes the text of a site's configuration with `change`.
pub fn rewrite(lab: &Lab, site: usize, change: impl FnOnce(&str) -> String) -> Result<()> {
    let path = &lab.sites[site].config;
    let text = fs::read_to_string(path)?;
    let changed = change(&text);
    ensure!(changed != text, "the configuration is not changed:\n{text}");
    fs::write(path, changed)?;
    Ok(())
}

/// Splits a configuration into blocks, each from its header to the next.
pub fn blocks(text: &str) -> Vec<String> {
    let mut blocks = vec![String::new()];
    for line in text.lines() {
        if line.starts_with('[') {
            blocks.push(String::new());
        }
        let block = blocks.last_mut().expect("there is one");
        block.push_str(line);
        block.push('\n');
    }
    blocks
}
