//! What a bond member had before it was enslaved, and giving it back.
//!
//! Enslaving takes a device down and flushes it: its addresses, the routes through it and its neighbour entries go.
//! The kernel gives back the MAC address and the MTU, and makes link-local addresses and prefix routes again.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::neighbour::{NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};
use tokio::time::{Instant, sleep};

use super::links::Link;
use super::netlink::{Netlink, errno_of, ignore_missing};
use super::record::MemberState;
use super::saved::{Saved, address_flags, local_address};
use super::{route, sysctl};

/// The kernel makes link-local addresses again, and duplicate address detection ends, within about three seconds of
/// the carrier's return.
const SETTLE: Duration = Duration::from_secs(6);
const POLL: Duration = Duration::from_millis(50);

fn is_link_local(message: &AddressMessage) -> bool {
    message.header.scope == AddressScope::Link && local_address(message).is_some_and(|a| a.is_ipv6())
}

/// Whether a route would not come back by itself.
fn vanishes(message: &RouteMessage, member: u32, addresses: &[IpAddr]) -> bool {
    // Router advertisements bring theirs again: the device asks for one when it comes up.
    let by_kernel = matches!(message.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    let special = matches!(
        message.header.kind,
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast
    );
    let cached = message.header.flags.contains(RouteFlags::Cloned);
    // IPv4 routes go with their source address too: fib_sync_down_addr(), net/ipv4/fib_semantics.c.
    let source_goes = message.attributes.iter().any(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(source)) => addresses.contains(&IpAddr::V4(*source)),
        _ => false,
    });
    !by_kernel && !special && !cached && (source_goes || route::output_interfaces(message).contains(&member))
}

impl MemberState {
    /// Reads what `member` has.
    pub async fn read(netlink: &Netlink, member: &Link) -> io::Result<Self> {
        let mut addresses = addresses_of(netlink, member.ifindex).await?;
        // The kernel lists IPv6 addresses from the newest on: ipv6_link_dev_addr(), net/ipv6/addrconf.c. Two families,
        // of which the later one is turned around.
        let ipv6_at = addresses.partition_point(|a| local_address(a).is_none_or(|a| a.is_ipv4()));
        addresses[ipv6_at..].reverse();
        let locals: Vec<IpAddr> = addresses.iter().filter_map(local_address).collect();
        // The kernel makes temporary addresses again; nobody else can.
        let lasting = |address: &&AddressMessage| {
            local_address(address).is_none_or(|a| a.is_ipv4())
                || !address_flags(address).contains(AddressFlags::Secondary)
        };
        let (link_local, addresses): (Vec<_>, Vec<_>) =
            addresses.iter().filter(lasting).partition(|a| is_link_local(a));
        let routes = netlink.routes().await?;
        let neighbours = netlink.neighbours().await?;
        let permanent =
            |n: &&NeighbourMessage| n.header.ifindex == member.ifindex && n.header.state == NeighbourState::Permanent;
        Ok(Self {
            up: member.up,
            pristine: member.qdisc.as_deref() == Some("noop"),
            mtu: member.mtu,
            ipv6_mtu: sysctl::read(&format!("ipv6/conf/{}/mtu", member.name)).ok(),
            addresses: addresses.into_iter().map(Saved::address).collect(),
            link_local: link_local.into_iter().map(Saved::address).collect(),
            routes: routes.iter().filter(|r| vanishes(r, member.ifindex, &locals)).map(Saved::route).collect(),
            neighbours: neighbours.iter().filter(permanent).map(Saved::neighbour).collect(),
        })
    }

    /// Takes away what would outlive the enslaving: the addresses.
    pub async fn strip(netlink: &Netlink, member: u32) -> io::Result<()> {
        // Secondary addresses first: removing a primary one removes or promotes them.
        for address in addresses_of(netlink, member).await?.into_iter().rev() {
            ignore_missing(netlink.request(RouteNetlinkMessage::DelAddress(address), 0).await)?;
        }
        Ok(())
    }

