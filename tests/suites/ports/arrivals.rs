//! Counts on the members of a real bond where tunnels arrive.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::XmitHashPolicy;
use ecmpvpn::plan::bond_hash::{self, OuterFlow};
use lab::dump::Dump;
use lab::sites::{Lab, Options, Running, Underlay, binary};
use rustix::process::Signal;
use serde_json::Value;

/// Number of pings through each tunnel in each round.
const PINGS: u64 = 20;
/// How long LACP, the kernel's link watch, and the ten seconds over which the counters look back may take together.
const PATIENCE: Duration = Duration::from_secs(40);
const SETTLE: Duration = Duration::from_secs(5);

fn lab(ports: Option<Vec<[u16; 2]>>) -> Result<Lab> {
    let options = Options { underlay: Underlay::Bonded, backend: "kernel", ports, ..Options::default() };
    Lab::new(options, &binary()?)
}

/// Sends pings from B to A through every tunnel.
fn ping(lab: &Lab) -> Result<()> {
    for tunnel in &lab.tunnels {
        let [a, b] = tunnel.addresses.map(|address| address.to_string());
        let count = PINGS.to_string();
        lab.sites[1].gateway.exec("ping", ["-q", "-i", "0.02", "-w", "10", "-c", &count, "-I", &b, &a])?;
    }
    Ok(())
}

/// Packets of each of A's tunnels that arrived on each member, u0 first.
fn arrived(stats: &Value) -> Result<Vec<[u64; 3]>> {
    let tunnels = stats["tunnels"].as_array().context("stats list the tunnels")?;
    let on = |tunnel: &Value, member: &str| {
        let members = tunnel["rx_members"].as_array().into_iter().flatten();
        members.filter(|found| found["name"] == member).filter_map(|found| found["packets"].as_u64()).sum()
    };
    Ok(tunnels.iter().map(|tunnel| ["u0", "u1", "u2"].map(|member| on(tunnel, member))).collect())
}

/// The member on which each of A's tunnels arrives.
fn shown_members(stats: &Value) -> Vec<&str> {
    let tunnels = stats["tunnels"].as_array().into_iter().flatten();
    tunnels.map(|tunnel| tunnel["rx_member"].as_str().unwrap_or("?")).collect()
}

/// Pings until `desired` accepts the members that `stats` of A shows for the tunnels.
fn wait_until(lab: &Lab, what: &str, desired: impl Fn(&[&str]) -> bool) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        ping(lab)?;
        let stats = lab.stats(0)?;
        if desired(&shown_members(&stats)) {
            return Ok(stats);
        }
        ensure!(Instant::now() < deadline, "{what}; stats show {:?}", shown_members(&stats));
        sleep(Duration::from_millis(500));
    }
}

pub fn tunnels_arrive_where_the_far_bond_sends_them() -> Result<()> {
    let lab = lab(None)?;
    let before = [lab.sites[0].dump()?, lab.sites[1].dump()?];
    let [a, b] = lab.run()?;
    let predicted: Vec<String> = lab.tunnels.iter().map(|tunnel| format!("u{}", tunnel.members[1])).collect();
    let stats = wait_until(&lab, &format!("predicted {predicted:?}"), |shown| shown == predicted)?;
    let first = arrived(&stats)?;
    ping(&lab)?;
    let stats = lab.stats(0)?;
    eprintln!("packets of each tunnel on u0, u1, u2: {:?}", arrived(&stats)?);
    for ((tunnel, first), now) in lab.tunnels.iter().zip(first).zip(arrived(&stats)?) {
        for (member, (first, now)) in first.into_iter().zip(now).enumerate() {
            let grown = now - first;
            let here = member == usize::from(tunnel.members[1]);
            ensure!(if here { grown >= PINGS } else { grown == 0 }, "{} on u{member}: {grown}", tunnel.name);
        }
    }
    for member in stats["members"].as_array().context("stats list the members")? {
        let (tunnels, all) = (member["arrived_bytes"].as_u64(), member["rx_bytes"].as_u64());
        ensure!(tunnels > Some(0) && tunnels < all, "{member}");
    }

    let text = plan(&lab, &["--measured"])?;
    ensure!(text.contains("tunnels arrive as predicted"), "{text}");
    let json = plan_json(&lab, "--replan-rx")?;
    ensure!(json["peers"][0]["replan"]["finding"] == "even", "{json}");
    for (tunnel, shown) in lab.tunnels.iter().zip(tunnels(&json)?) {
        ensure!(shown["rx_member_measured"] == tunnel.members[1] && shown["rx_member"] == tunnel.members[1], "{shown}");
        ensure!(shown["rx_packets_measured"].as_u64() >= Some(PINGS), "{shown}");
    }

    collapse(&lab)?;

    // A ends by a crash and `down`, B by Ctrl-C.
    a.stop(Signal::KILL)?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
    ensure!(code == 0, "`down` ended with {code}: {complaint}");
    stop(b)?;
    nothing_is_left(&lab, &before)
}

