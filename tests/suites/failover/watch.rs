//! A tunnel that stays down.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config;
use ecmpvpn::host::restart_tunnel;
use ecmpvpn::plan::{Backend, Plan};
use lab::kind::Kind;
use lab::sites::Hole;
use lab::traffic::Stream;

use super::stage::{ALL, TUNNELS, deaths, describe, lab, of_tunnels, views, wait_until_live, wait_until_settled};

const TUNNEL: usize = 2;

/// The watchdog starts a new handshake after 5 to 8.5 s, and the tunnel comes up again when it can. The test also sets
/// its interface down and up, as the watchdog does as a last resort: the interface must be the same afterwards. The
/// other tunnels lose nothing.
pub fn a_restarted_tunnel_leaves_the_others_alone(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let mut running = lab.run()?;
    let views = views(&lab)?;
    let settled = wait_until_settled(&lab, &views, &mut running)?;
    let without = ALL & !(1 << TUNNEL);
    let hole = Hole::dig(&lab, 0, &[TUNNEL])?;
    wait_until_live(&lab, &views, [without, without], &mut running)?;
    let stream = Stream::start(lab.path_v4(), 32, 500)?;
    // 5 s, plus 2.5 s at the end that does not lead, plus up to a second at random.
    thread::sleep(Duration::from_millis(8_700));
    let restarts = of_tunnels(&lab.stats(0)?, "restarts")?;
    ensure!(restarts[TUNNEL] >= 1 && restarts.iter().sum::<i64>() == restarts[TUNNEL], "restarts: {restarts:?}");
    ensure!(running[0].output().contains("new handshake") || kind == Kind::Userspace, "{}", running[0].output());
    hole.fill()?;
    wait_until_live(&lab, &views, [ALL, ALL], &mut running)?;

    if kind == Kind::Kernel {
        let site = &lab.sites[0];
        let config = config::load(&site.config).map_err(|e| anyhow::anyhow!("{e}"))?;
        let plan = Plan::new(&config, Backend::Kernel);
        let before = site.dump()?;
        let restarted = site.gateway.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let alias = Plan::link_alias(&plan.site);
            anyhow::Ok(runtime.block_on(restart_tunnel(&plan.tunnels[TUNNEL], &alias, true))?)
        });
        restarted.context("setting an interface down and up")?;
        let left = before.wait_for_same(Duration::from_secs(5), || site.dump())?;
        ensure!(left.is_none(), "the interface is not what it was:\n{}", left.unwrap_or_default());
        thread::sleep(Duration::from_secs(1));
        wait_until_live(&lab, &views, [ALL, ALL], &mut running)?;
    }
    let report = stream.stop()?;
    let all = report.outages();
    // Flows of this tunnel may have lost packets while its interface was down.
    let flows = all.iter().map(|outage| outage.flow).collect::<std::collections::BTreeSet<_>>();
    ensure!(flows.len() < 32 / 2, "flows of other tunnels were interrupted: {all:?}");
    for site in [0, 1] {
        let deaths = deaths(&lab, site, &settled)?;
        let others = (0..TUNNELS).filter(|tunnel| *tunnel != TUNNEL).all(|tunnel| deaths[tunnel] == 0);
        ensure!(
            others && deaths[TUNNEL] >= 1,
            "the tunnels of site {site} died {deaths:?} times:{}",
            describe(&running)
        );
    }
    Ok(())
}
