//! Gathers what `stats` shows: counters from the pinned maps, links from the kernel, members from the bond's own hash.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ecmpvpn_common::layout::{Health, peer_flags};

use crate::config::{Config, Policy};
use crate::dataplane::{ArrivalView, Arrivals, DataplaneError, PeerView, Pins, TunnelView, View, boot_time_ns};
use crate::host::HostError;
use crate::host::Netlink;
use crate::host::links::{Link, Links};
use crate::host::underlay::{self, Carriers};
use crate::host::wireguard::kernel;
use crate::plan::Backend;
use crate::plan::measured;
use crate::plan::ports::PortError;
use crate::report::stats::{Balance, Member, Order, Report, RxMember, Tunnel};

/// The data to show cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    #[error("reading the host's links")]
    Netlink(#[source] std::io::Error),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Ports(#[from] PortError),
}

/// The present statistics of `site`. The rates are zero: they need two reports. Without the site's `config`, outer
/// endpoints and bond members are unknown.
pub async fn report(site: &str, config: Option<&Config>, pins: &Pins, netlink: &Netlink) -> Result<Report, StatsError> {
    let view = View::open(pins)?;
    let peers: Vec<String> = view.peers().into_iter().map(|peer| peer.name).collect();
    let links = netlink.links().await.map_err(StatsError::Netlink)?;
    let arrivals = Arrivals::open(pins)?.counts()?;
    let mut tunnels = Vec::new();
    let mut members = BTreeMap::new();
    for seen in view.tunnels()? {
        let mut tunnel = tunnel_report(&seen, &peers, &links);
        if let Some(health) = view.health(seen.id) {
            probed(&mut tunnel, health);
        }
        tunnel.rx_members = arrived(&arrivals, &seen, &links);
        tunnel.rx_member = only_member(&tunnel.rx_members);
        if let Some((local, remote)) = config.and_then(|config| outer_endpoints(config, &seen)) {
            tunnel.endpoint = remote.to_string();
            let mut carriers = Carriers::of(&links, netlink.outgoing_interface(local, remote).await);
            if carriers.read_macs() {
                carriers.macs = underlay::macs(&links, netlink, local, remote).await.0;
            }
            tunnel.member = carriers.carrier(local, remote).map(|link| link.name.clone()).unwrap_or_default();
            members.extend(carriers.ports.iter().map(|link| (link.ifindex, member_report(link, &arrivals))));
        }
        tunnels.push(tunnel);
    }
    let order = order(&view)?;
    let reasons = view.reasons()?;
    let named = |counts: Vec<(&str, u64)>| counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
    Ok(Report {
        site: site.to_owned(),
        steering_device: links.index(view.settings().steering_ifindex).map_or_else(
            || config.map(|config| config.steering.device.to_string()).unwrap_or_default(),
            |link| link.name.clone(),
        ),
        policy: policy(&view),
        backend: backend(&links, &tunnels).to_string(),
        hook: view.hook().to_string(),
        balance: Balance::of(tunnels.iter().map(|tunnel| (tunnel.tx_bytes, tunnel.weight))),
        tunnels,
        order,
        members: members.into_values().collect(),
        not_steered: named(reasons.not_steered),
        dropped: named(reasons.dropped),
    })
}

/// How packets are put back in order, for each peer.
fn order(view: &View) -> Result<Vec<Order>, DataplaneError> {
    let of = |(number, peer): (u32, PeerView)| {
        let counters = view.order_counters(number)?;
        Ok(Order {
            peer: peer.name,
            restored_there: view.peer(number).is_some_and(|peer| peer.flags.get() & peer_flags::STAMP != 0),
            restored_here: view.order(number).is_some_and(|order| order.device.get() != 0),
            stamped: counters.stamped,
            restored: counters.restored,
            late: counters.late,
            given_up: counters.given_up,
        })
    };
    (0..).zip(view.peers()).map(of).collect()
}

fn tunnel_report(seen: &TunnelView, peers: &[String], links: &Links) -> Tunnel {
    let present = links.index(seen.ifindex).is_some_and(|link| link.name == seen.name);
    Tunnel {
        name: seen.name.clone(),
        peer: peers.get(seen.id.peer() as usize).cloned().unwrap_or_default(),
        ifindex: seen.ifindex,
        state: match (present, seen.live) {
            (false, _) => "missing",
            (true, true) => "up",
            (true, false) => "down",
        }
        .to_owned(),
        weight: u32::from(seen.weight),
        tx_packets: seen.counters.tx_packets,
        tx_bytes: seen.counters.tx_bytes,
        rx_packets: seen.counters.rx_packets,
        rx_bytes: seen.counters.rx_bytes,
        buckets: u64::from(seen.buckets),
        flowlet_moves: seen.counters.flowlet_moves,
        rebalance_moves: seen.rebalance_moves,
        failover_moves: seen.counters.failover_moves,
        last_handshake_s: kernel::last_handshake(&seen.name)
            .or(seen.last_handshake)
            .map_or(-1, |age| i64::try_from(age.as_secs()).unwrap_or(i64::MAX)),
        ..Tunnel::default()
    }
}

