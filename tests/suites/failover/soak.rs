//! Links that are full and lose packets must not make a tunnel go down.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::kind::Kind;
use lab::sites::Lab;
use lab::stalls::{Stall, Watch};
use lab::traffic::TcpLoad;

use super::stage::{deaths, describe, lab, of_tunnels, setting, views, wait_until_settled};

/// Default rate of a link, 10^6 bits a second, which the simulation carries easily. Long soaks set a lower rate and
/// fewer connections, because each packet costs real time in the simulation.
const RATE: u32 = 100;
/// Default number of connections in each direction, enough to fill every link.
const FLOWS: u32 = 24;
/// A link's queue holds what the link sends in this time, seconds.
const QUEUE: f64 = 0.06;
/// Smallest queue, packets. A port's queue is not shorter because its link is slow. In a queue of 20 packets, a few
/// flows that begin together leave no room for other packets as long as their rounds last (Floyd, Jacobson, "Traffic
/// phase effects in packet-switched gateways", 1991).
const LEAST_QUEUE: f64 = 100.0;
/// Time between two progress lines of a long soak.
const PROGRESS: Duration = Duration::from_secs(300);

/// Fills every link in both directions while it also loses 1% of the packets. No tunnel may go down.
pub fn full_and_lossy_links_are_no_false_alarm(kind: Kind) -> Result<()> {
    let (seconds, rate) = (setting("ECMPVPN_SOAK", 15)?, setting("ECMPVPN_RATE", RATE)?);
    let flows = setting("ECMPVPN_FLOWS", FLOWS)? as usize;
    let lab = lab(kind)?;
    let mut running = lab.run()?;
    let views = views(&lab)?;
    let settled = wait_until_settled(&lab, &views, &mut running)?;
    lossy(&lab, rate)?;
    let watch = Watch::begin()?;
    let (ended, until) = mpsc::channel::<()>();
    thread::scope(|scope| -> Result<()> {
        let began = Instant::now();
        scope.spawn(move || {
            while until.recv_timeout(PROGRESS) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{} of {seconds} s", began.elapsed().as_secs());
            }
        });
        // Dropping this ends the thread above, however the scope ends.
        let _ended = ended;
        let load = |path| scope.spawn(move || TcpLoad::timed(flows, f64::from(seconds)).run(path));
        let loads = [load(lab.path_v4()), load(lab.path_v4().reversed())];
        for load in loads {
            let goodput = load.join().expect("the load does not panic")?.goodput();
            eprintln!("goodput {goodput:.1} Mbit/s of {}", 2 * rate);
            ensure!(goodput > 1.2 * f64::from(rate), "the links were not full: {goodput:.1} Mbit/s");
        }
        Ok(())
    })?;
    let stalls = watch.end();
    eprintln!("{}", summary(&stalls));
    for site in [0, 1] {
        let stats = lab.stats(site)?;
        let deaths = deaths(&lab, site, &settled)?;
        for tunnel in stats["tunnels"].as_array().into_iter().flatten() {
            eprintln!(
                "{} of {site}: rtt {} us, jitter {} us, least {} us, loss {}",
                tunnel["name"], tunnel["rtt_us"], tunnel["rtt_jitter_us"], tunnel["rtt_min_us"], tunnel["loss"]
            );
        }
        ensure!(
            deaths.iter().all(|deaths| *deaths == 0),
            "tunnels of site {site} died {deaths:?} times:{}",
            describe(&running)
        );
        let times = of_tunnels(&stats, "rtt_us")?;
        ensure!(times.iter().all(|time| *time > 0), "round trips: {times:?}");
    }
    Ok(())
}

/// The stalls of this machine that are long enough to delay a tunnel's probes, one line each.
fn long(stalls: &[Stall]) -> String {
    let long = stalls.iter().filter(|stall| stall.lasted >= Duration::from_millis(100));
    long.map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn summary(stalls: &[Stall]) -> String {
    let longest = stalls.iter().map(|stall| stall.lasted).max().unwrap_or_default();
    let all: Duration = stalls.iter().map(|stall| stall.lasted).sum();
    format!(
        "CPUs stood still {} times, {} ms in all, {} ms at most; for 100 ms and more:\n{}",
        stalls.len(),
        all.as_millis(),
        longest.as_millis(),
        long(stalls)
    )
}

/// Gives each link its rate, a queue and 1% loss, in each direction. As on a real port, LACPDUs do not wait behind the
/// data: the bond sends them with `TC_PRIO_CONTROL` (`ad_lacpdu_send()` of the bonding driver). A full queue would drop
/// so many of them that links leave the aggregator every few minutes. A tunnel that goes down because of that would not
/// be a false alarm.
fn lossy(lab: &Lab, rate: u32) -> Result<()> {
    let packets = (f64::from(rate) * 1e6 / 8.0 * QUEUE / 1_514.0).ceil().max(LEAST_QUEUE);
    let limit = packets * 1_514.0;
    let link = |member| {
        let band = move |band| {
            format!("qdisc add dev u{member} parent 10:{band} handle 1{band}: netem loss 1% limit {packets}")
        };
        let shaped = [
            format!("qdisc replace dev u{member} root handle 1: tbf rate {rate}mbit burst 16k limit {limit}"),
            format!("qdisc add dev u{member} parent 1:1 handle 10: prio"),
        ];
        shaped.into_iter().chain((1..=3).map(band))
    };
    let commands: Vec<String> = (0..lab.options.members).flat_map(link).collect();
    lab.sites.iter().try_for_each(|site| site.gateway.apply("tc", &commands))
}
