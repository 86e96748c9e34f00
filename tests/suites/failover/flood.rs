//! Floods of echo requests: what a host of a LAN, and a user without privilege on the far gateway, may send.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::hostile::{Flood, allow_ping, as_nobody, ping_socket};
use lab::kind::Kind;
use lab::sites::{Lab, Running};

use super::stage::{ALL, describe, lab, live, of_tunnels, views, wait_until_settled};

/// Echo requests a second.
const RATE: u32 = 10_000;
const LASTS: Duration = Duration::from_secs(2);
/// The most CPU time that the probing thread may take for each message of a flood, in nanoseconds.
const COST: u64 = 20_000;
/// The same for messages that its socket filter drops.
const FILTERED: u64 = 2_000;
/// How many of a hundred probes may be lost during a flood.
const LOSS: f64 = 10.0;

/// Who sends a flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sender {
    /// A host in the other site's LAN, to the gateway's address in its own LAN.
    Host,
    /// A host in the gateway's own LAN, to the same address.
    OwnHost,
    /// A user without privilege on the other gateway, through every tunnel.
    Nobody,
}

/// What flows, from whom, and what one message may cost.
const FLOODS: [(Sender, Flood, u64); 5] = [
    (Sender::OwnHost, Flood::Reports, FILTERED),
    (Sender::Host, Flood::Pings, FILTERED),
    (Sender::Nobody, Flood::Pings, FILTERED),
    (Sender::Nobody, Flood::Truncated, FILTERED),
    (Sender::Nobody, Flood::Reports, COST),
];

/// Sends a flood to the gateway of the site `to` until `stop`. Returns the number of messages and how long it took.
fn send(lab: &Lab, to: usize, sender: Sender, flood: Flood, stop: &AtomicBool) -> Result<(u32, Duration)> {
    let from = &lab.sites[if sender == Sender::OwnHost { to } else { 1 - to }];
    let v4 = |address: IpAddr| match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => Err(anyhow::anyhow!("{address} is not IPv4")),
    };
    let paths: Vec<[Ipv4Addr; 2]> = match sender {
        Sender::Host | Sender::OwnHost => vec![[v4(from.host_v4())?, Ipv4Addr::new(10, lab.sites[to].number, 0, 1)]],
        Sender::Nobody => lab.tunnels.iter().map(|tunnel| [tunnel.addresses[1 - to], tunnel.addresses[to]]).collect(),
    };
    let machine = if sender == Sender::Nobody { &from.gateway } else { &from.host };
    allow_ping(machine)?;
    as_nobody(machine, || {
        // Two identifiers for each path.
        let sockets = [0, 4_711].into_iter().flat_map(|identifier| {
            paths.iter().map(move |path| ping_socket(*path, if identifier == 0 { 0 } else { identifier }))
        });
        // The kernel gives an identifier to one socket of a machine only.
        let sockets: Vec<UdpSocket> = sockets.filter_map(Result::ok).collect();
        ensure!(sockets.len() > paths.len(), "only {} sockets", sockets.len());
        Ok(flood.send(&sockets, RATE, LASTS, stop))
    })
}

/// CPU time of a site's probing thread so far, in nanoseconds. `None` if this kernel does not count it.
fn cpu_time(run: &Running) -> Result<Option<u64>> {
    for task in fs::read_dir(format!("/proc/{}/task", run.pid()))? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm")).unwrap_or_default().trim() == "health" {
            let Ok(text) = fs::read_to_string(task.join("schedstat")) else { return Ok(None) };
            let time = text.split_whitespace().next().and_then(|word| word.parse().ok());
            return Ok(Some(time.context("no time in schedstat")?));
        }
    }
    anyhow::bail!("`run` has no probing thread")
}

/// During floods all tunnels of both sites stay in use, probes are answered, and the probing thread's work is bounded.
pub fn floods_take_no_tunnel_out_of_use(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let mut running = lab.run()?;
    let views = views(&lab)?;
    let before = wait_until_settled(&lab, &views, &mut running)?;
    for to in [0, 1] {
        for (sender, flood, most) in FLOODS {
            let what = format!("{flood:?} of {sender:?} to {}", lab.sites[to].name);
            let began = cpu_time(&running[to])?;
            let stop = AtomicBool::new(false);
            let (sent, took) = thread::scope(|scope| -> Result<(u32, Duration)> {
                let sending = scope.spawn(|| send(&lab, to, sender, flood, &stop));
                let mut left = None;
                while !sending.is_finished() {
                    let now = [live(&views[0]), live(&views[1])];
                    left = left.or(Some(now).filter(|now| *now != [ALL; 2]));
                    thread::sleep(Duration::from_millis(5));
                }
                stop.store(true, Ordering::Relaxed);
                let sent = sending.join().expect("the sender does not panic")?;
                ensure!(left.is_none(), "{what}: only {left:?} were in use:{}", describe(&running));
                Ok(sent)
            })?;
            let rate = f64::from(sent) / took.as_secs_f64();
            ensure!(rate >= 0.9 * f64::from(RATE), "{what}: only {rate:.0} messages a second were sent");
            for site in 0..2 {
                let stats = lab.stats(site)?;
                let lost = stats["tunnels"].as_array().context("no tunnels")?.iter().map(|one| one["loss"].as_f64());
                let lost: Vec<f64> = lost.map(|loss| 100.0 * loss.unwrap_or(1.0)).collect();
                ensure!(lost.iter().all(|loss| *loss <= LOSS), "{what}: {lost:?}% of the probes were lost");
            }
            let cost = cpu_time(&running[to])?.zip(began).map(|(now, began)| (now - began) / u64::from(sent.max(1)));
            eprintln!("{what}: {rate:.0} a second, {cost:?} ns of the probing thread each");
            // The simulation's CPU takes no time.
            if kind == Kind::Userspace {
                let cost = cost.context("this kernel does not count CPU time")?;
                ensure!(cost <= most, "{what}: {cost} ns of CPU time for each message");
            }
        }
    }
    let after = [of_tunnels(&lab.stats(0)?, "deaths")?, of_tunnels(&lab.stats(1)?, "deaths")?];
    ensure!(after == before, "tunnels went down: {before:?}, now {after:?}:{}", describe(&running));
    Ok(())
}
