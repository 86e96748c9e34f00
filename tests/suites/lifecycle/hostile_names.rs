//! A remote endpoint that is a host name, and a name server that is hostile or silent.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::dataplane::{Pins, View};
use lab::kind::Kind;
use lab::names::{Answers, NameServer};
use lab::sites::{Hole, Lab};
use lab::traffic::TcpLoad;

use super::named::endpoints;
use super::stage::{lab, rewrite};

const NAME: &str = "site-b.example";
const OTHER_NAME: &str = "gateway-b.example";
/// How many records of a name point into the VPN. They still fit into one answer.
const MANY: u16 = 3_000;
/// While a tunnel is down, its name is resolved every 5 seconds.
const LOOKUPS: usize = 2;
/// How soon a tunnel that died is left, at the latest; docs/health.md.
const FAILOVER: Duration = Duration::from_millis(1_500);
const ALL: u32 = 7;

/// A lab in which A asks a name server of its own for B's address.
fn named(kind: Kind) -> Result<(Lab, NameServer)> {
    let lab = lab(kind, 3)?;
    let site = &lab.sites[0];
    fs::write(site.config.with_file_name("hosts"), "127.0.0.1 localhost\n")?;
    NameServer::write_config(&site.config.with_file_name("resolv.conf"))?;
    let server = NameServer::start(&site.gateway)?;
    let here = lab.sites[1].endpoint;
    rewrite(&lab, 0, |text| {
        text.replacen(&format!("remote_endpoint = \"{here}\""), &format!("remote_endpoint = \"{NAME}\""), 1)
    })?;
    Ok((lab, server))
}

fn live(lab: &Lab) -> Result<u32> {
    Ok(View::open(&Pins::of(&lab.sites[0].name))?.peers()[0].live)
}

fn wait_until_live(lab: &Lab, expected: u32, within: Duration) -> Result<()> {
    let start = Instant::now();
    while live(lab)? != expected {
        ensure!(start.elapsed() < within, "after {within:?} these tunnels are in use: {:03b}", live(lab)?);
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Addresses that must not be used, and what `run` says of them.
fn hostile(lab: &Lab) -> Result<Vec<(IpAddr, &'static str)>> {
    let own = IpAddr::from(lab.sites[0].endpoint);
    let inside = IpAddr::from(lab.tunnels[0].addresses[1]);
    let others = [
        ("10.20.0.9", "lies in 10.20.0.0/16"),
        ("127.0.0.1", "never leaves the host"),
        ("224.0.0.1", "is multicast"),
        ("0.0.0.0", "stands for any address"),
        ("255.255.255.255", "is broadcast"),
        ("::ffff:10.2.3.5", "has no IPv4 address"),
        ("fd00:20::9", "has no IPv4 address"),
    ];
    let others = others.into_iter().map(|(address, why)| Ok((address.parse::<IpAddr>()?, why)));
    let mut all = others.collect::<Result<Vec<_>>>()?;
    all.extend([(own, "own endpoint"), (inside, "the net of wg0")]);
    Ok(all)
}

pub fn hostile_answers_move_no_tunnel(kind: Kind) -> Result<()> {
    let (lab, server) = named(kind)?;
    let here = IpAddr::from(lab.sites[1].endpoint);
    let before = lab.sites[0].dump()?;
    let hostile = hostile(&lab)?;
    for (address, why) in &hostile {
        server.set(Answers::Each(vec![vec![*address]]));
        let (exit, _, complaint) = lab.ecmpvpn(0, &["run"])?;
        ensure!(exit != 0 && complaint.contains(why), "{address}: it ended with {exit}: {complaint}");
    }
    server.set(Answers::NoSuchName);
    let (exit, _, complaint) = lab.ecmpvpn(0, &["run"])?;
    ensure!(exit != 0 && complaint.contains("correct the name"), "it ended with {exit}: {complaint}");
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    // Among thousands of addresses is one that may be used.
    let inside = |number: u16| IpAddr::from(Ipv4Addr::new(10, 20, number.to_be_bytes()[0], number.to_be_bytes()[1]));
    let mut many: Vec<IpAddr> = (0..MANY).map(inside).collect();
    many.insert(usize::from(MANY) / 2, here);
    server.set(Answers::Each(vec![many]));
    let mut running = lab.run()?;
    if kind == Kind::Kernel {
        ensure!(endpoints(&lab)?.iter().all(|at| *at == here.to_string()), "{:?}", endpoints(&lab)?);
    }
    // Another answer each time, with one that could be used and leads nowhere.
    let nobody: IpAddr = "10.2.3.99".parse()?;
    let each = hostile.iter().map(|(address, _)| vec![*address]).chain([vec![nobody], vec![], vec![here, nobody]]);
    server.set(Answers::Each(each.collect()));
    let (asked, start) = (server.questions(), Instant::now());
    let hole = Hole::dig(&lab, 0, &[0])?;
    while server.questions() < asked + 2 * LOOKUPS {
        ensure!(start.elapsed() < Duration::from_secs(40), "nobody asks:\n{}", running[0].output());
        sleep(Duration::from_millis(50));
    }
    ensure!(live(&lab)? & 6 == 6, "the other tunnels were left:\n{}", running[0].output());
    ensure!(TcpLoad::bytes(4, 50_000).run(lab.path_v4())?.received() == 200_000);
    if kind == Kind::Kernel {
        ensure!(endpoints(&lab)?.iter().all(|at| *at == here.to_string()), "{:?}", endpoints(&lab)?);
    }
    hole.fill()?;
    lab.warm_up(&mut running)?;
    ensure!(!running[0].output().contains(" now\n"), "{}", running[0].output());
    Ok(())
}

/// Finding A9: a reload waits for a name server that never answers. Meanwhile a tunnel dies, and is left.
pub fn a_silent_name_server_delays_no_failover(kind: Kind) -> Result<()> {
    let (lab, server) = named(kind)?;
    server.set(Answers::Each(vec![vec![lab.sites[1].endpoint.into()]]));
    let running = lab.run()?;
    wait_until_live(&lab, ALL, Duration::from_secs(20))?;
    server.set(Answers::Never);
    rewrite(&lab, 0, |text| text.replacen(NAME, OTHER_NAME, 1))?;
    let asked = server.questions();
    thread::scope(|scope| -> Result<()> {
        let reload = scope.spawn(|| lab.ecmpvpn(0, &["reload"]));
        let start = Instant::now();
        while server.questions() == asked {
            ensure!(start.elapsed() < Duration::from_secs(10), "nobody asks:\n{}", running[0].output());
            sleep(Duration::from_millis(5));
        }
        let hole = Hole::dig(&lab, 0, &[0])?;
        wait_until_live(&lab, ALL & !1, FAILOVER)?;
        ensure!(!reload.is_finished(), "the reload did not wait for the name server");
        hole.fill()?;
        let (exit, _, complaint) = reload.join().expect("it does not panic")?;
        // The tunnels of the kernel's backend tell the address that they use.
        let expected = if kind == Kind::Kernel { exit == 0 } else { exit != 0 && complaint.contains("name servers") };
        ensure!(expected, "it ended with {exit}: {complaint}\n{}", running[0].output());
        Ok(())
    })?;
    wait_until_live(&lab, ALL, Duration::from_secs(20)).context("after the reload")
}
