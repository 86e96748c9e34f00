//! A packet that must pass, as far as it is known beforehand.

use std::net::IpAddr;

use super::ruleset::Field;

/// Bits of `ct state`. Source: `include/uapi/linux/netfilter/nf_conntrack_common.h`.
pub const ESTABLISHED: u32 = 1 << 1;
pub const NEW: u32 = 1 << 3;

const UDP: u8 = 17;
const ICMP: u8 = 1;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Offsets in the headers.
const IPV4_PROTOCOL: u32 = 9;
const IPV4_SOURCE: u32 = 12;
const IPV4_DESTINATION: u32 = 16;
const IPV6_NEXT_HEADER: u32 = 6;
const IPV6_SOURCE: u32 = 8;
const IPV6_DESTINATION: u32 = 24;
const DESTINATION_PORT: u32 = 2;
/// Length of an interface name in a register, padded with zeros.
const IFNAMSIZ: usize = 16;
/// `NFPROTO_*`, include/uapi/linux/netfilter.h.
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// `RTN_LOCAL`, include/uapi/linux/rtnetlink.h.
const LOCAL: u32 = 2;

/// What the IP packet contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// UDP to this port.
    Udp(u16),
    /// ICMP over IPv4.
    EchoRequest,
    EchoReply,
    /// Anything.
    Any,
}

/// A packet. What is `None` is not known.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    pub is_ipv4: bool,
    pub source: Option<IpAddr>,
    pub destination: Option<IpAddr>,
    pub content: Content,
    pub input: Option<&'a str>,
    /// `None` too if there is none.
    pub output: Option<&'a str>,
    /// Whether the packet is for this host.
    pub is_local: bool,
    /// Its bit of `ct state`.
    pub state: u32,
}

impl Packet<'_> {
    /// The field's bytes, as they would be in a register. `None`: not known.
    pub fn field(&self, field: Field, length: Option<usize>) -> Option<Vec<u8>> {
        let value = match field {
            Field::Family => vec![if self.is_ipv4 { NFPROTO_IPV4 } else { NFPROTO_IPV6 }],
            Field::EtherType => if self.is_ipv4 { 0x0800_u16 } else { 0x86dd }.to_be_bytes().to_vec(),
            Field::Protocol => vec![self.protocol()?],
            Field::InputDevice => device(self.input?),
            Field::OutputDevice => device(self.output?),
            Field::Network(offset) => self.network(offset)?,
            Field::Transport(offset) => self.transport(offset)?,
            Field::ConnectionState => self.state.to_ne_bytes().to_vec(),
            // `PACKET_HOST`: tunnels and steered packets are unicast.
            Field::PacketType => vec![0],
            Field::DestinationType if self.is_local => LOCAL.to_ne_bytes().to_vec(),
            Field::DestinationType | Field::Unknown => return None,
        };
        match length {
            Some(length) => value.get(..length).map(<[u8]>::to_vec),
            None => Some(value),
        }
    }

    const fn protocol(&self) -> Option<u8> {
        match self.content {
            Content::Udp(_) => Some(UDP),
            Content::EchoRequest | Content::EchoReply => Some(ICMP),
            Content::Any => None,
        }
    }

    fn network(&self, offset: u32) -> Option<Vec<u8>> {
        let (protocol, source, destination) = if self.is_ipv4 {
            (IPV4_PROTOCOL, IPV4_SOURCE, IPV4_DESTINATION)
        } else {
            (IPV6_NEXT_HEADER, IPV6_SOURCE, IPV6_DESTINATION)
        };
        if offset == protocol {
            return Some(vec![self.protocol()?]);
        }
        let address = if offset == source { self.source } else { self.destination.filter(|_| offset == destination) };
        Some(match address? {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        })
    }

    fn transport(&self, offset: u32) -> Option<Vec<u8>> {
        match self.content {
            Content::Udp(port) if offset == DESTINATION_PORT => Some(port.to_be_bytes().to_vec()),
            Content::EchoRequest if offset == 0 => Some(vec![ECHO_REQUEST, 0]),
            Content::EchoReply if offset == 0 => Some(vec![ECHO_REPLY, 0]),
            _ => None,
        }
    }
}

fn device(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}
