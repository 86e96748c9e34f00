//! Tunnels that die and come back, with both backends; how many trials and how long a soak is asked for by the
//! environment, so that `cargo xtask bench failover` and `soak` run the same tests in full.

mod blackhole;
mod soak;
mod watch;

use std::env;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ecmpvpn::dataplane::{Pins, View};
use lab::sites::{Lab, Options, Running, Underlay, binary};
use lab::skip::{Feature, requires};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

/// Tunnels between the sites.
const TUNNELS: usize = 4;

/// What carries the tunnels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Userspace,
    Kernel,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::Kernel => "kernel_and_bond",
        }
    }

    /// Of a link that is to be full, 10^6 bits a second: what carries the tunnels must not be the limit. Where that is an
    /// emulated CPU, less is asked for.
    fn rate(self) -> Result<f64> {
        Ok(match self {
            Self::Userspace => 8.0,
            Self::Kernel => f64::from(asked("ECMPVPN_RATE", 100)?),
        })
    }

    fn needs(self) -> &'static [Feature] {
        match self {
            Self::Userspace => &[Feature::Tun],
            Self::Kernel => &[Feature::WireGuard, Feature::Bonding],
        }
    }

    fn lab(self) -> Result<Lab> {
        let (underlay, backend) = match self {
            Self::Userspace => (Underlay::Routed, "userspace"),
            Self::Kernel => (Underlay::Bonded, "kernel"),
        };
        let options = Options { underlay, backend, members: 2, tunnels: TUNNELS, ..Options::default() };
        let lab = Lab::new(options, &binary()?)?;
        for site in &lab.sites {
            // So that flows of a steady stream return as soon as their tunnel does.
            let text = fs::read_to_string(&site.config)?;
            let shorter = text.replacen("flowlet_gap_us = \"auto\"", "flowlet_gap_us = 20000", 1);
            ensure!(text != shorter, "the gap is not where it was:\n{text}");
            fs::write(&site.config, shorter)?;
        }
        Ok(lab)
    }
}

type Test = fn(Kind) -> Result<()>;

fn main() {
    let tests: [(&str, Test); 5] = [
        ("a_blackholed_tunnel_is_left_and_taken_again", blackhole::a_blackholed_tunnel_is_left_and_taken_again),
        ("a_standstill_of_all_tunnels_kills_none", blackhole::a_standstill_of_all_tunnels_kills_none),
        ("tcp_survives_and_full_tunnels_do_not_die", blackhole::tcp_survives_and_full_tunnels_do_not_die),
        ("without_any_tunnel_traffic_is_refused", blackhole::without_any_tunnel_traffic_is_refused),
        ("a_tunnel_started_anew_leaves_the_others_alone", watch::a_tunnel_started_anew_leaves_the_others_alone),
    ];
    let mut trials = Vec::new();
    for kind in [Kind::Userspace, Kind::Kernel] {
        trials.extend(tests.map(|(name, test)| trial(name, kind, test)));
    }
    // In userspace the tunnels stand still when this machine is busy, and then they are rightly taken for dead.
    let soak = "full_and_lossy_links_are_no_false_alarm";
    trials.push(trial(soak, Kind::Kernel, soak::full_and_lossy_links_are_no_false_alarm));
    let mut arguments = Arguments::from_args();
    // Times are measured.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: &str, kind: Kind, test: Test) -> Trial {
    requires(kind.needs(), &format!("{}::{name}", kind.name()), move || {
        test(kind).map_err(|error| {
            for line in lab::log::lines(&[]).iter().rev().take(40).rev() {
                eprintln!("  {line}");
            }
            Failed::from(format!("{error:#}"))
        })
    })
}

/// A number that the environment may ask for.
fn asked(variable: &str, default: u32) -> Result<u32> {
    env::var(variable).map_or(Ok(default), |text| text.parse().with_context(|| format!("{variable}={text}")))
}

/// Both sites' maps.
fn views(lab: &Lab) -> Result<[View; 2]> {
    let open = |site: usize| Ok::<_, anyhow::Error>(View::open(&Pins::of(&lab.sites[site].name))?);
    Ok([open(0)?, open(1)?])
}

/// A peer's live tunnels, a bit each.
fn live(view: &View) -> u32 {
    view.peers()[0].live
}

/// All tunnels in use for so long: that is no bond in the making any more.
const SETTLED: Duration = Duration::from_secs(2);

const ALL: u32 = (1 << TUNNELS) - 1;

/// Waits until both sites use the tunnels of `wanted`, and says what `run` said if they do not.
fn wait_until_live(lab: &Lab, views: &[View; 2], wanted: [u32; 2], running: &mut [Running; 2]) -> Result<()> {
    let start = Instant::now();
    while [live(&views[0]), live(&views[1])] != wanted {
        if start.elapsed() > Duration::from_secs(20) {
            let found = [live(&views[0]), live(&views[1])];
            let stats = [lab.ecmpvpn(0, &["stats"])?.1, lab.ecmpvpn(1, &["stats"])?.1].concat();
            let output = running.iter_mut().map(|run| run.output()).collect::<String>();
            bail!("live are {found:?} and not {wanted:?}, a bit each:\n{stats}\n{output}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until all tunnels are in use and stay so: while a bond agrees with its partner on its ports, packets on some of
/// them get lost, and the tunnels there rightly die. How often each site's tunnels have died until then.
fn settle(lab: &Lab, views: &[View; 2], running: &mut [Running; 2]) -> Result<[Vec<i64>; 2]> {
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

/// What both sites said of tunnels that died or came back.
fn told(running: &[Running; 2]) -> String {
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

/// How often a site's tunnels have died since it settled.
fn deaths(lab: &Lab, site: usize, settled: &[Vec<i64>; 2]) -> Result<Vec<i64>> {
    let all = of_tunnels(&lab.stats(site)?, "deaths")?;
    Ok(all.iter().zip(&settled[site]).map(|(all, before)| all - before).collect())
}

/// Every tunnel's `field` of `stats --json`.
fn of_tunnels(stats: &Value, field: &str) -> Result<Vec<i64>> {
    let tunnels = stats["tunnels"].as_array().context("stats list the tunnels")?;
    tunnels.iter().map(|tunnel| tunnel[field].as_i64().with_context(|| format!("no {field}"))).collect()
}
