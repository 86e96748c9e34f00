//! Another program deletes devices of a site that is up.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::kind::Kind;
use lab::traffic::TcpLoad;
use rustix::process::Signal;

use super::stage::{indexes, lab};

pub fn what_is_deleted_is_made_again(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let [mut a, b] = lab.run()?;
    let made = indexes(&lab, 0)?;
    let gateway = &lab.sites[0].gateway;
    gateway.ip("link del wg1")?;
    a.wait_until_said("it is mended: wg1 was deleted")?;
    let since = Instant::now();
    loop {
        let stats = lab.stats(0)?;
        let shown =
            stats["tunnels"].as_array().and_then(|all| all.iter().find(|tunnel| tunnel["name"] == "wg1")).cloned();
        if shown.as_ref().is_some_and(|tunnel| tunnel["state"] == "up") {
            break;
        }
        ensure!(since.elapsed() < Duration::from_secs(30), "wg1 is not up: {stats}\n{}", a.output());
        std::thread::sleep(Duration::from_millis(200));
    }
    let of = |name: &str, links: &[(String, u64)]| links.iter().find(|(link, _)| link == name).map(|(_, index)| *index);
    let now = indexes(&lab, 0)?;
    ensure!(of("wg1", &now).is_some() && of("wg1", &now) != of("wg1", &made), "{made:?}, now {now:?}");
    ensure!(of("wg0", &now) == of("wg0", &made) && of("ecmp0", &now) == of("ecmp0", &made), "others were made again");
    ensure!(TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received() == 400_000);
    // wg1 has its program again: what it receives is counted.
    let carried = lab.stats(0)?;
    let wg1 = carried["tunnels"].as_array().and_then(|all| all.iter().find(|tunnel| tunnel["name"] == "wg1")).cloned();
    ensure!(wg1.as_ref().and_then(|t| t["rx_packets"].as_u64()).is_some_and(|count| count > 0), "{carried}");
    // Without the steering device no traffic flows, and its routes are removed with it.
    gateway.ip("link del ecmp0")?;
    a.wait_until_said("it is mended: ecmp0 was deleted")?;
    let mut running = [a, b];
    lab.warm_up(&mut running)?;
    ensure!(TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received() == 400_000);
    let [a, b] = running;
    let output = a.output();
    ensure!(output.matches("it is mended").count() == 2, "{output}");
    ensure!(a.stop(Signal::INT)?.success(), "{output}");
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    drop(b);
    Ok(())
}
