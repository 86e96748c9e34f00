//! A route of type `unreachable` beside each steered route. It depends on no device, and so it stays when the steering
//! device goes down or is deleted. Without it, a shorter prefix such as the default route would take the packets, and
//! they would leave unencrypted.

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use super::error::{During as _, HostError};
use super::journal::Journal;
use super::netlink::Netlink;
use super::record::Undo;
use super::route;

/// Worse than every metric that other programs use. Among routes to one prefix the lowest metric wins.
const METRIC: u32 = 0xff00_2000;

/// Adds the route.
pub async fn add(netlink: &Netlink, journal: &mut Journal, prefix: IpNet) -> Result<(), HostError> {
    let is_new = journal.record_once(Undo::DeleteUnreachable { prefix })?;
    let added = netlink.request(RouteNetlinkMessage::NewRoute(message(prefix)), NLM_F_CREATE | NLM_F_EXCL).await;
    if added.is_err() && is_new {
        journal.retract()?;
    }
    added.during(|| format!("adding an unreachable route to {prefix}"))
}

/// The netlink message that adds or removes the route to `prefix`.
pub fn message(prefix: IpNet) -> RouteMessage {
    let mut message = route::to(prefix);
    message.header.kind = RouteType::Unreachable;
    message.header.scope = RouteScope::Universe;
    message.attributes.push(RouteAttribute::Priority(METRIC));
    message
}

/// The unreachable route to exactly `prefix`, if there is one.
pub fn find(routes: &[RouteMessage], prefix: IpNet) -> Option<&RouteMessage> {
    routes.iter().filter(|route| route::is_unreachable(route)).find(|route| route::leads_to(route, prefix))
}
