//! Netlink messages that are saved to be sent again: addresses, routes and neighbour entries exactly as the kernel
//! reported them, like `ip address save` and `ip route save`.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags};
use rtnetlink::packet_core::{Emitable, Parseable};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The object in words, for the log.
    pub text: String,
    /// The message in hexadecimal digits.
    netlink: String,
}

impl Saved {
    /// Saves an address, with its lifetimes and every flag that can be restored.
    pub fn address(message: &AddressMessage) -> Self {
        let mut message = message.clone();
        // The kernel sets these flags itself, from the state at the time.
        let own = AddressFlags::Tentative
            | AddressFlags::Dadfailed
            | AddressFlags::Secondary
            | AddressFlags::Deprecated
            | AddressFlags::Permanent;
        message.header.flags = AddressHeaderFlags::from_bits_retain(
            message.header.flags.bits() & !u8::try_from(own.bits()).unwrap_or(u8::MAX),
        );
        for attribute in &mut message.attributes {
            if let AddressAttribute::Flags(flags) = attribute {
                flags.remove(own);
            }
        }
        Self { text: address_text(&message), netlink: hex(&message) }
    }

    /// Saves a route, without the values that the kernel computes.
    pub fn route(message: &RouteMessage) -> Self {
        let mut message = message.clone();
        message.header.flags &= RouteFlags::Onlink;
        message.attributes.retain(|a| !matches!(a, RouteAttribute::CacheInfo(_)));
        for attribute in &mut message.attributes {
            if let RouteAttribute::MultiPath(hops) = attribute {
                for hop in hops {
                    hop.flags &= RouteNextHopFlags::Onlink;
                }
            }
        }
        Self { text: route_text(&message), netlink: hex(&message) }
    }

    pub fn neighbour(message: &NeighbourMessage) -> Self {
        let mut message = message.clone();
        message.attributes.retain(|a| !matches!(a, NeighbourAttribute::CacheInfo(_) | NeighbourAttribute::Probes(_)));
        let text = message.attributes.iter().find_map(|a| match a {
            NeighbourAttribute::Destination(address) => Some(format!("{address:?}")),
            _ => None,
        });
        Self { text: text.unwrap_or_default(), netlink: hex(&message) }
    }

    /// Parses the saved message.
    ///
    /// # Errors
    /// The text is not a valid message.
    pub fn message<M: Parseable<[u8]>>(&self) -> io::Result<M> {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the journal holds a malformed netlink message");
        let byte = |at: usize| self.netlink.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let bytes: Option<Vec<u8>> = (0..self.netlink.len()).step_by(2).map(byte).collect();
        M::parse(&bytes.ok_or_else(malformed)?).map_err(|_| malformed())
    }
}

fn hex(message: &impl Emitable) -> String {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The address itself: `IFA_LOCAL`, else `IFA_ADDRESS`.
pub fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// All flags of an address.
pub fn address_flags(message: &AddressMessage) -> AddressFlags {
    let wide = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    wide.unwrap_or(AddressFlags::from_bits_retain(u32::from(message.header.flags.bits())))
}

fn address_text(message: &AddressMessage) -> String {
    local_address(message).map_or_else(String::new, |a| format!("{a}/{}", message.header.prefix_len))
}

/// The destination of a route: for example `10.0.0.0/8`, or `default`.
pub fn destination_text(message: &RouteMessage) -> String {
    let destination = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(address.to_string()),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(address.to_string()),
        _ => None,
    });
    destination.map_or_else(
        || "default".to_owned(),
        |address| format!("{address}/{}", message.header.destination_prefix_length),
    )
}

fn route_text(message: &RouteMessage) -> String {
    let gateway = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(format!(" via {address}")),
        RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some(format!(" via {address}")),
        _ => None,
    });
    format!("{}{}", destination_text(message), gateway.unwrap_or_default())
}
