//! The two labs. They are built and taken down one after the other.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::dump::Dump;
use lab::interrupt;
use lab::sites::{Lab, Options, Running};
use lab::traffic::TcpLoad;
use rustix::process::Signal;

use crate::cut::{self, Cut};
use crate::left::Left;
use crate::measured::{Planned, Usual, Way};
use crate::plan::{MEMBERS, Plan};
use crate::say;
use crate::transfer::{links_of_tunnels, row};

/// Rate of each link if the machine can fill it, Mbit/s.
const MAX_RATE: f64 = 20.0;
/// Share of the machine's capacity that all links together may use.
const USABLE: f64 = 0.4;
/// Receive buffers that do not limit the transfer, as `net.ipv4.tcp_rmem`.
const UNLIMITED: &str = "4096 8388608 8388608";
/// How long a gateway may take until it looks as it did before.
const SETTLE: Duration = Duration::from_secs(20);

/// Measures the usual recipe, and one of its tunnels alone. Finds a rate for the links if none was given.
pub fn usual_recipe(plan: &mut Plan, left: &mut Left) -> Result<Usual> {
    say::step("building two sites as the usual recipe has them: equal ports at both ends of a tunnel, an ECMP route");
    with_deadline(plan.with_equal_ports(), plan, left, |lab, _, plan| {
        let found_out = plan.rate.is_none();
        if found_out {
            let rate = affordable_rate(lab)?;
            say::step(&format!("limiting each of the {MEMBERS} links to {rate} Mbit/s in each direction"));
            lab.shape(rate)?;
            plan.rate = Some(rate);
        }
        let usual = (|| {
            let links = links_of_tunnels(lab)?;
            Ok(Usual { links, one_tunnel: row(lab, Way::OneTunnel, plan)?, recipe: row(lab, Way::UsualRecipe, plan)? })
        })();
        if found_out {
            lab.unshape()?;
        }
        usual
    })
}

/// The rate of each link, Mbit/s, at which the links are the limit and not this machine's processors, which do the work
/// of both sites.
fn affordable_rate(lab: &Lab) -> Result<f64> {
    say::step("finding out what this machine can carry without limits");
    let receiver = &lab.sites[1].host;
    let usual = receiver.run(|| fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem"))?;
    receiver.sysctl("net/ipv4/tcp_rmem", UNLIMITED)?;
    // Few flows only: without limits, many flows would compete for the processors and lose more than they carry.
    let capacity = TcpLoad::timed(usize::from(MEMBERS), 2.0).run(lab.path_v4())?.goodput();
    receiver.sysctl("net/ipv4/tcp_rmem", usual.trim())?;
    interrupt::check()?;
    say::note(&format!("{capacity:.0} Mbit/s"));
    Ok((capacity * USABLE / f64::from(MEMBERS)).floor().clamp(2.0, MAX_RATE))
}

/// Measures ECMP over the ports that `ecmpvpn init` plans, and ecmpvpn itself, and what a cut tunnel does to each.
pub fn planned_ports(plan: &mut Plan, left: &mut Left) -> Result<Planned> {
    say::step("building two sites as `ecmpvpn init` plans them: ports by which each tunnel has a link of its own");
    with_deadline(plan.with_planned_ports(), plan, left, |lab, running, plan| {
        let links = links_of_tunnels(lab)?;
        let ecmp = row(lab, Way::Ecmp, plan)?;
        let ecmpvpn = row(lab, Way::Ecmpvpn, plan)?;
        let cuts = cuts(lab, running)?;
        Ok(Planned { links, ecmp, ecmpvpn, cuts })
    })
}

/// Cuts a tunnel under ECMP traffic, and then under ecmpvpn traffic.
fn cuts(lab: &Lab, running: &mut [Running; 2]) -> Result<[Cut; 2]> {
    let every: Vec<usize> = (0..lab.tunnels.len()).collect();
    lab.bypass(&every)?;
    let ecmp = cut::under_traffic(lab, "ECMP")?;
    lab.end_bypass()?;
    // Waits until the tunnel counts as up again.
    lab.warm_up(running)?;
    Ok([ecmp, cut::under_traffic(lab, "ecmpvpn")?])
}

/// Builds a lab, runs ecmpvpn at both sites, does `work`, and takes everything down again.
fn with_deadline<T>(
    options: Options,
    plan: &mut Plan,
    left: &mut Left,
    work: impl FnOnce(&Lab, &mut [Running; 2], &mut Plan) -> Result<T>,
) -> Result<T> {
    interrupt::check()?;
    let lab = Lab::new(options, &plan.program)?;
    left.expect_gone(&lab);
    for ns in lab.sites.iter().flat_map(|site| [&site.host, &site.gateway]) {
        // For a local socket, the kernel's ECMP uses the random hash of the socket, which TCP changes after a timeout.
        // Flows that come through a network card keep their hash.
        ns.sysctl("net/core/txrehash", "0")?;
    }
    let before = [lab.sites[0].dump()?, lab.sites[1].dump()?];
    interrupt::check()?;
    say::note("starting `ecmpvpn run` at both");
    let mut running = lab.run()?;
    left.expect_ended(&running);
    let done = interrupt::check().and_then(|()| work(&lab, &mut running, plan));
    say::step("stopping `ecmpvpn run` at both sites");
    let stopped = stop(&lab, running, &before);
    let done = done?;
    stopped.map(|()| done)
}

/// Stops ecmpvpn at both sites.
///
/// # Errors
/// A `run` failed, or a gateway does not look as it did before.
fn stop(lab: &Lab, running: [Running; 2], before: &[Dump; 2]) -> Result<()> {
    for one in running {
        let output = one.output();
        let status = one.stop(Signal::INT)?;
        ensure!(status.success(), "`ecmpvpn run` ended with {status}:\n{output}");
    }
    // After an interruption, this program itself may have left something in the gateways. They are removed anyway.
    interrupt::check()?;
    for (site, before) in lab.sites.iter().zip(before) {
        let left = before.wait_for_same(SETTLE, || site.dump())?;
        ensure!(left.is_none(), "`ecmpvpn run` left at {}:\n{}", site.name, left.unwrap_or_default());
    }
    Ok(())
}
