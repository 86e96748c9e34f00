//! Full links that lose packets, and no tunnel that dies of it.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::sites::Lab;
use lab::stalls::{Stall, Watch};
use lab::traffic::TcpLoad;

use super::{Kind, asked, deaths, of_tunnels, settle, told, views};

/// A link's rate, 10^6 bits a second.
const RATE: u32 = 8;

/// Every link full in both directions, and 1% lost besides.
pub fn full_and_lossy_links_are_no_false_alarm(kind: Kind) -> Result<()> {
    let seconds = asked("ECMPVPN_SOAK", 40)?;
    let lab = kind.lab()?;
    let mut running = lab.run()?;
    let views = views(&lab)?;
    let settled = settle(&lab, &views, &mut running)?;
    lossy(&lab)?;
    let watch = Watch::begin()?;
    thread::scope(|scope| -> Result<()> {
        let load = |path| scope.spawn(move || TcpLoad::timed(12, f64::from(seconds)).run(path));
        let loads = [load(lab.path_v4()), load(lab.path_v4().reversed())];
        for load in loads {
            let goodput = load.join().expect("the load does not panic")?.goodput();
            eprintln!("goodput {goodput:.1} Mbit/s of {}", 2 * RATE);
            ensure!(goodput > f64::from(RATE) / 4.0, "the links were not full: {goodput:.1} Mbit/s");
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
            told(&running)
        );
        let times = of_tunnels(&stats, "rtt_us")?;
        ensure!(times.iter().all(|time| *time > 0), "round trips: {times:?}");
    }
    Ok(())
}

/// Those of this machine's stalls that can hold up a tunnel, a line each.
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

/// Each link with its rate, a queue of some 60 ms, and 1% loss, in each direction.
fn lossy(lab: &Lab) -> Result<()> {
    let commands: Vec<String> = (0..lab.options.members)
        .flat_map(|member| {
            [
                format!("qdisc replace dev u{member} root handle 1: tbf rate {RATE}mbit burst 16k limit 65536"),
                format!("qdisc add dev u{member} parent 1:1 handle 10: netem loss 1% limit 50"),
            ]
        })
        .collect();
    lab.sites.iter().try_for_each(|site| site.gateway.apply("tc", &commands))
}
