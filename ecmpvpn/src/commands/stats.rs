//! `stats`: shows the traffic through each tunnel.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::cli::StatsArgs;
use crate::commands::{Failure, Invocation, Known, print};
use crate::dataplane::Pins;
use crate::host::Netlink;
use crate::live::stats;
use crate::report::stats::Report;

/// The rates of a single report are measured over this time.
const SAMPLE: Duration = Duration::from_millis(250);
/// Time between the reports of `--watch`.
const WATCH: Duration = Duration::from_secs(1);

/// Prints the counters of the site.
pub async fn run(invocation: Invocation<'_>, args: &StatsArgs) -> Result<(), Failure> {
    let site = invocation.find()?;
    let pins = Pins::of(&site.name);
    let netlink = Netlink::open().map_err(anyhow::Error::new)?;
    let mut earlier = sample(&site, &pins, &netlink).await?;
    site.warn("endpoints and bond members are left out");
    let mut pause = SAMPLE;
    loop {
        tokio::time::sleep(pause).await;
        let mut now = sample(&site, &pins, &netlink).await?;
        now.report.set_rates(&earlier.report, (now.at - earlier.at).as_secs_f64());
        print(render(&now.report, args)?)?;
        if !args.watch {
            return Ok(());
        }
        (earlier, pause) = (now, WATCH);
    }
}

struct Sample {
    at: Instant,
    report: Report,
}

async fn sample(site: &Known, pins: &Pins, netlink: &Netlink) -> Result<Sample, Failure> {
    let report = stats::report(&site.name, site.config(), pins, netlink).await?;
    Ok(Sample { at: Instant::now(), report })
}

fn render(report: &Report, args: &StatsArgs) -> Result<String, Failure> {
    if !args.json {
        return Ok(report.to_string());
    }
    let json = if args.watch { serde_json::to_string(report) } else { serde_json::to_string_pretty(report) };
    Ok(json.context("writing JSON")?)
}
