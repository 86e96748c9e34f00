//! What the tests of this suite have in common.

use std::env;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ecmpvpn::dataplane::{Pins, View};
use lab::kind::Kind;
use lab::sites::{Lab, Options, Running, binary};
use serde_json::Value;

pub const TUNNELS: usize = 4;

/// Rate of a link that a test fills, 10^6 bits a second. The link must be the limit, and not what carries the tunnels.
/// For an emulated CPU, `ECMPVPN_RATE` sets a lower rate.
pub fn rate(kind: Kind) -> Result<f64> {
    Ok(match kind {
        Kind::Userspace => 8.0,
        Kind::Kernel => f64::from(setting("ECMPVPN_RATE", 100)?),
    })
}

pub fn lab(kind: Kind) -> Result<Lab> {
    let lab = Lab::new(Options { members: 2, tunnels: TUNNELS, ..kind.options() }, &binary()?)?;
    for site in &lab.sites {
        // With a short gap, the flows of a steady stream return as soon as their tunnel does.
        let text = fs::read_to_string(&site.config)?;
        let shorter = text.replacen("flowlet_gap_us = \"auto\"", "flowlet_gap_us = 20000", 1);
        ensure!(text != shorter, "the gap is not where it was:\n{text}");
        fs::write(&site.config, shorter)?;
    }
    Ok(lab)
}

/// A number from an environment variable, or `default`.
pub fn setting(variable: &str, default: u32) -> Result<u32> {
    env::var(variable).map_or(Ok(default), |text| text.parse().with_context(|| format!("{variable}={text}")))
}

/// Both sites' maps.
pub fn views(lab: &Lab) -> Result<[View; 2]> {
    let open = |site: usize| Ok::<_, anyhow::Error>(View::open(&Pins::of(&lab.sites[site].name))?);
    Ok([open(0)?, open(1)?])
}

/// The live tunnels of the first peer, one bit each.
pub fn live(view: &View) -> u32 {
    view.peers()[0].live
}

/// If all tunnels are in use for this long, the bond has finished its LACP negotiation.
const SETTLED: Duration = Duration::from_secs(2);

pub const ALL: u32 = (1 << TUNNELS) - 1;

/// Waits until both sites use the tunnels in `desired`. The error contains the output of `run`.
pub fn wait_until_live(lab: &Lab, views: &[View; 2], desired: [u32; 2], running: &mut [Running; 2]) -> Result<()> {
    let start = Instant::now();
    while [live(&views[0]), live(&views[1])] != desired {
        if start.elapsed() > Duration::from_secs(20) {
            let found = [live(&views[0]), live(&views[1])];
            let stats = [lab.ecmpvpn(0, &["stats"])?.1, lab.ecmpvpn(1, &["stats"])?.1].concat();
            let output = running.iter_mut().map(|run| run.output()).collect::<String>();
            bail!("live are {found:?} and not {desired:?}, a bit each:\n{stats}\n{output}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until all tunnels are in use and stay so. While a bond negotiates its ports with its partner, packets on some
/// of them are lost, and the tunnels there rightly go down. Returns how often each site's tunnels have gone down until
/// then.
pub fn wait_until_settled(lab: &Lab, views: &[View; 2], running: &mut [Running; 2]) -> Result<[Vec<i64>; 2]> {
    let mut before = None;
    for _ in 0..10 {
        wait_until_live(lab, views, [ALL, ALL], running)?;
        let deaths = [of_tunnels(&lab.stats(0)?, "deaths")?, of_tunnels(&lab.stats(1)?, "deaths")?];
        if before.as_ref() == Some(&deaths) {
            return Ok(deaths);
        }
        before = Some(deaths);
        std::thread::sleep(SETTLED);
    }
    bail!("tunnels die again and again: {before:?}")
}

/// The log lines of both sites about tunnels that went down or came up.
pub fn describe(running: &[Running; 2]) -> String {
    let turns = |run: &Running| {
        let lines: Vec<String> = run
            .output()
            .lines()
            .filter(|line| line.contains(" is down: ") || line.contains(" is up again"))
            .map(str::to_owned)
            .collect();
        format!("\n{}:\n{}", run.site(), lines.join("\n"))
    };
    running.iter().map(turns).collect()
}

/// How often a site's tunnels have gone down since `settled`.
pub fn deaths(lab: &Lab, site: usize, settled: &[Vec<i64>; 2]) -> Result<Vec<i64>> {
    let all = of_tunnels(&lab.stats(site)?, "deaths")?;
    Ok(all.iter().zip(&settled[site]).map(|(all, before)| all - before).collect())
}

/// Every tunnel's `field` of `stats --json`.
pub fn of_tunnels(stats: &Value, field: &str) -> Result<Vec<i64>> {
    let tunnels = stats["tunnels"].as_array().context("stats list the tunnels")?;
    tunnels.iter().map(|tunnel| tunnel[field].as_i64().with_context(|| format!("no {field}"))).collect()
}
