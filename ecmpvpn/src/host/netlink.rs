//! Route netlink: the requests that this program needs. Errors have the kernel's own explanation.

use std::io;

use futures_util::StreamExt as _;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    NlasIterator,
};
use rtnetlink::sys::AsyncSocket as _;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec};

use super::error::{During as _, HostError};
use super::links::{Link, Links};
use super::record::LinkId;
use crate::fault;

/// The text in an extended acknowledgement. Source: `enum nlmsgerr_attrs`, include/uapi/linux/netlink.h.
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGHDR_LEN: usize = 16;

/// A route netlink socket in the network namespace of the thread that opened it.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens the socket in the calling thread's network namespace. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel gives no socket.
    pub fn open() -> Result<Self, HostError> {
        let opened = rtnetlink::new_connection().during(|| "opening a netlink socket".to_owned());
        let (mut connection, handle, _) = opened?;
        // Failures are ignored: then errors only lack the kernel's explanation.
        let socket = connection.socket_mut().socket_mut();
        let _ = socket.set_ext_ack(true).and_then(|()| socket.set_cap_ack(true));
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Sends `message` with `flags` on top of `REQUEST | ACK` and waits for the acknowledgement.
    pub async fn request(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let what = kind(&message);
        fault::point(what);
        let done = self.exchange(message, NLM_F_ACK | flags).await.map(drop);
        fault::point(what);
        done
    }

    async fn exchange(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        let mut answers = self.handle.clone().request(message).map_err(io::Error::other)?;
        let mut messages = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(explained(&error)),
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                _ => {}
            }
        }
        Ok(messages)
    }

    pub async fn links(&self) -> io::Result<Links> {
        let answers = self.exchange(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP).await?;
        Ok(Links(answers.into_iter().filter_map(link).collect()))
    }

    /// The link of this name, if there is one.
    pub async fn link(&self, name: &str) -> io::Result<Option<Link>> {
        self.one_link(LinkMessageBuilder::<LinkUnspec>::new().name(name.to_owned()).build()).await
    }

    /// The link with this index, if there is one.
    pub async fn link_at(&self, index: u32) -> io::Result<Option<Link>> {
        self.one_link(LinkMessageBuilder::<LinkUnspec>::new().index(index).build()).await
    }

    async fn one_link(&self, query: LinkMessage) -> io::Result<Option<Link>> {
        match self.exchange(RouteNetlinkMessage::GetLink(query), 0).await {
            Ok(answers) => Ok(answers.into_iter().find_map(link)),
            Err(e) if errno_of(&e) == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The link of a record, if it still is the same one.
    pub async fn find(&self, id: &LinkId) -> io::Result<Option<Link>> {
        let link = match id.ifindex {
            Some(index) => self.link_at(index).await?,
            None => self.link(&id.name).await?,
        };
        Ok(link.filter(|link| match &id.alias {
            // A link that was just made, and whose index is not recorded yet, may have no alias yet.
            Some(_) if id.ifindex.is_none() && link.alias.is_none() => true,
            Some(alias) => link.alias.as_ref() == Some(alias),
            None => link.name == id.name,
        }))
    }

    /// Changes an existing link, as `ip link set` does.
    pub async fn set_link(&self, message: LinkMessage) -> io::Result<()> {
        self.request(RouteNetlinkMessage::NewLink(message), 0).await
    }

    /// Sets a link administratively up.
    pub async fn set_up(&self, index: u32) -> io::Result<()> {
        self.set_link(LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build()).await
    }

    /// Sets a link administratively down.
    pub async fn set_down(&self, index: u32) -> io::Result<()> {
        self.set_link(LinkMessageBuilder::<LinkUnspec>::new().index(index).down().build()).await
    }

    pub async fn delete_link(&self, index: u32) -> io::Result<()> {
        self.request(RouteNetlinkMessage::DelLink(LinkMessageBuilder::<LinkUnspec>::new().index(index).build()), 0)
            .await
    }

    /// Removes the queueing discipline of a link that is down, as if it had never been up.
    pub async fn clear_qdisc(&self, index: u32) -> io::Result<()> {
        let index = i32::try_from(index).map_err(io::Error::other)?;
        let mut message = TcMessage::with_index(index);
        message.header.parent = TcHandle::ROOT;
        let delete = message.clone();
        message.attributes.push(TcAttribute::Kind("pfifo".to_owned()));
        // The default qdisc cannot be deleted, so replace it first by one that can. Source: tc_get_qdisc(),
        // net/sched/sch_api.c.
        self.request(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE).await?;
        self.request(RouteNetlinkMessage::DelQueueDiscipline(delete), 0).await
    }

    /// Every address of both families.
    pub async fn addresses(&self) -> io::Result<Vec<AddressMessage>> {
        let answers = self.exchange(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP).await?;
        let address = |message| match message {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(address).collect())
    }

    /// Every IPv4 and IPv6 route in every table.
    pub async fn routes(&self) -> io::Result<Vec<RouteMessage>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut query = RouteMessage::default();
            query.header.address_family = family;
            let answers = match self.exchange(RouteNetlinkMessage::GetRoute(query), NLM_F_DUMP).await {
                // The kernel lacks this family.
                Err(e) if matches!(errno_of(&e), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => continue,
                answers => answers?,
            };
            routes.extend(answers.into_iter().filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(route) if route.header.address_family == family => Some(route),
                _ => None,
            }));
        }
        Ok(routes)
    }

    /// The route that the kernel would use, as `ip route get` shows it. `None`: the answer has no route.
    pub async fn route_to(&self, query: RouteMessage) -> io::Result<Option<RouteMessage>> {
        let answers = self.exchange(RouteNetlinkMessage::GetRoute(query), 0).await?;
        Ok(answers.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        }))
    }

    /// Every neighbour entry of both families.
    pub async fn neighbours(&self) -> io::Result<Vec<NeighbourMessage>> {
        let answers = self.exchange(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()), NLM_F_DUMP).await?;
        let neighbour = |message| match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(neighbour).collect())
    }
}

