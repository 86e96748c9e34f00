//! Asks the kernel where outer packets go now: the interface, the next hop and its Ethernet address.

use std::net::{IpAddr, SocketAddr};

use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteVia};
use rtnetlink::RouteMessageBuilder;

use super::netlink::Netlink;

/// IP protocol numbers.
const TCP: u8 = 6;
const UDP: u8 = 17;

impl Netlink {
    /// Index of the interface that a UDP datagram from `local` to `remote` uses now. `None`: no route.
    pub async fn outgoing_interface(&self, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
        self.next_hop(local, remote).await.map(|(ifindex, _)| ifindex)
    }

    /// The Ethernet address of a neighbour on an interface, from the neighbour table. `None`: it is not resolved.
    pub async fn neighbour(&self, ifindex: u32, address: IpAddr) -> Option<[u8; 6]> {
        let desired = NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        });
        let entries = self.neighbours().await.ok()?;
        let unresolved = [NeighbourState::Incomplete, NeighbourState::Failed];
        let entry = entries.iter().find(|entry| {
            let header = &entry.header;
            header.ifindex == ifindex && !unresolved.contains(&header.state) && entry.attributes.contains(&desired)
        })?;
        entry.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(address) => address.as_slice().try_into().ok(),
            _ => None,
        })
    }

    /// The interface that a UDP datagram from `local` to `remote` uses now, and the next hop: a router, or `remote`
    /// itself.
    pub async fn next_hop(&self, local: SocketAddr, remote: SocketAddr) -> Option<(u32, IpAddr)> {
        self.route_of(UDP, local, remote).await
    }

    /// Index of the interface that a TCP segment from `local` to `remote` uses now. `None`: no route.
    pub async fn interface_of_tcp(&self, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
        self.route_of(TCP, local, remote).await.map(|(ifindex, _)| ifindex)
    }

    async fn route_of(&self, protocol: u8, local: SocketAddr, remote: SocketAddr) -> Option<(u32, IpAddr)> {
        let request = match (local.ip(), remote.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .source_prefix(from, 32)
                .destination_prefix(to, 32)
                .ip_protocol(protocol)
                .sport(local.port())
                .dport(remote.port())
                .build(),
            (IpAddr::V6(from), IpAddr::V6(to)) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .source_prefix(from, 128)
                .destination_prefix(to, 128)
                .ip_protocol(protocol)
                .sport(local.port())
                .dport(remote.port())
                .build(),
            _ => return None,
        };
        let reply = self.route_to(request).await.ok()??;
        let gateway = reply.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) | RouteAttribute::Via(RouteVia::Inet(gateway)) => {
                Some(IpAddr::from(*gateway))
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) | RouteAttribute::Via(RouteVia::Inet6(gateway)) => {
                Some(IpAddr::from(*gateway))
            }
            _ => None,
        });
        let outgoing = reply.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(ifindex) => Some(*ifindex),
            _ => None,
        });
        Some((outgoing?, gateway.unwrap_or(remote.ip())))
    }
}