/// The far bond, which is also the switch here, hashes only MAC addresses. All tunnels then arrive on one member.
fn collapse(lab: &Lab) -> Result<()> {
    lab.sites[1].gateway.ip("link set bond0 type bond xmit_hash_policy layer2")?;
    let alike = |shown: &[&str]| shown[0] != "?" && shown.iter().all(|member| *member == shown[0]);
    let stats = wait_until(lab, "the far bond hashes MAC addresses", alike)?;
    let member = shown_members(&stats)[0].to_owned();
    let (code, table, _) = lab.ecmpvpn(0, &["stats"])?;
    ensure!(code == 0 && table.contains("arrives on"), "{table}");
    let text = plan(lab, &["--measured"])?;
    eprintln!("{text}");
    ensure!(text.contains("hashes otherwise than layer3+4"), "{text}");
    ensure!(text.contains("all 3 tunnels arrive on member") && text.contains(&format!("({member})")), "{text}");
    let json = plan_json(lab, "--replan-rx")?;
    for shown in tunnels(&json)? {
        ensure!(shown["rx_members_measured"] == serde_json::json!([member]), "{shown}");
    }
    let replan = &json["peers"][0]["replan"];
    ensure!(replan["finding"] == "addresses" && replan["trial"] == true, "{replan}");
    let text = plan(lab, &["--replan-rx"])?;
    eprintln!("{text}");
    ensure!(text.contains("no ports help: set the switch's hash policy"), "{text}");
    Ok(())
}

pub fn equal_ports_arrive_on_one_member_and_are_replanned() -> Result<()> {
    let lab = lab(Some(vec![[5000; 2], [5001; 2], [5002; 2]]))?;
    let before = [lab.sites[0].dump()?, lab.sites[1].dump()?];
    let [a, b] = lab.run()?;
    wait_until(&lab, "equal ports share member 0", |shown| shown == ["u0"; 3])?;
    let deadline = Instant::now() + PATIENCE;
    while !a.output().contains("all 3 tunnels share member 0: bonding gains nothing; use ") {
        ensure!(Instant::now() < deadline, "`run` does not warn of equal ports:\n{}", a.output());
        sleep(Duration::from_millis(500));
    }

    let json = plan_json(&lab, "--replan-rx")?;
    let replan = &json["peers"][0]["replan"];
    eprintln!("{}", plan(&lab, &["--replan-rx"])?);
    ensure!(
        replan["finding"] == "layer3+4_or_addresses" && replan["loads"] == serde_json::json!([3, 0, 0]),
        "{replan}"
    );
    let ports = replan["ports"].as_array().context("ports are proposed")?;
    let port = |pair: &Value, key: &str| pair[key].as_u64().and_then(|port| u16::try_from(port).ok()).context("a port");
    let mut members = [BTreeSet::new(), BTreeSet::new()];
    for (pair, tunnel) in ports.iter().zip(&lab.tunnels) {
        let ports = [port(pair, "listen_port")?, port(pair, "remote_port")?];
        ensure!(ports[0] == tunnel.ports[0], "our own ports stay: {replan}");
        for (from, members) in members.iter_mut().enumerate() {
            let flow = OuterFlow {
                src: lab.sites[from].endpoint.into(),
                dst: lab.sites[1 - from].endpoint.into(),
                sport: ports[from],
                dport: ports[1 - from],
                macs: None,
            };
            members.insert(bond_hash::member(XmitHashPolicy::Layer34, &flow, 3).index());
        }
    }
    ensure!(ports.len() == 3 && members.iter().all(|members| members.len() == 3), "{replan} leads to {members:?}");
    let changes = replan["changes"].as_array().context("changes are listed")?;
    for (site, key) in [(1, "listen_port"), (0, "remote_port")] {
        let desired = |change: &&Value| change["site"] == lab.sites[site].name.as_str() && change["key"] == key;
        ensure!(changes.iter().filter(desired).count() * 2 == changes.len(), "{replan}");
    }

    stop(a)?;
    stop(b)?;
    nothing_is_left(&lab, &before)
}

/// The output of `plan` at A.
fn plan(lab: &Lab, arguments: &[&str]) -> Result<String> {
    let (code, text, complaint) = lab.ecmpvpn(0, &[&["plan"], arguments].concat())?;
    ensure!(code == 0, "`plan` ended with {code}: {complaint}");
    Ok(text)
}

fn plan_json(lab: &Lab, argument: &str) -> Result<Value> {
    Ok(serde_json::from_str(&plan(lab, &[argument, "--json"])?)?)
}

fn tunnels(json: &Value) -> Result<&Vec<Value>> {
    json["tunnels"].as_array().context("the tunnels are listed")
}

fn nothing_is_left(lab: &Lab, before: &[Dump; 2]) -> Result<()> {
    for (site, before) in lab.sites.iter().zip(before) {
        let left = before.wait_for_same(SETTLE, || site.dump())?;
        ensure!(left.is_none(), "left at {}:\n{}", site.name, left.unwrap_or_default());
    }
    Ok(())
}

fn stop(running: Running) -> Result<()> {
    let output = running.output();
    let status = running.stop(Signal::INT)?;
    ensure!(status.code() == Some(0), "`run` ended with {status}:\n{output}");
    Ok(())
}
