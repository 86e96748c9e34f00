//! Saves what a bond member has before it is enslaved, and restores it.
//!
//! Enslaving sets a device down and flushes its addresses, the routes through it and its neighbour entries. On release
//! the kernel restores MAC address and MTU, and makes link-local addresses and prefix routes again. The rest is
//! restored here.

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

/// How long to wait for IPv6 addresses. About three seconds after the carrier returns, link-local addresses are there
/// again and duplicate address detection has ended.
const SETTLE: Duration = Duration::from_secs(6);
const POLL: Duration = Duration::from_millis(50);

fn is_link_local(message: &AddressMessage) -> bool {
    message.header.scope == AddressScope::Link && local_address(message).is_some_and(|a| a.is_ipv6())
}

/// Whether enslaving removes this route and nothing restores it.
fn is_lost_with(message: &RouteMessage, member: u32, addresses: &[IpAddr]) -> bool {
    // Routes from router advertisements return: the device solicits one when it comes up.
    let by_kernel = matches!(message.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    let special = matches!(
        message.header.kind,
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast
    );
    let cached = message.header.flags.contains(RouteFlags::Cloned);
    // The kernel also removes IPv4 routes with their source address: fib_sync_down_addr(), net/ipv4/fib_semantics.c.
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
        // The kernel lists IPv4 addresses first, then IPv6 addresses with the newest first (ipv6_link_dev_addr(),
        // net/ipv6/addrconf.c). Reverse the IPv6 part.
        let ipv6_at = addresses.partition_point(|a| local_address(a).is_none_or(|a| a.is_ipv4()));
        addresses[ipv6_at..].reverse();
        let locals: Vec<IpAddr> = addresses.iter().filter_map(local_address).collect();
        // Only the kernel can make temporary addresses, and it makes them again.
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
            routes: routes.iter().filter(|r| is_lost_with(r, member.ifindex, &locals)).map(Saved::route).collect(),
            neighbours: neighbours.iter().filter(permanent).map(Saved::neighbour).collect(),
        })
    }

    /// Removes the addresses: enslaving alone may leave them.
    pub async fn strip(netlink: &Netlink, member: u32) -> io::Result<()> {
        // Remove secondary addresses first: removing a primary address removes or promotes them.
        for address in addresses_of(netlink, member).await?.into_iter().rev() {
            ignore_missing(netlink.request(RouteNetlinkMessage::DelAddress(address), 0).await)?;
        }
        Ok(())
    }

    /// Restores everything on the released member. Continues after failures.
    ///
    /// # Errors
    /// The first failure.
    pub async fn restore(&self, netlink: &Netlink, member: &Link) -> io::Result<()> {
        let mut result = self.restore_device(netlink, member).await;
        if self.up {
            self.wait_for_addresses(netlink, member.ifindex).await?;
        }
        for neighbour in &self.neighbours {
            result = result.and(
                create_if_missing(netlink, RouteNetlinkMessage::NewNeighbour(neighbour.message()?), NLM_F_EXCL).await,
            );
        }
        result.and(self.restore_routes(netlink).await)
    }

    /// Restores state, MTU and addresses, without waiting. May be repeated.
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

    /// Waits until the link-local addresses are there again and duplicate address detection has ended. Then adds those
    /// that did not return by themselves.
    async fn wait_for_addresses(&self, netlink: &Netlink, member: u32) -> io::Result<()> {
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

    /// Restores the routes. A route may need another one to reach its gateway, so repeats while more succeed. Skips a
    /// route that also uses a device that is still enslaved: releasing that device restores the route.
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

/// Creates something again. Succeeds if it exists already.
async fn create_if_missing(netlink: &Netlink, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    match netlink.request(message, NLM_F_CREATE | flags).await {
        Err(e) if errno_of(&e) == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

async fn addresses_of(netlink: &Netlink, index: u32) -> io::Result<Vec<AddressMessage>> {
    Ok(netlink.addresses().await?.into_iter().filter(|address| address.header.index == index).collect())
}
