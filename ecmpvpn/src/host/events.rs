//! Route netlink events: wakes as soon as somebody changes a link, an address or a route that a site may depend on.

use std::collections::BTreeSet;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::RouteMessage;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};

use super::error::{During as _, HostError};
use super::route;

const GROUPS: [MulticastGroup; 6] = [
    MulticastGroup::Link,
    MulticastGroup::Tc,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

/// What a site depends on.
#[derive(Clone, Debug, Default)]
pub struct Interest {
    /// Its devices' interface indexes.
    pub links: BTreeSet<u32>,
    /// Its devices' names: a device that was made anew has another index.
    pub names: BTreeSet<String>,
    /// The prefixes that it routes.
    pub prefixes: Vec<IpNet>,
}

impl Interest {
    /// Whether the event is about something that the site depends on.
    fn concerns(&self, event: &RouteNetlinkMessage) -> bool {
        match event {
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
                let is_ours = |attribute: &LinkAttribute| match attribute {
                    LinkAttribute::IfName(name) => self.names.contains(name),
                    _ => false,
                };
                self.links.contains(&link.header.index) || link.attributes.iter().any(is_ours)
            }
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                self.links.contains(&address.header.index)
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => self.routes(route),
            RouteNetlinkMessage::NewQueueDiscipline(tc)
            | RouteNetlinkMessage::DelQueueDiscipline(tc)
            | RouteNetlinkMessage::NewTrafficFilter(tc)
            | RouteNetlinkMessage::DelTrafficFilter(tc) => {
                u32::try_from(tc.header.index).is_ok_and(|index| self.links.contains(&index))
            }
            _ => false,
        }
    }

    fn routes(&self, message: &RouteMessage) -> bool {
        self.prefixes.iter().any(|prefix| route::leads_to(message, *prefix))
            || route::output_interfaces(message).iter().any(|index| self.links.contains(index))
    }
}

/// A subscription to the events in the network namespace of the thread that opened it.
pub struct Events {
    /// `None`: the kernel dropped events.
    messages: BoxStream<'static, Option<RouteNetlinkMessage>>,
}

impl Events {
    /// Subscribes. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel gives no socket.
    pub fn open() -> Result<Self, HostError> {
        let opened = rtnetlink::new_multicast_connection(&GROUPS);
        let (connection, _, messages) = opened.during(|| "subscribing to netlink events".to_owned())?;
        tokio::spawn(connection);
        let event = async |(message, _): (NetlinkMessage<RouteNetlinkMessage>, _)| match message.payload {
            NetlinkPayload::InnerMessage(event) => Some(Some(event)),
            NetlinkPayload::Overrun(_) => Some(None),
            _ => None,
        };
        Ok(Self { messages: messages.filter_map(event).boxed() })
    }

    /// Waits for an event that `interest` is about. `false`: there are no more events, for example because so many came
    /// at once that the kernel dropped some. Then something may have been missed: look at the state, and subscribe
    /// again.
    pub async fn next(&mut self, interest: &Interest) -> bool {
        while let Some(Some(event)) = self.messages.next().await {
            if interest.concerns(&event) {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::address::AddressMessage;
    use netlink_packet_route::link::LinkMessage;

    #[test]
    fn only_what_a_site_depends_on_concerns_it() {
        let interest = Interest {
            links: [7].into(),
            names: ["ecmp0".to_owned()].into(),
            prefixes: vec!["10.20.0.0/16".parse().unwrap(), "fd00:20::/48".parse().unwrap()],
        };
        let link = |index, name: &str| {
            let mut link = LinkMessage::default();
            link.header.index = index;
            link.attributes.push(LinkAttribute::IfName(name.to_owned()));
            RouteNetlinkMessage::NewLink(link)
        };
        assert!(interest.concerns(&link(7, "renamed")) && interest.concerns(&link(9, "ecmp0")));
        assert!(!interest.concerns(&link(8, "eth0")));
        let address = |index| {
            let mut address = AddressMessage::default();
            address.header.index = index;
            RouteNetlinkMessage::DelAddress(address)
        };
        assert!(interest.concerns(&address(7)) && !interest.concerns(&address(8)));
        let gone = |prefix: &str| RouteNetlinkMessage::DelRoute(route::to(prefix.parse().unwrap()));
        assert!(interest.concerns(&gone("10.20.0.0/16")) && interest.concerns(&gone("fd00:20::/48")));
        // On a router thousands of other routes come and go.
        assert!(!interest.concerns(&gone("10.20.0.0/17")) && !interest.concerns(&gone("0.0.0.0/0")));
    }
}
