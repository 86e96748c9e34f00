//! Where tunnels truly arrive: counted on the members of a real bond.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::sites::{Lab, Options, Running, Underlay, binary};
use rustix::process::Signal;
use serde_json::Value;

/// Pings of each tunnel in each round.
const PINGS: u64 = 20;
/// How long LACP, the kernel's link watch and the counters' memory of ten seconds may take together.
const PATIENCE: Duration = Duration::from_secs(40);
const SETTLE: Duration = Duration::from_secs(5);

pub fn lab(ports: Option<Vec<[u16; 2]>>) -> Result<Lab> {
    let options = Options { underlay: Underlay::Bonded, backend: "kernel", ports, ..Options::default() };
    Lab::new(options, &binary()?)
}

/// Packets from B to A through every tunnel, and back.
fn ping(lab: &Lab) -> Result<()> {
    for tunnel in &lab.tunnels {
        let [a, b] = tunnel.addresses.map(|address| address.to_string());
        let count = PINGS.to_string();
        lab.sites[1].gateway.exec("ping", ["-q", "-i", "0.02", "-w", "10", "-c", &count, "-I", &b, &a])?;
    }
    Ok(())
}

/// Packets of each of A's tunnels on each member, u0 first.
fn arrived(stats: &Value) -> Result<Vec<[u64; 3]>> {
    let tunnels = stats["tunnels"].as_array().context("stats list the tunnels")?;
    let on = |tunnel: &Value, member: &str| {
        let members = tunnel["rx_members"].as_array().into_iter().flatten();
        members.filter(|found| found["name"] == member).filter_map(|found| found["packets"].as_u64()).sum()
    };
    Ok(tunnels.iter().map(|tunnel| ["u0", "u1", "u2"].map(|member| on(tunnel, member))).collect())
}

/// The member that each of A's tunnels arrives on.
fn shown(stats: &Value) -> Vec<&str> {
    let tunnels = stats["tunnels"].as_array().into_iter().flatten();
    tunnels.map(|tunnel| tunnel["rx_member"].as_str().unwrap_or("?")).collect()
}

/// Pings until `stats` of A show every tunnel on the member that `wanted` accepts.
fn wait_until(lab: &Lab, what: &str, wanted: impl Fn(&[&str]) -> bool) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        ping(lab)?;
        let stats = lab.stats(0)?;
        if wanted(&shown(&stats)) {
            return Ok(stats);
        }
        ensure!(Instant::now() < deadline, "{what}; stats show {:?}", shown(&stats));
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

    // A crash and `down` here, Ctrl-C there.
    a.stop(Signal::KILL)?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
    ensure!(code == 0, "`down` ended with {code}: {complaint}");
    stop(b)?;
    for (site, before) in lab.sites.iter().zip(&before) {
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
