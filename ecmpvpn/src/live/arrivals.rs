//! Finds on which members the running site's tunnels really arrive.

use crate::config::{self, Config};
use crate::dataplane::{ArrivalView, Arrivals as Counted, Pins};
use crate::host::Netlink;
use crate::host::links::Links;
use crate::host::underlay::Carriers;
use crate::live::stats::StatsError;
use crate::plan::measured::{self, Measured, Tunnel};
use crate::plan::ports::replan::replan;
use crate::report::plan::{Arrivals, Report};

/// Adds the counted arrivals to a report of `config`'s tunnels. With `replan_rx` it also adds what the other sites
/// should change.
///
/// # Errors
/// The site is not up, or this process may not read its counters.
pub async fn add(config: &Config, report: &mut Report, replan_rx: bool) -> Result<(), StatsError> {
    let counts = Counted::open(&Pins::of(&config.site.name))?.counts()?;
    let netlink = Netlink::open()?;
    let links = netlink.links().await.map_err(StatsError::Netlink)?;
    for (number, (peer, shown)) in (0..).zip(config.peers.iter().zip(&mut report.peers)) {
        let own: Vec<&ArrivalView> = counts.iter().filter(|count| count.id.peer() == number).collect();
        let measured = members_in_use(config, peer, &own, &links, &netlink).await;
        let replan = if replan_rx { Some(replan(&shown.request, &shown.plan.pairs, &measured)?) } else { None };
        shown.arrivals = Some(Arrivals { measured, replan });
    }
    Ok(())
}

async fn members_in_use(
    config: &Config,
    peer: &config::Peer,
    counts: &[&ArrivalView],
    links: &Links,
    netlink: &Netlink,
) -> Measured {
    let carriers = Carriers::towards(links, netlink, config, peer).await;
    let members = carriers.members();
    let tunnel = |tunnel: &config::Tunnel| {
        // Matches by ports: after a change of the configuration, the counters of former ports belong to another tunnel.
        let own = counts.iter().filter(|count| count.ports == (tunnel.remote_port, tunnel.listen_port));
        let own: Vec<(u8, &&ArrivalView)> = own
            .filter_map(|count| Some((members.iter().position(|member| member.ifindex == count.ifindex)?, count)))
            .filter_map(|(at, count)| Some((u8::try_from(at).ok()?, count)))
            .collect();
        let current = measured::current(own.iter().map(|(_, count)| count.age));
        let mut now: Vec<_> = own.iter().zip(current).filter(|(_, current)| *current).map(|(own, _)| own).collect();
        now.sort_by_key(|(at, _)| *at);
        Tunnel {
            on: now.iter().map(|(at, _)| *at).collect(),
            packets: now.iter().map(|(_, count)| count.packets).sum(),
            age: now.iter().filter_map(|(_, count)| count.age).min(),
        }
    };
    Measured {
        names: members.iter().map(|member| member.name.clone()).collect(),
        tunnels: peer.tunnels.iter().map(tunnel).collect(),
    }
}
