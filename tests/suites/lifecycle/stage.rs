//! A lab, a stream through it, and what stays the same meanwhile.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::sites::{Lab, Options, Underlay, binary};
use lab::traffic::{UdpLoad, UdpReport};
use serde_json::Value;

/// Packets a second.
const RATE: u32 = 1_000;
/// Source ports: they are spread over all tunnels.
const FLOWS: u32 = 32;
/// UDP payload, bytes.
const PAYLOAD: usize = 200;

/// What carries the tunnels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Userspace,
    Kernel,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::Kernel => "kernel_and_bond",
        }
    }

    pub fn lab(self, tunnels: usize) -> Result<Lab> {
        let (underlay, backend) = match self {
            Self::Userspace => (Underlay::Routed, "userspace"),
            Self::Kernel => (Underlay::Bonded, "kernel"),
        };
        Lab::new(Options { underlay, backend, tunnels, ..Options::default() }, &binary()?)
    }
}

/// Sends a stream from A's LAN to B's for so long while `meanwhile` happens, which must end before it.
pub fn stream(lab: &Lab, time: Duration, meanwhile: impl FnOnce() -> Result<()>) -> Result<UdpReport> {
    let packets = u32::try_from(time.as_millis())? * RATE / 1000 / FLOWS;
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let rate = PAYLOAD as f64 * 8.0 * f64::from(RATE) / 1e6;
    let load = UdpLoad { flows: FLOWS as usize, packets, payload: PAYLOAD, rate };
    thread::scope(|scope| {
        let stream = scope.spawn(|| load.run(lab.path_v4()));
        // The first packets find the neighbours.
        thread::sleep(Duration::from_millis(500));
        let done = meanwhile();
        let outlasted = !stream.is_finished();
        let report = stream.join().expect("the stream does not panic")?;
        done?;
        ensure!(outlasted, "the stream ended before what was to happen under it");
        Ok(report)
    })
}

/// How many packets of a stream never came.
pub fn lost(report: &UdpReport) -> u32 {
    report.sent() - report.received()
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

/// A site's configuration with `change` made to its text.
pub fn rewrite(lab: &Lab, site: usize, change: impl FnOnce(&str) -> String) -> Result<()> {
    let path = &lab.sites[site].config;
    let text = fs::read_to_string(path)?;
    let changed = change(&text);
    ensure!(changed != text, "the configuration is not changed:\n{text}");
    fs::write(path, changed)?;
    Ok(())
}

/// The blocks of a configuration, each from its header to the next.
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
