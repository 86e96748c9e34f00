//! Tests the labs themselves in simulated time: links behave as configured, and networks of several sites carry
//! packets. Simulated time has no noise, so the bounds are tight.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod pair;
mod transports;

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::netns::Netns;
use lab::sites::{Lab, Options, Underlay, binary};
use lab::skip::{self, Feature, Tier, requires};
use lab::tests;
use lab::topology::{Network, Quality, Sketch, Wires};
use lab::traffic::{Path, TcpLoad, UdpLoad, ping};
use pair::{A, B, Pair};

const DELAY: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_secs(20);

/// The bounds hold only where time has no noise.
const TIERS: [Tier; 1] = [Tier::Simulated];

type Test = (&'static str, fn() -> Result<()>);

fn main() {
    let tests: &[Test] = &tests![
        a_link_has_its_rate,
        a_link_has_its_delay_and_keeps_order,
        a_link_loses_what_it_should_in_its_direction_only,
        an_unplugged_port_has_no_carrier,
        lacp_passes_a_delay,
        several_sites_with_several_gateways_are_joined,
        both_ends_started_at_once_connect,
        transports::a_quic_flow_fills_a_link_with_each_congestion_control,
        transports::a_paced_stream_is_timed_and_its_order_counted,
        transports::a_tunnel_between_hosts_carries_tcp,
    ];
    let features = [Feature::WireGuard, Feature::Bonding];
    skip::run(tests.iter().map(|(name, test)| requires(&TIERS, &features, name, *test)));
}

fn a_link_has_its_rate() -> Result<()> {
    let pair = Pair::new(Quality::delayed(DELAY), Some(100.0))?;
    let goodput = TcpLoad::timed(2, 3.0).run(pair.path())?.goodput();
    // 1,448 of the 1,514 bytes that the shaper counts for a frame are payload.
    ensure!((95.0..=95.8).contains(&goodput), "{goodput:.2} Mbit/s over a link of 100");
    Ok(())
}

fn a_link_has_its_delay_and_keeps_order() -> Result<()> {
    let pair = Pair::new(Quality::delayed(DELAY), None)?;
    let median = pair.ping(10)?.median().context("nothing came back")?;
    ensure!((2 * DELAY..2 * DELAY + Duration::from_micros(100)).contains(&median), "{median:?}");
    let jitter = Quality { jitter: Duration::from_millis(1), ..Quality::delayed(DELAY) };
    pair.wires.set_all(&[(0, 0, jitter), (0, 1, jitter)])?;
    let times = pair.ping(50)?.round_trips;
    let (least, most) = (times.iter().min().context("nothing")?, times.iter().max().context("nothing")?);
    let spread = most.saturating_sub(*least);
    ensure!(spread > Duration::from_millis(1) && *most < Duration::from_millis(7), "{least:?} to {most:?}");
    let report = load(2_000).run(pair.path())?;
    ensure!(report.received() == 2_000 && report.reordered() == 0, "{report:?}");
    Ok(())
}

fn a_link_loses_what_it_should_in_its_direction_only() -> Result<()> {
    let pair = Pair::new(Quality::default(), Some(100.0))?;
    let lost = |path: Path<'_>| Ok::<f64, anyhow::Error>(UdpLoad { flows: 4, ..load(2_500) }.run(path)?.loss());
    pair.wires.set(0, 0, Quality { loss: 1.0, ..Quality::default() })?;
    // 1% of 10,000 packets is 100. The range of 60 to 140 is four standard deviations.
    let (there, back) = (lost(pair.path())?, lost(pair.path().reversed())?);
    ensure!((0.006..=0.014).contains(&there) && back == 0.0, "lost there {there}, back {back}");
    pair.wires.set(0, 0, Quality::CUT)?;
    ensure!(pair.ping(2)?.answered() == 0, "packets pass a cut");
    let before = received(&pair.ends[0])?;
    let _ = load(50).run(pair.path().reversed());
    ensure!(received(&pair.ends[0])? >= before + 50, "a cut in one direction stops the other one");
    pair.wires.set(0, 0, Quality::default())?;
    ensure!(pair.ping(2)?.answered() == 2, "a cut does not heal");
    Ok(())
}

/// `packets` datagrams of one flow, at a rate far below that of the links.
fn load(packets: u32) -> UdpLoad {
    UdpLoad { flows: 1, packets, payload: 200, rate: 8.0 }
}

/// Packets that the port has received.
fn received(ns: &Netns) -> Result<u64> {
    let text = ns.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("u0:")).context("no u0")?;
    line.split_whitespace().nth(1).context("no counter")?.parse().context("a counter")
}

fn an_unplugged_port_has_no_carrier() -> Result<()> {
    let pair = Pair::new(Quality::delayed(DELAY), None)?;
    let state = |end: usize| pair.ends[end].query("ip", "-o link show u0");
    pair.wires.plug(0, false)?;
    for end in [0, 1] {
        ensure!(state(end)?.contains("NO-CARRIER"), "{}", state(end)?);
    }
    pair.wires.plug(0, true)?;
    let began = Instant::now();
    while pair.ping(1)?.answered() == 0 {
        ensure!(began.elapsed() < PATIENCE, "{}", state(0)?);
    }
    Ok(())
}