    /// Gives all of it back to the released member. Goes on past failures and returns the first.
    pub async fn restore(&self, netlink: &Netlink, member: &Link) -> io::Result<()> {
        let mut result = self.restore_device(netlink, member).await;
        if self.up {
            self.settle(netlink, member.ifindex).await?;
        }
        for neighbour in &self.neighbours {
            result = result.and(
                create_if_missing(netlink, RouteNetlinkMessage::NewNeighbour(neighbour.message()?), NLM_F_EXCL).await,
            );
        }
        result.and(self.restore_routes(netlink).await)
    }

    /// Its state, MTU and addresses, which wait for nothing. May be repeated.
    pub async fn restore_device(&self, netlink: &Netlink, member: &Link) -> io::Result<()> {
        let mut result = Ok(());
        let set_mtu = LinkMessageBuilder::<LinkUnspec>::new().index(member.ifindex).mtu(self.mtu).build();
        result = result.and(netlink.set_link(set_mtu).await);
        let set_state =
            if self.up { netlink.set_up(member.ifindex).await } else { netlink.set_down(member.ifindex).await };
        result = result.and(set_state);
        for address in &self.addresses {
            result = result
                .and(create_if_missing(netlink, RouteNetlinkMessage::NewAddress(address.message()?), NLM_F_EXCL).await);
        }
        if self.pristine && !self.up {
            result = result.and(netlink.clear_qdisc(member.ifindex).await);
        }
        if let Some(mtu) = &self.ipv6_mtu {
            result = result.and(sysctl::write_if_there(&format!("ipv6/conf/{}/mtu", member.name), mtu));
        }
        result
    }

    /// Waits until the link-local addresses are there again and duplicate address detection is over; adds those that
    /// do not come by themselves.
    async fn settle(&self, netlink: &Netlink, member: u32) -> io::Result<()> {
        let desired: Vec<IpAddr> = self
            .link_local
            .iter()
            .map(|saved| saved.message().map(|message: AddressMessage| local_address(&message)))
            .filter_map(Result::transpose)
            .collect::<io::Result<_>>()?;
        let wants_ipv6 = !desired.is_empty() || self.addresses.iter().any(|a| a.text.contains(':'));
        if !wants_ipv6 {
            return Ok(());
        }
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = addresses_of(netlink, member).await?;
            let there: Vec<IpAddr> = now.iter().filter_map(local_address).collect();
            let tentative = now.iter().any(|a| address_flags(a).contains(AddressFlags::Tentative));
            if !tentative && desired.iter().all(|address| there.contains(address)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                break;
            }
            sleep(POLL).await;
        }
        for saved in &self.link_local {
            create_if_missing(netlink, RouteNetlinkMessage::NewAddress(saved.message()?), NLM_F_EXCL).await?;
        }
        Ok(())
    }

    /// A route may need another one to reach its gateway: goes on as long as that helps. One that also uses a device
    /// that is still enslaved waits for that device's own release, which restores it too.
    async fn restore_routes(&self, netlink: &Netlink) -> io::Result<()> {
        let links = netlink.links().await?;
        let enslaved = |index: &u32| links.iter().any(|link| link.ifindex == *index && link.master.is_some());
        let mut left = Vec::new();
        for saved in &self.routes {
            if !route::output_interfaces(&saved.message::<RouteMessage>()?).iter().any(enslaved) {
                left.push(saved);
            }
        }
        loop {
            let mut failed = Vec::new();
            let mut first_error = Ok(());
            for saved in &left {
                let added =
                    create_if_missing(netlink, RouteNetlinkMessage::NewRoute(saved.message()?), NLM_F_APPEND).await;
                if let Err(e) = added {
                    failed.push(*saved);
                    first_error = first_error.and(Err(io::Error::new(e.kind(), format!("route {}: {e}", saved.text))));
                }
            }
            if failed.is_empty() || failed.len() == left.len() {
                return first_error;
            }
            left = failed;
        }
    }
}

/// Creates something again; that it is there already is fine.
async fn create_if_missing(netlink: &Netlink, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    match netlink.request(message, NLM_F_CREATE | flags).await {
        Err(e) if errno_of(&e) == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

async fn addresses_of(netlink: &Netlink, index: u32) -> io::Result<Vec<AddressMessage>> {
    Ok(netlink.addresses().await?.into_iter().filter(|address| address.header.index == index).collect())
}