/// The policy of all peers, or `mixed`.
fn policy(view: &View) -> String {
    let mut names = view.peers().into_iter().map(|peer| peer.policy.map_or("unknown", Policy::as_str));
    let first = names.next().unwrap_or("unknown");
    if names.all(|name| name == first) { first } else { "mixed" }.to_owned()
}

/// Fills in what probing found.
fn probed(tunnel: &mut Tunnel, health: &Health) {
    tunnel.rtt_us = health.rtt_us.get().into();
    tunnel.rtt_jitter_us = health.rtt_jitter_us.get().into();
    tunnel.rtt_min_us = health.rtt_min_us.get().into();
    tunnel.loss = f64::from(health.loss_ppm.get()) / 1e6;
    tunnel.deaths = health.deaths.get().into();
    tunnel.restarts = health.restarts.get().into();
    let changed = health.changed_ns.get();
    let age = boot_time_ns().saturating_sub(changed) / 1_000_000_000;
    tunnel.changed_s = if changed == 0 { -1 } else { i64::try_from(age).unwrap_or(i64::MAX) };
}

/// The WireGuard backend, recognised by the kind of the tunnels' devices.
fn backend(links: &Links, tunnels: &[Tunnel]) -> Backend {
    let in_kernel =
        |tunnel: &Tunnel| links.index(tunnel.ifindex).is_some_and(|link| link.kind.as_deref() == Some("wireguard"));
    if tunnels.iter().any(in_kernel) { Backend::Kernel } else { Backend::Userspace }
}

/// The network port that a tunnel's outer packets leave by; `None` if it is unknown.
pub async fn member(config: &Config, links: &Links, netlink: &Netlink, seen: &TunnelView) -> Option<String> {
    let (local, remote) = outer_endpoints(config, seen)?;
    let carriers = Carriers::of(links, netlink.outgoing_interface(local, remote).await);
    carriers.carrier(local, remote).map(|link| link.name.clone())
}

/// Local and remote endpoint of a tunnel's outer packets. The remote endpoint is where the kernel's WireGuard last
/// heard the peer, else the configured one. `None` if it is unknown.
pub fn outer_endpoints(config: &Config, seen: &TunnelView) -> Option<(SocketAddr, SocketAddr)> {
    let peer = config.peers.get(seen.id.peer() as usize)?;
    let tunnel = peer.tunnels.iter().find(|tunnel| tunnel.name.as_str() == seen.name)?;
    let heard = kernel::peers(&seen.name).ok().and_then(|peers| peers.first()?.endpoint);
    let configured = SocketAddr::new(peer.remote_endpoint, tunnel.remote_port);
    // An unspecified address stands for a host name that is not resolved here.
    let remote = heard.or((!configured.ip().is_unspecified()).then_some(configured))?;
    Some((SocketAddr::new(peer.local_endpoint, tunnel.listen_port), remote))
}

fn member_report(link: &Link, arrivals: &[ArrivalView]) -> Member {
    let here = || arrivals.iter().filter(|arrival| arrival.ifindex == link.ifindex);
    Member {
        name: link.name.clone(),
        tx_bytes: link.tx_bytes,
        rx_bytes: link.rx_bytes,
        arrived_packets: here().map(|arrival| arrival.packets).sum(),
        arrived_bytes: here().map(|arrival| arrival.bytes).sum(),
    }
}

/// What arrived of a tunnel, by member.
fn arrived(arrivals: &[ArrivalView], seen: &TunnelView, links: &Links) -> Vec<RxMember> {
    let own: Vec<&ArrivalView> = arrivals.iter().filter(|arrival| arrival.id == seen.id).collect();
    let current = measured::current(own.iter().map(|arrival| arrival.age));
    let shown = own.into_iter().zip(current).filter(|(arrival, _)| arrival.packets > 0);
    let name = |ifindex| links.index(ifindex).map_or_else(|| format!("#{ifindex}"), |link| link.name.clone());
    shown
        .map(|(arrival, current)| RxMember {
            name: name(arrival.ifindex),
            packets: arrival.packets,
            bytes: arrival.bytes,
            last_s: arrival.age.map_or(-1.0, |age| age.as_secs_f64()),
            current,
        })
        .collect()
}

/// The member that a tunnel arrives on; `None` if there are several or none.
fn only_member(members: &[RxMember]) -> Option<String> {
    let mut current = members.iter().filter(|member| member.current);
    let first = current.next()?;
    current.next().is_none().then(|| first.name.clone())
}