/// Makes a bond of `members` links with an address, as a site would.
fn bond(ns: &Netns, members: u8, address: Ipv4Addr) -> Result<()> {
    let mut commands =
        vec!["link add bond0 type bond mode 802.3ad miimon 100 lacp_rate fast xmit_hash_policy layer3+4".to_owned()];
    for member in 0..members {
        commands.push(format!("link set u{member} down"));
        commands.push(format!("link set u{member} master bond0"));
    }
    commands.extend([format!("address add {address}/24 dev bond0"), "link set bond0 up".to_owned()]);
    ns.apply("ip", &commands)
}

/// Waits until the kernel reports that all members of `bond` are in its aggregator.
fn wait_for_members(ns: &Netns, bond: &str, members: u8) -> Result<()> {
    let began = Instant::now();
    loop {
        let text = ns.run(|| fs::read_to_string(format!("/proc/thread-self/net/bonding/{bond}")))?;
        if text.contains(&format!("Number of ports: {members}")) {
            return Ok(());
        }
        ensure!(began.elapsed() < PATIENCE, "{bond} in {} is not complete:\n{text}", ns.name());
        sleep(Duration::from_millis(100));
    }
}

fn lacp_passes_a_delay() -> Result<()> {
    let ends = [Netns::new("a")?, Netns::new("b")?];
    let mut wires = Wires::new("wires")?;
    for member in 0..3 {
        let port = format!("u{member}");
        wires.join([(&port, &ends[0]), (&port, &ends[1])], [Quality::delayed(Duration::from_millis(20)); 2])?;
    }
    for (end, address) in ends.iter().zip([A, B]) {
        bond(end, 3, address)?;
    }
    for end in &ends {
        wait_for_members(end, "bond0", 3)?;
    }
    // The first pings resolve the neighbour. Only the following ones are measured.
    ping(&ends[0], A.into(), B.into(), 2, 56, Duration::from_secs(2))?;
    let median = ping(&ends[0], A.into(), B.into(), 5, 56, Duration::from_secs(2))?.median().context("no answer")?;
    ensure!(median >= Duration::from_millis(40) && median < Duration::from_millis(41), "{median:?}");
    Ok(())
}

fn several_sites_with_several_gateways_are_joined() -> Result<()> {
    let quality = Quality::delayed(DELAY);
    let network = Network::draw(&Sketch { gateways: vec![1, 2, 1], members: 2, rate: Some(100.0), quality })?;
    let gateways = || network.sites.iter().flat_map(|site| &site.gateways);
    for gateway in gateways() {
        bond(&gateway.ns, 2, gateway.endpoint)?;
        gateway.ns.ip(&format!("route add 172.16.0.0/12 via {}", gateway.router))?;
    }
    for gateway in gateways() {
        wait_for_members(&gateway.ns, "bond0", 2)?;
    }
    for from in gateways() {
        for to in gateways().filter(|to| to.endpoint != from.endpoint) {
            let report = ping(&from.ns, from.endpoint.into(), to.endpoint.into(), 3, 56, Duration::from_secs(1))?;
            ensure!(report.answered() >= 2, "{} to {}: {report:?}", from.endpoint, to.endpoint);
            // A round trip crosses the links of both gateways, there and back.
            let least = *report.round_trips.iter().min().context("no answer")?;
            ensure!(least >= 4 * DELAY && least < 4 * DELAY + Duration::from_millis(1), "{least:?}");
        }
    }
    for site in &network.sites {
        for gateway in &site.gateways {
            let lan: IpAddr = gateway.lan.into();
            let report = ping(&site.host, site.address.into(), lan, 2, 56, Duration::from_secs(1))?;
            ensure!(report.answered() == 2, "{} does not reach its gateway {lan}", site.address);
        }
    }
    Ok(())
}

/// If handshake initiations cross, both fail. WireGuard repeats them after 5 s, and in one kernel they would cross
/// again.
fn both_ends_started_at_once_connect() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(4);
    let options = Options {
        underlay: Underlay::Bonded,
        backend: "kernel",
        wires: Some(Quality::delayed(Duration::from_millis(20))),
        rate: Some(100.0),
        ..Options::default()
    };
    let lab = Lab::new(options, &binary()?)?;
    let mut running = [lab.start(0)?, lab.start(1)?];
    for site in &mut running {
        site.wait_until_up()?;
    }
    let began = Instant::now();
    loop {
        let mut waiting = Vec::new();
        for site in [0, 1] {
            let stats = lab.stats(site)?;
            let tunnels = stats["tunnels"].as_array().context("stats list the tunnels")?;
            waiting.extend(tunnels.iter().filter(|one| one["rtt_us"].as_u64().is_none_or(|rtt| rtt == 0)).cloned());
        }
        if waiting.is_empty() {
            eprintln!("all tunnels answer {} ms after both sites were up", began.elapsed().as_millis());
            return Ok(());
        }
        ensure!(began.elapsed() < BOUND, "these never answered:\n{waiting:#?}\n{}", running[0].output());
        sleep(Duration::from_millis(50));
    }
}