/// The kind of a change, for the list of fault points.
fn kind(message: &RouteNetlinkMessage) -> &'static str {
    match message {
        RouteNetlinkMessage::NewLink(_) => "netlink: new link",
        RouteNetlinkMessage::DelLink(_) => "netlink: delete link",
        RouteNetlinkMessage::NewAddress(_) => "netlink: new address",
        RouteNetlinkMessage::DelAddress(_) => "netlink: delete address",
        RouteNetlinkMessage::NewRoute(_) => "netlink: new route",
        RouteNetlinkMessage::DelRoute(_) => "netlink: delete route",
        _ => "netlink: other",
    }
}

fn link(message: RouteNetlinkMessage) -> Option<Link> {
    match message {
        RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
        _ => None,
    }
}

/// Counts "no such object" as success.
pub fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if matches!(errno_of(&e), Some(libc::ENODEV | libc::EADDRNOTAVAIL | libc::ESRCH | libc::ENOENT)) => {
            Ok(())
        }
        other => other,
    }
}

pub fn is_errno<T>(result: &io::Result<T>, errno: i32) -> bool {
    result.as_ref().err().and_then(errno_of) == Some(errno)
}

/// The errno of an error of [`Netlink`], with or without the kernel's explanation.
pub fn errno_of(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| Some(error.get_ref()?.downcast_ref::<Explained>()?.errno))
}

/// An errno with the text of the kernel's extended acknowledgement.
#[derive(Debug, thiserror::Error)]
#[error("{} (the kernel says: {message})", io::Error::from_raw_os_error(*errno))]
struct Explained {
    errno: i32,
    message: String,
}

fn explained(error: &ErrorMessage) -> io::Error {
    let plain = error.to_io();
    let Some(attributes) = error.header.get(NLMSGHDR_LEN..) else { return plain };
    let text = NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)
        .map(|nla| String::from_utf8_lossy(nla.value()).trim_end_matches('\0').to_owned());
    match (text, plain.raw_os_error()) {
        (Some(message), Some(errno)) => io::Error::new(plain.kind(), Explained { errno, message }),
        _ => plain,
    }
}
