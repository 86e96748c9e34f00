//! Common steps for the bond, the tunnels and the steering device: make the link under a journal record, set the site's
//! alias, set MTU and addresses.

use std::io;

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::{AddressFamily, address::AddressScope};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::error::{During as _, HostError};
use super::journal::Journal;
use super::netlink::Netlink;
use super::record::{LinkId, Undo};
use super::sysctl;

/// A link that is about to be made.
#[derive(Clone, Copy, Debug)]
pub struct New<'a> {
    pub name: &'a str,
    /// For example `bond`.
    pub kind: &'a str,
    /// The site's alias, which marks the link as made by ecmpvpn.
    pub alias: &'a str,
}

impl New<'_> {
    fn undo(&self, ifindex: Option<u32>) -> Undo {
        let link = LinkId { name: self.name.to_owned(), ifindex, alias: Some(self.alias.to_owned()) };
        Undo::DeleteLink { link, kind: self.kind.to_owned() }
    }

    /// Records in the journal that the link is about to be made.
    pub fn announce(&self, journal: &mut Journal) -> Result<(), HostError> {
        Ok(journal.record(self.undo(None))?)
    }

    /// Makes the link with `message`. Returns its interface index.
    ///
    /// # Errors
    /// Also if the name is taken.
    pub async fn create(
        &self,
        netlink: &Netlink,
        journal: &mut Journal,
        message: LinkMessage,
    ) -> Result<u32, HostError> {
        self.announce(journal)?;
        let made = netlink.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await;
        if made.is_err() {
            // Nothing was made. A device that has the name now must not be removed by an undo.
            journal.retract()?;
        }
        made.during(|| format!("creating {} {}", self.kind, self.name))?;
        self.adopt(netlink, journal).await
    }

    /// Sets the alias of the link that was just made, and records its index. Returns the index.
    pub async fn adopt(&self, netlink: &Netlink, journal: &mut Journal) -> Result<u32, HostError> {
        let mark = async {
            let link = netlink.link(self.name).await?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
            // The kernel ignores an alias in the request that makes a link (rtnl_create_link(), net/core/rtnetlink.c).
            let message = LinkMessageBuilder::<LinkUnspec>::new().index(link.ifindex).alias(self.alias).build();
            netlink.set_link(message).await?;
            io::Result::Ok(link.ifindex)
        };
        let index = mark.await.during(|| format!("setting the alias of {}", self.name))?;
        journal.amend(self.undo(Some(index)))?;
        Ok(index)
    }

    /// The link's identity for journal records, once its index is known.
    pub fn id(&self, ifindex: u32) -> LinkId {
        LinkId { name: self.name.to_owned(), ifindex: Some(ifindex), alias: Some(self.alias.to_owned()) }
    }
}

/// Sets MTU, IPv6 settings and addresses of a tunnel or of the steering device.
pub async fn prepare(
    netlink: &Netlink,
    name: &str,
    index: u32,
    mtu: u32,
    addresses: &[IpNet],
) -> Result<(), HostError> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().index(index).mtu(mtu).build();
    netlink.set_link(message).await.during(|| format!("setting the MTU of {name} to {mtu}"))?;
    // addr_gen_mode 1: no automatic link-local address, so that no unexpected packets leave through a tunnel.
    // disable_ipv6 0: the host's default may disable IPv6, but the plan may need it. A host without IPv6 has neither
    // setting.
    sysctl::write_if_there(&format!("ipv6/conf/{name}/addr_gen_mode"), "1")
        .and_then(|()| sysctl::write_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "0"))
        .during(|| format!("preparing IPv6 on {name}"))?;
    for address in addresses {
        add_inner_address(netlink, name, index, *address).await?;
    }
    Ok(())
}

/// Adds an address to a tunnel or to the steering device. No other host is on these links, so duplicate address
/// detection is not needed. Without `nodad` an IPv6 address is tentative at first, and the kernel refuses it as the
/// source of a route.
pub async fn add_inner_address(netlink: &Netlink, name: &str, index: u32, address: IpNet) -> Result<(), HostError> {
    let mut message = address_message(index, address);
    message.header.flags = AddressHeaderFlags::Nodad;
    add(netlink, name, address, message).await
}

/// Adds an address as `ip address add` does.
pub async fn add_address(netlink: &Netlink, name: &str, index: u32, address: IpNet) -> Result<(), HostError> {
    add(netlink, name, address, address_message(index, address)).await
}

async fn add(netlink: &Netlink, name: &str, address: IpNet, message: AddressMessage) -> Result<(), HostError> {
    let message = RouteNetlinkMessage::NewAddress(message);
    netlink.request(message, NLM_F_CREATE | NLM_F_EXCL).await.during(|| format!("adding address {address} to {name}"))
}

/// The netlink message that adds or removes an address.
pub fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.family = if address.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.attributes = vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    if let IpNet::V4(net) = address
        && net.prefix_len() < 31
    {
        message.attributes.push(AddressAttribute::Broadcast(net.broadcast()));
    }
    message
}
