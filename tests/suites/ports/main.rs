//! Measures how much planned ports gain on a real bond, and which members the tunnels use when one fails.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod arrivals;

use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::XmitHashPolicy;
use ecmpvpn::plan::bond_hash::{self, OuterFlow};
use lab::sites::{Lab, Options, Running, Underlay, binary};
use lab::skip::{self, Feature, Tier, requires};
use lab::tests;
use lab::traffic::TcpLoad;

/// Rate of each member, Mbit/s. An emulated machine can encrypt more than three times this, even on a busy host.
const RATE: f64 = 2.5;
/// How often the goodput is measured. A hash may leave a tunnel without a flow. With the median of three measurements,
/// that matters only once in hundreds of runs.
const DRAWS: usize = 3;

/// Members join, fail and return, with tcx and with clsact.
const TIERS: [Tier; 3] = [Tier::Here, Tier::Simulated, Tier::Clsact];

type Test = (&'static str, fn() -> Result<()>);

fn main() {
    let tests: &[Test] = &tests![
        planned_ports_carry_more_than_equal_ports,
        tunnels_spread_again_when_a_member_fails,
        arrivals::tunnels_arrive_where_the_far_bond_sends_them,
        arrivals::equal_ports_arrive_on_one_member_and_are_replanned,
    ];
    let features = [Feature::WireGuard, Feature::Bonding];
    skip::run(tests.iter().map(|(name, test)| requires(&TIERS, &features, name, *test)));
}

fn lab(ports: Option<Vec<[u16; 2]>>) -> Result<(Lab, [Running; 2])> {
    let options =
        Options { underlay: Underlay::Bonded, backend: "kernel", rate: Some(RATE), ports, ..Options::default() };
    let lab = Lab::new(options, &binary()?)?;
    let running = lab.run()?;
    Ok((lab, running))
}

/// Goodput of 12 TCP flows, Mbit/s, and a description of what each tunnel carried.
fn goodput(ports: Option<Vec<[u16; 2]>>) -> Result<(f64, String)> {
    let (lab, _running) = lab(ports)?;
    let mut draws = Vec::new();
    for _ in 0..DRAWS {
        draws.push(TcpLoad::timed(12, 6.0).run(lab.path_v4())?.goodput());
    }
    let mut description = format!("draws {draws:.1?}");
    for tunnel in lab.stats(0)?["tunnels"].as_array().context("stats list the tunnels")? {
        let of = |name: &str| tunnel[name].clone();
        let [name, member, state, deaths] = ["name", "member", "state", "deaths"].map(of);
        let [bytes, flowlets, rebalanced] = ["tx_bytes", "flowlet_moves", "rebalance_moves"].map(of);
        write!(
            description,
            "; {name} on {member} is {state}, died {deaths} times, sent {bytes} bytes, {flowlets} and {rebalanced} moves"
        )?;
    }
    draws.sort_by(f64::total_cmp);
    Ok((draws[DRAWS / 2], description))
}

fn planned_ports_carry_more_than_equal_ports() -> Result<()> {
    let (equal, _) = goodput(Some(vec![[5000; 2], [5001; 2], [5002; 2]]))?;
    let (planned, description) = goodput(None)?;
    eprintln!("planned ports: {description}");
    eprintln!("12 flows, 3 members of {RATE} Mbit/s: equal ports {equal:.1}, planned ports {planned:.1} Mbit/s");
    ensure!(
        planned >= 2.5 * equal,
        "planned ports {planned:.1} Mbit/s, equal ports {equal:.1}: less than 2.5 times; {description}"
    );
    Ok(())
}

/// The member on which each tunnel of A is predicted to send, if only `usable` members are left.
fn predicted(lab: &Lab, usable: &[&str]) -> Result<Vec<String>> {
    let member = |ports: &[u16; 2]| {
        let flow = OuterFlow {
            src: lab.sites[0].endpoint.into(),
            dst: lab.sites[1].endpoint.into(),
            sport: ports[0],
            dport: ports[1],
            macs: None,
        };
        let index = bond_hash::member(XmitHashPolicy::Layer34, &flow, u8::try_from(usable.len())?).index();
        Ok(usable[usize::from(index.context("layer3+4 needs no more than that")?)].to_owned())
    };
    lab.tunnels.iter().map(|tunnel| member(&tunnel.ports)).collect()
}

/// The member that `stats` shows for each tunnel of A.
fn shown_members(lab: &Lab) -> Result<Vec<String>> {
    let stats = lab.stats(0)?;
    let tunnels = stats["tunnels"].as_array().context("stats list the tunnels")?;
    Ok(tunnels.iter().map(|tunnel| tunnel["member"].as_str().unwrap_or_default().to_owned()).collect())
}

fn wait_until_shown(lab: &Lab, desired: &[String]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while shown_members(lab)? != desired {
        ensure!(
            Instant::now() < deadline,
            "stats show the tunnels on {:?}, predicted {desired:?}",
            shown_members(lab)?
        );
        sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn tunnels_spread_again_when_a_member_fails() -> Result<()> {
    let (lab, _running) = lab(None)?;
    let full = predicted(&lab, &["u0", "u1", "u2"])?;
    wait_until_shown(&lab, &full)?;
    let degraded = predicted(&lab, &["u0", "u2"])?;
    std::thread::scope(|scope| {
        // A transfer runs across the failure.
        let transfer = scope.spawn(|| TcpLoad::bytes(12, 500_000).run(lab.path_v4()));
        sleep(Duration::from_secs(1));
        lab.sites[1].gateway.ip("link set u1 down")?;
        wait_until_shown(&lab, &degraded)?;
        let report = transfer.join().expect("the transfer does not panic")?;
        ensure!(report.received() == 12 * 500_000, "{} bytes arrived across the failure", report.received());
        anyhow::Ok(())
    })?;

    // The devices' counters must show that each remaining member carries the bytes of its own tunnels.
    let sent = |device: &str| Ok::<u64, anyhow::Error>(lab.sites[0].device(device)?.tx_bytes);
    let names = || lab.tunnels.iter().map(|tunnel| tunnel.name.as_str());
    let tunnels_before: Vec<u64> = names().map(sent).collect::<Result<_>>()?;
    let before = [sent("u0")?, sent("u1")?, sent("u2")?];
    let report = TcpLoad::bytes(24, 200_000).run(lab.path_v4())?;
    ensure!(report.received() == 24 * 200_000, "{} bytes arrived over two members", report.received());
    for (at, member) in ["u0", "u1", "u2"].into_iter().enumerate() {
        let carried = sent(member)? - before[at];
        let mut expected = 0;
        for ((name, before), on) in names().zip(&tunnels_before).zip(&degraded) {
            expected += if on == member { sent(name)? - before } else { 0 };
        }
        // The member also sends outer headers, 28 bytes and 14 for Ethernet with each packet, and LACPDUs.
        ensure!(
            carried >= expected && carried <= expected + expected / 5 + 10_000,
            "{member} sent {carried} bytes, its tunnels {expected}"
        );
    }

    lab.sites[1].gateway.ip("link set u1 up")?;
    wait_until_shown(&lab, &full)
}
