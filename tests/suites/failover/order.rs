//! One UDP flow over all tunnels: in order if the far end restores it, else whole on one tunnel.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::changes::policy;
use lab::kind::Kind;
use lab::sites::{Lab, Options, binary};
use lab::topology::Quality;
use lab::traffic::{UdpLoad, UdpReport};
use serde_json::Value;

use super::stage::of_tunnels;

/// Rate of a link, 10^6 bits a second, and what its wire delays, milliseconds.
const RATE: f64 = 100.0;
const DELAYS: [u64; 3] = [2, 5, 9];
/// 80% of the three links.
const LOAD: UdpLoad = UdpLoad { flows: 1, packets: 60_000, payload: 1300, rate: 0.8 * 3.0 * RATE * 1300.0 / 1400.0 };

fn order(lab: &Lab, site: usize) -> Result<Value> {
    Ok(lab.stats(site)?["order"][0].clone())
}

fn wait_until(lab: &Lab, restores: bool) -> Result<()> {
    wait_for_both(lab, restores, [(0, "restored_there"), (1, "restored_here")])
}

fn wait_for_both(lab: &Lab, value: bool, fields: [(usize, &str); 2]) -> Result<()> {
    let start = Instant::now();
    while order(lab, fields[0].0)?[fields[0].1] != value || order(lab, fields[1].0)?[fields[1].1] != value {
        ensure!(start.elapsed() < Duration::from_secs(10), "{:#}, {:#}", order(lab, 0)?, order(lab, 1)?);
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Sends the load. Returns the report and the packets of each tunnel.
fn sent(lab: &Lab) -> Result<(UdpReport, Vec<i64>)> {
    let before = of_tunnels(&lab.stats(0)?, "tx_packets")?;
    let report = LOAD.run(lab.path_v4())?;
    let after = of_tunnels(&lab.stats(0)?, "tx_packets")?;
    Ok((report, after.iter().zip(before).map(|(after, before)| after - before).collect()))
}

fn share(report: &UdpReport) -> f64 {
    f64::from(report.reordered()) / f64::from(report.received().max(1))
}

pub fn a_sprayed_udp_flow_arrives_in_order(kind: Kind) -> Result<()> {
    let quality = |ms: u64| Quality::delayed(Duration::from_millis(ms));
    let options = Options { policy: "spray", wires: Some(quality(DELAYS[0])), ..kind.options() };
    let lab = Lab::new(options, &binary()?)?;
    lab.shape(RATE)?;
    let wires = (0u8..).zip(DELAYS).flat_map(|(wire, ms)| [0, 1].map(|end| (wire, end, quality(ms))));
    lab.wires()?.set_all(&wires.collect::<Vec<_>>())?;
    let mut running = lab.run()?;
    wait_until(&lab, true)?;
    let before = order(&lab, 1)?;
    let (report, packets) = sent(&lab)?;
    let after = order(&lab, 1)?;
    println!(
        "restored: {} of {} out of order, {} lost, tunnels {packets:?}; {before} to {after}",
        report.reordered(),
        report.received(),
        report.sent() - report.received()
    );
    ensure!(report.received() == report.sent(), "{} lost", report.sent() - report.received());
    ensure!(share(&report) <= 0.005, "{:.3}% out of order", share(&report) * 100.0);
    ensure!(packets.iter().all(|packets| *packets > 6_000), "not over all tunnels: {packets:?}");
    let gained = |field: &str| -> Result<u64> {
        let count = |value: &Value| value[field].as_u64().with_context(|| format!("no {field}"));
        Ok(count(&after)? - count(&before)?)
    };
    let (restored, late, given_up) = (gained("restored")?, gained("late")?, gained("given_up")?);
    ensure!(restored + late + given_up >= 59_000, "{restored} restored, {late} late, {given_up} given up");
    ensure!(late * 100 < restored && given_up == 0, "{restored} restored, {late} late, {given_up} given up");

    // The far end is switched off: the flow stays whole, unless a rule asks for more.
    switch_far(&lab, false)?;
    let (report, packets) = sent(&lab)?;
    println!("switched off: {} of {} out of order, tunnels {packets:?}", report.reordered(), report.received());
    ensure!(packets.iter().filter(|packets| **packets > 1_000).count() == 1, "not on one tunnel: {packets:?}");
    ensure!(report.reordered() == 0, "{} out of order on one tunnel", report.reordered());

    policy(&lab, &["rule", "add", "--proto", "udp", "--policy", "spray"])?;
    let (report, packets) = sent(&lab)?;
    println!("not restored: {} of {} out of order, tunnels {packets:?}", report.reordered(), report.received());
    ensure!(share(&report) > 0.3, "only {:.3}% out of order", share(&report) * 100.0);
    for run in &mut running {
        ensure!(run.output().contains("restores the order"), "{}", run.output());
    }
    Ok(())
}

/// What a path loses is learned from the far end, and sprayed flows keep away from it as far as the others suffice.
pub fn a_path_that_loses_packets_carries_less(kind: Kind) -> Result<()> {
    let delay = Duration::from_millis(2);
    let options = Options { policy: "spray", wires: Some(Quality::delayed(delay)), ..kind.options() };
    let lab = Lab::new(options, &binary()?)?;
    lab.shape(RATE)?;
    let _running = lab.run()?;
    wait_until(&lab, true)?;
    let shares = || -> Result<Vec<f64>> {
        let (report, packets) = sent(&lab)?;
        let packets = packets.into_iter().map(u32::try_from).collect::<Result<Vec<u32>, _>>()?;
        let sum = f64::from(packets.iter().sum::<u32>());
        let mut shares: Vec<f64> = packets.into_iter().map(|packets| f64::from(packets) / sum).collect();
        println!("{} of {} lost, shares {shares:.3?}", report.sent() - report.received(), report.sent());
        shares.sort_by(f64::total_cmp);
        Ok(shares)
    };
    let before = shares()?;
    ensure!(before[0] > 0.3, "not over all tunnels alike: {before:?}");
    let lossy = Quality { loss: 1.0, ..Quality::delayed(delay) };
    lab.wires()?.set_all(&[(1, 0, lossy), (1, 1, lossy)])?;
    shares()?;
    let after = shares()?;
    // The other two carry 5/6 of it.
    ensure!(after[0] < 0.22 && after[1] > 0.36, "the path that loses packets is used as before: {after:?}");
    ensure!(after[0] > 0.05, "it is not used although the others are full: {after:?}");
    Ok(())
}

/// Writes `restore_order` to the far site's configuration, reloads it, and waits until both sites go by it.
fn switch_far(lab: &Lab, on: bool) -> Result<()> {
    let far = &lab.sites[1].config;
    let text = fs::read_to_string(far)?;
    let changed = text.replacen(&format!("restore_order = {}", !on), &format!("restore_order = {on}"), 1);
    ensure!(text != changed, "the switch is not where it was:\n{text}");
    fs::write(far, changed)?;
    let (code, _, complaint) = lab.ecmpvpn(1, &["reload"])?;
    ensure!(code == 0, "`reload` ended with {code}: {complaint}");
    wait_until(lab, on)
}

/// The device that holds packets: its index and whether it is up. `None`: it is not there.
fn holding(lab: &Lab) -> Result<Option<(u64, bool)>> {
    let links: Value = serde_json::from_str(&lab.sites[1].gateway.query("ip", "-j link show type ifb")?)?;
    let link = &links[0];
    if link["ifname"] != "ecmp0o" {
        return Ok(None);
    }
    let is_up = link["flags"].as_array().is_some_and(|flags| flags.contains(&"UP".into()));
    Ok(link["ifindex"].as_u64().map(|index| (index, is_up)))
}

fn wait_for(lab: &Lab, what: &str, is_so: impl Fn(Option<(u64, bool)>) -> bool) -> Result<()> {
    let start = Instant::now();
    loop {
        let found = holding(lab)?;
        if is_so(found) {
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_secs(20), "{what}: {found:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The device that holds packets is made and removed by `reload`, and made again when somebody else takes it away. What
/// arrives meanwhile is not lost for longer than a look takes.
pub fn the_device_that_holds_packets_follows_the_configuration(kind: Kind) -> Result<()> {
    let lab = Lab::new(Options { policy: "spray", ..kind.options() }, &binary()?)?;
    lab.shape(RATE)?;
    let running = lab.run()?;
    wait_until(&lab, true)?;
    let (first, _) = holding(&lab)?.context("there is no device")?;

    // For the one peer, at this end: neither direction.
    policy(&lab, &["order", "off", "--peer", &lab.sites[1].name])?;
    wait_until(&lab, false)?;
    wait_for_both(&lab, false, [(0, "restored_here"), (1, "restored_there")])?;
    policy(&lab, &["order", "on"])?;
    wait_until(&lab, true)?;

    switch_far(&lab, false)?;
    wait_for(&lab, "switched off, and the device is still there", |found| found.is_none())?;
    let (report, packets) = sent(&lab)?;
    ensure!(packets.iter().filter(|packets| **packets > 1_000).count() == 1, "not on one tunnel: {packets:?}");
    ensure!(report.reordered() == 0, "{} out of order on one tunnel", report.reordered());

    switch_far(&lab, true)?;
    let (second, _) = holding(&lab)?.context("it is restored without a device")?;
    ensure!(second != first, "the device was never removed");
    lab.sites[1].gateway.ip("link set ecmp0o down")?;
    wait_for(&lab, "it stays down", |found| found == Some((second, true)))?;
    lab.sites[1].gateway.ip("link delete ecmp0o")?;
    wait_for(&lab, "it is not made again", |found| found.is_some_and(|(index, up)| index != second && up))?;
    wait_until(&lab, true)?;
    let (report, packets) = sent(&lab)?;
    println!("mended: {} of {} out of order, tunnels {packets:?}", report.reordered(), report.received());
    ensure!(report.received() == report.sent(), "{} lost", report.sent() - report.received());
    ensure!(packets.iter().all(|packets| *packets > 6_000), "not over all tunnels: {packets:?}");
    ensure!(share(&report) <= 0.005, "{:.3}% out of order", share(&report) * 100.0);
    ensure!(running[1].output().contains("holds packets for their order, and it is mended"), "{}", running[1].output());
    Ok(())
}
