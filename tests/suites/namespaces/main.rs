//! The whole program at two sites in namespaces. `lab::sites` has the picture of the lab.
//!
//! Each test runs on the userspace backend with an emulated bond, which works on any kernel with TUN devices. It also
//! runs on kernel WireGuard over real LACP bonds if the kernel has both, as in the simulation.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod broken;
mod mss;
mod output;
mod policy;
mod stage;
mod transports;

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::exit::Exit;
use lab::kind::Kind;
use lab::sites::Lab;
use lab::skip::{self, Tier};
use lab::tests;
use lab::traffic::{Path, TcpLoad, UdpLoad, ping, wait_for_reply};
use rustix::process::Signal;
use stage::{SETTLE, lab, of_tunnels};

/// An emulated machine shows how a distribution's kernel, its JIT and its verifier treat real traffic.
const TIERS: [Tier; 3] = [Tier::Here, Tier::Simulated, Tier::Emulated];
/// For tests that take minutes in an emulated machine. The simulation runs them.
const NOT_EMULATED: [Tier; 2] = [Tier::Here, Tier::Simulated];

type Test = (&'static str, fn(Kind) -> Result<()>);

fn main() {
    let tests: [(&[Tier], &[Test]); 3] = [
        (
            &TIERS,
            &tests![
                traffic_crosses_both_ways_and_the_counters_agree,
                fragments_cross,
                the_gateway_speaks_from_its_own_address,
                ctrl_c_leaves_nothing,
                sigterm_leaves_nothing,
                after_a_crash_run_takes_over_and_down_cleans,
            ],
        ),
        (
            &NOT_EMULATED,
            &tests![
                a_second_run_says_that_one_is_running,
                dry_run_changes_nothing,
                mss::connections_begin_with_segments_that_fit,
                output::logs_and_answers_are_plain_text,
                broken::a_broken_configuration_stops_no_command,
                policy::policy_changes_steer_at_once,
                policy::no_packet_is_lost_by_policy_changes,
            ],
        ),
        (&[Tier::Simulated], &tests![transports::one_quic_flow_is_no_slower_than_over_one_tunnel]),
    ];
    let userspace: &[Test] = &tests![the_lab_puts_tunnels_on_links_as_a_bond_would];
    let mut trials = Vec::new();
    trials.extend(userspace.iter().map(|(name, test)| Kind::Userspace.trial(&[Tier::Here], name, *test)));
    for kind in Kind::ALL {
        for (tiers, tests) in tests {
            trials.extend(tests.iter().map(|(name, test)| kind.trial(tiers, name, *test)));
        }
    }
    skip::run(trials);
}

/// Tests the emulated bond itself, without ecmpvpn.
fn the_lab_puts_tunnels_on_links_as_a_bond_would(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let [a, b] = &lab.sites;
    wait_for_reply(&a.gateway, a.endpoint.into(), b.endpoint.into(), SETTLE)?;
    for (near, far, end) in [(a, b, 0), (b, a, 1)] {
        let mut used = Vec::new();
        for tunnel in &lab.tunnels {
            let before = links(&lab, end)?;
            let socket = near.gateway.run(|| UdpSocket::bind((near.endpoint, tunnel.ports[end])))?;
            for _ in 0..100 {
                socket.send_to(&[0; 1000], (far.endpoint, tunnel.ports[1 - end]))?;
            }
            let bytes: Vec<u64> = links(&lab, end)?.iter().zip(before).map(|(after, before)| after - before).collect();
            let member = usize::from(tunnel.members[end]);
            let as_planned = bytes.iter().enumerate().all(|(link, bytes)| (*bytes >= 100_000) == (link == member));
            ensure!(as_planned, "{} from {} is planned for link {member}: {bytes:?}", tunnel.name, near.name);
            used.push(member);
        }
        used.sort_unstable();
        ensure!(used == [0, 1, 2], "three tunnels on links {used:?} from {}", near.name);
    }
    for path in [lab.path_v4(), lab.path_v6()] {
        let crosses = wait_for_reply(path.from, path.source, path.destination, Duration::from_millis(600));
        ensure!(crosses.is_err(), "the LANs reach each other without ecmpvpn");
    }
    Ok(())
}

/// Bytes of inner packets that each tunnel of a site has sent and received, `[tx, rx]`, first from `stats`, then from
/// the devices.
fn counters(lab: &Lab, kind: Kind, site: usize) -> Result<[[Vec<u64>; 2]; 2]> {
    let stats = lab.stats(site)?;
    let mut devices = [Vec::new(), Vec::new()];
    for tunnel in &lab.tunnels {
        let device = lab.sites[site].device(&tunnel.name)?;
        // A kernel WireGuard device counts whole data messages. Each packet has 32 bytes more for header and tag, and
        // padding to 16 bytes, but not beyond the MTU. A TUN device counts the inner packets.
        let around = if kind == Kind::Kernel { 32 } else { 0 };
        devices[0].push(device.tx_bytes - around * device.tx_packets);
        devices[1].push(device.rx_bytes - around * device.rx_packets);
    }
    Ok([[of_tunnels(&stats, "tx_bytes"), of_tunnels(&stats, "rx_bytes")], devices])
}

/// Bytes that each link between the gateways has sent from a site.
fn links(lab: &Lab, site: usize) -> Result<Vec<u64>> {
    (0..lab.options.members).map(|link| Ok(lab.sites[site].device(&format!("u{link}"))?.tx_bytes)).collect()
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn within_one_percent(a: u64, b: u64) -> bool {
    (a as f64 - b as f64).abs() <= 0.01 * (a.max(b) as f64)
}

/// Checks that the policy `hash` keeps all packets of a flow on one tunnel.
fn stays_on_one_tunnel(lab: &Lab, path: Path<'_>) -> Result<()> {
    const DATAGRAMS: u32 = 200;
    let site = usize::from(path.from.name() == lab.sites[1].host.name());
    let before = of_tunnels(&lab.stats(site)?, "tx_packets");
    let report = UdpLoad { flows: 1, packets: DATAGRAMS, payload: 1200, rate: 10.0 }.run(path)?;
    let after = of_tunnels(&lab.stats(site)?, "tx_packets");
    let sent: Vec<u64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    let carriers = sent.iter().filter(|packets| **packets >= u64::from(DATAGRAMS)).count();
    // A few packets belong to connections of the test before, which are closing.
    let others = sent.iter().filter(|packets| **packets < 50).count();
    ensure!(carriers == 1 && others == sent.len() - 1, "one flow from {} was sent as {sent:?}", path.source);
    // A link between namespaces has a queue for each processor, so a few packets may be reordered.
    ensure!(report.reordered() <= DATAGRAMS / 10, "{} datagrams of one flow were overtaken", report.reordered());
    Ok(())
}

fn traffic_crosses_both_ways_and_the_counters_agree(kind: Kind) -> Result<()> {
    const TCP_EACH: u64 = 50_000;
    let lab = lab(kind)?;
    let running = lab.run()?;
    let links_before = [links(&lab, 0)?, links(&lab, 1)?];
    let before = [counters(&lab, kind, 0)?, counters(&lab, kind, 1)?];
    let mut bytes = 0;
    for path in [lab.path_v4(), lab.path_v6()] {
        for path in [path, path.reversed()] {
            let pings = ping(path.from, path.source, path.destination, 5, 56, Duration::from_secs(5))?;
            ensure!(pings.answered() == 5, "pings from {}: {pings:?}", path.source);
            let report = TcpLoad::bytes(64, TCP_EACH).run(path)?;
            ensure!(report.sent() == 64 * TCP_EACH && report.received() == 64 * TCP_EACH, "{report:?}");
            let report = UdpLoad { flows: 64, packets: 20, payload: 1200, rate: 10.0 }.run(path)?;
            ensure!(report.received() == report.sent(), "UDP from {}: {:.1}% lost", path.source, report.loss() * 100.0);
            stays_on_one_tunnel(&lab, path)?;
            bytes += report.received_bytes() + 64 * TCP_EACH;
        }
    }
    for (site, before) in before.iter().enumerate() {
        let after = counters(&lab, kind, site)?;
        let gained = |who: usize, side: usize, tunnel: usize| after[who][side][tunnel] - before[who][side][tunnel];
        for (side, direction) in ["sent", "received"].into_iter().enumerate() {
            let total: u64 = (0..lab.tunnels.len()).map(|tunnel| gained(0, side, tunnel)).sum();
            // Half of the transfers send payload in this direction, the other half only acknowledgements.
            ensure!(
                total > bytes / 2,
                "{direction} at site {site}: {total} bytes counted of {bytes} in both directions"
            );
            for (tunnel, of_lab) in lab.tunnels.iter().enumerate() {
                let (stats, device) = (gained(0, side, tunnel), gained(1, side, tunnel));
                let name = format!("{direction} at site {site} by {}", of_lab.name);
                ensure!(within_one_percent(stats, device), "{name}: stats say {stats}, the device {device}");
                ensure!(stats > total / 10, "{name}: {stats} of {total} bytes, though 64 flows were there");
            }
        }
        for (link, (before, after)) in links_before[site].iter().zip(links(&lab, site)?).enumerate() {
            // Each tunnel is planned onto its own link. Outer packets are longer than inner ones.
            let carried = lab.tunnels.iter().position(|tunnel| usize::from(tunnel.members[site]) == link);
            let inner = gained(1, 0, carried.context("a link without a tunnel")?);
            ensure!(after - before >= inner, "link u{link} of site {site} sent {} of {inner} bytes", after - before);
        }
        let stats = lab.stats(site)?;
        if kind == Kind::Kernel {
            let members = stats["members"].as_array().context("stats list the members")?;
            for (member, sent) in members.iter().zip(links(&lab, site)?) {
                let counted = member["tx_bytes"].as_u64().context("a counter")?;
                ensure!(within_one_percent(counted, sent), "{member}: its device sent {sent} bytes");
            }
            ensure!(members.len() == usize::from(lab.options.members), "members: {members:?}");
        }
        for field in ["dropped", "not_steered"] {
            let counts = stats[field].as_object().context("stats count by reason")?;
            // Multicast listener reports of the device itself are not for a peer.
            let lost = counts.iter().any(|(reason, count)| reason != "multicast" && count != 0);
            ensure!(!lost, "{field} at site {site}: {counts:?}");
        }
    }
    drop(running);
    Ok(())
}

fn fragments_cross(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let _running = lab.run()?;
    for path in [lab.path_v4(), lab.path_v6()] {
        for path in [path, path.reversed()] {
            // From the first ones the sender learns the tunnels' MTU: the gateway answers with packet-too-big.
            let pings = ping(path.from, path.source, path.destination, 10, 4000, Duration::from_secs(1))?;
            ensure!(pings.answered() >= 8, "from {}: {} of 10 came back", path.source, pings.answered());
            // The sender fragments datagrams of 3,000 bytes.
            let report = UdpLoad { flows: 8, packets: 20, payload: 3000, rate: 10.0 }.run(path)?;
            ensure!(report.received() == report.sent(), "UDP from {}: {:.1}% lost", path.source, report.loss() * 100.0);
        }
    }
    Ok(())
}

fn the_gateway_speaks_from_its_own_address(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let _running = lab.run()?;
    let [a, b] = &lab.sites;
    for far in [b.host_v4(), b.host_v6()] {
        let own: IpAddr = *a.addresses.iter().find(|a| a.is_ipv4() == far.is_ipv4()).context("one a family")?;
        let chosen = a.gateway.run(|| {
            let socket = UdpSocket::bind(if far.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect((far, 9))?;
            socket.local_addr()
        })?;
        ensure!(chosen.ip() == own, "to {far} it would speak from {}", chosen.ip());
        let path = Path { from: &a.gateway, source: own, to: &b.host, destination: far };
        wait_for_reply(path.from, path.source, path.destination, SETTLE)?;
        for path in [path, path.reversed()] {
            ensure!(TcpLoad::bytes(4, 50_000).run(path)?.received() == 200_000);
        }
    }
    Ok(())
}

/// Runs both sites, ends both with `signal`, and checks that nothing is left.
fn leaves_nothing(kind: Kind, signal: Signal) -> Result<()> {
    let lab = lab(kind)?;
    let before = [lab.sites[0].dump()?, lab.sites[1].dump()?];
    let running = lab.run()?;
    for (site, before) in lab.sites.iter().zip(&before) {
        let changed = before.diff(&site.dump()?).context("`run` changed nothing that a dump shows")?;
        for word in ["ecmp0", "wg0", "wg1", "wg2", "rp_filter", "IPv4 routes", "IPv6 routes", &site.name] {
            ensure!(changed.contains(word), "{word} is not in what `run` changed:\n{changed}");
        }
    }
    TcpLoad::bytes(4, 100_000).run(lab.path_v4())?;
    for (site, one) in running.into_iter().enumerate() {
        let output = one.output();
        let status = one.stop(signal)?;
        ensure!(status.code() == Some(0), "`run` ended with {status}:\n{output}");
        let left = before[site].wait_for_same(SETTLE, || lab.sites[site].dump())?;
        ensure!(left.is_none(), "left at site {site}:\n{}", left.unwrap_or_default());
    }
    Ok(())
}

fn ctrl_c_leaves_nothing(kind: Kind) -> Result<()> {
    leaves_nothing(kind, Signal::INT)
}

fn sigterm_leaves_nothing(kind: Kind) -> Result<()> {
    leaves_nothing(kind, Signal::TERM)
}

fn a_second_run_says_that_one_is_running(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let running = lab.run()?;
    let before = lab.sites[0].dump()?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["run"])?;
    ensure!(code == Exit::Failed as i32, "it ended with {code}: {complaint}");
    let pid = running[0].pid().to_string();
    let sentence = format!("{} is already running (pid {pid}): ", lab.sites[0].name);
    ensure!(complaint.contains(&sentence), "it said: {complaint}");
    // Neither does what only looks take what is up for left-overs or for another's.
    let (code, _, complaint) = lab.ecmpvpn(0, &["run", "--dry-run"])?;
    ensure!(code == Exit::Failed as i32 && complaint.contains(&sentence), "--dry-run: {code} {complaint}");
    let (code, _, complaint) = lab.ecmpvpn(0, &["plan"])?;
    let sentence = format!("{} is running (pid {pid}): ", lab.sites[0].name);
    ensure!(code == 0 && complaint.contains(&sentence), "plan: {code} {complaint}");
    ensure!(!complaint.contains("ip link delete") && !complaint.contains("cannot be determined"), "plan: {complaint}");
    let changed = before.diff(&lab.sites[0].dump()?);
    ensure!(changed.is_none(), "it changed:\n{}", changed.unwrap_or_default());
    ensure!(TcpLoad::bytes(4, 100_000).run(lab.path_v4())?.received() == 400_000);
    Ok(())
}

fn after_a_crash_run_takes_over_and_down_cleans(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let before = lab.sites[0].dump()?;
    let [a, mut b] = lab.run()?;
    a.stop(Signal::KILL)?;
    let left = before.diff(&lab.sites[0].dump()?).context("a killed `run` left nothing to clean")?;
    ensure!(left.contains(&lab.sites[0].name), "run files and pins are not in what it left:\n{left}");

    let mut again = lab.start(0)?;
    again.wait_until_up()?;
    let mut running = [again, b];
    lab.warm_up(&mut running)?;
    ensure!(TcpLoad::bytes(8, 100_000).run(lab.path_v4())?.received() == 800_000);
    let [again, kept] = running;
    b = kept;
    again.stop(Signal::KILL)?;

    for time in ["first", "second"] {
        let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
        ensure!(code == 0, "the {time} `down` ended with {code}: {complaint}");
        let left = before.wait_for_same(SETTLE, || lab.sites[0].dump())?;
        ensure!(left.is_none(), "the {time} `down` left:\n{}", left.unwrap_or_default());
    }
    drop(b);
    Ok(())
}

fn dry_run_changes_nothing(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let before = lab.sites[0].dump()?;
    let (code, output, complaint) = lab.ecmpvpn(0, &["run", "--dry-run"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    for word in ["wg0", "wg1", "wg2", "ecmp0", "10.20.0.0/16", "fd00:20::/48", "rp_filter"] {
        ensure!(output.contains(word), "{word} is not in what it would do:\n{output}");
    }
    let changed = before.diff(&lab.sites[0].dump()?);
    ensure!(changed.is_none(), "it changed:\n{}", changed.unwrap_or_default());
    Ok(())
}
