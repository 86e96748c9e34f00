//! Reads a packet's flow key, from the network header on. Every walk is bounded; nothing is allocated or written.

use crate::flow::{FlowKey, IPV4, IPV6};
use crate::layout::{Address, Reason};

/// Bytes of a packet, by offset from the start of its network header.
pub trait Packet {
    /// `N` words as they stand in the packet (network byte order); `None` if they are not all there.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;
    /// The same, but it may also return `None` where the bytes cost more than a direct read.
    #[inline(always)]
    fn peek<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.load(offset)
    }
    /// Bytes from the network header on. A super-packet has more than its header says.
    fn length(&self) -> u32;
    fn mark(&self) -> u32;
}

impl Packet for [u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let bytes = self.get(offset as usize..)?.get(..4 * N)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes(bytes.try_into().ok()?);
        }
        Some(words)
    }

    fn length(&self) -> u32 {
        self.len() as u32
    }

    fn mark(&self) -> u32 {
        0
    }
}

/// Maximum number of IPv6 extension headers that the parser walks.
pub const MAX_EXTENSION_HEADERS: u32 = 6;
/// Highest offset at which the parser reads a header, bytes.
pub const MAX_HEADER_OFFSET: u32 = 512;
/// Highest offset that the parser passes to [`Packet::load`], bytes.
pub const MAX_LOAD_OFFSET: u32 = MAX_HEADER_OFFSET + 24;

/// IP protocol numbers. Source: IANA, "Assigned Internet Protocol Numbers".
pub mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const DCCP: u8 = 33;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const GRE: u8 = 47;
    pub const ESP: u8 = 50;
    pub const AH: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION_OPTIONS: u8 = 60;
    pub const SCTP: u8 = 132;
    pub const UDP_LITE: u8 = 136;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// An ICMP error has the key of the flow that it reports on, in the error's direction.
    pub key: FlowKey,
    /// Source address of the packet itself, as [`FlowKey::src`].
    pub source: [u32; 4],
    /// Destination of the packet itself, also if it is an ICMP error.
    pub destination: Address,
    /// Place of the transport header, if the packet has one.
    pub transport: Transport,
}

impl Parsed {
    /// What rules match: addresses, protocol and ports of the packet itself. An ICMP error has no ports, whatever it
    /// quotes: anybody can make up a quote.
    #[must_use]
    pub fn outer(mut self) -> FlowKey {
        self.forget_quote();
        self.key
    }

    /// Makes the key that of [`Self::outer`]. In place: a copy of the key is too much for the program's stack of 512
    /// bytes (`MAX_BPF_STACK`, include/linux/filter.h), which it shares with the functions that it calls.
    #[inline(always)]
    pub fn forget_quote(&mut self) {
        // An error's protocol is ICMP. If it quotes ICMP too, the quoted key has no ports.
        if self.key.protocol != self.transport.protocol {
            (self.key.sport, self.key.dport) = (0, 0);
            self.key.protocol = self.transport.protocol;
        }
        (self.key.src, self.key.dst) = (self.source, self.destination.address);
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transport {
    /// IP protocol number.
    pub protocol: u8,
    /// Offset from the network header, bytes.
    pub offset: u32,
}

/// One IP header with its extensions.
#[derive(Clone, Copy)]
struct Network {
    key: FlowKey,
    /// Offset of what follows, bytes.
    payload: u32,
    /// Whether the transport header must not be read: the packet is a fragment, or its chain of headers is longer than
    /// the bound.
    opaque: bool,
}

/// Reads the flow key of `packet`.
///
/// # Errors
/// Why the packet cannot be steered: it is not IP, is truncated, or its destination never leaves the link.
#[inline(always)]
pub fn parse<P: Packet + ?Sized>(packet: &P) -> Result<Parsed, Reason> {
    let [first] = packet.load(0).ok_or(Reason::Truncated)?;
    let family = first.to_ne_bytes()[0] >> 4;
    if family != IPV4 && family != IPV6 {
        return Err(Reason::NotIp);
    }
    let network = network(packet, 0, family)?;
    let destination = Address { family: u32::from(family), address: network.key.dst };
    refuse_link_scope(&destination)?;

    let source = network.key.src;
    let mut key = network.key;
    let transport = Transport { protocol: key.protocol, offset: network.payload };
    if !network.opaque {
        match quoted(packet, family, transport) {
            Some(quoted) => key = quoted,
            None => selectors(packet, &mut key, network.payload).ok_or(Reason::Truncated)?,
        }
    }
    Ok(Parsed { key, source, destination, transport })
}

/// Refuses multicast and link-local destinations: they belong to the steering device itself.
#[inline(always)]
pub(crate) fn refuse_link_scope(destination: &Address) -> Result<(), Reason> {
    let [a, b, ..] = destination.address[0].to_ne_bytes();
    match (destination.family == u32::from(IPV4), a, b) {
        (true, 224.., _) | (false, 0xff, _) => Err(Reason::Multicast),
        (true, 169, 254) | (false, 0xfe, 0x80..=0xbf) => Err(Reason::LinkLocal),
        _ => Ok(()),
    }
}

/// Reads the IP header at offset `at`. Returns [`Reason::Truncated`] if it is not all there.
#[inline(always)]
fn network<P: Packet + ?Sized>(packet: &P, at: u32, family: u8) -> Result<Network, Reason> {
    if family == IPV4 { ipv4(packet, at) } else { ipv6(packet, at) }
}

/// Source: RFC 791.
#[inline(always)]
fn ipv4<P: Packet + ?Sized>(packet: &P, at: u32) -> Result<Network, Reason> {
    let [first, second, third, src, dst] = packet.load(at).ok_or(Reason::Truncated)?;
    let header = u32::from(first.to_ne_bytes()[0] & 0x0f) * 4;
    if header < 20 {
        return Err(Reason::Truncated);
    }
    let [_, _, flags, offset] = second.to_ne_bytes();
    // More fragments, or an offset. All fragments of a datagram must take the same tunnel, and only the first has
    // ports.
    let opaque = flags & 0x3f != 0 || offset != 0;
    let protocol = third.to_ne_bytes()[1];
    let key = FlowKey { src: [src, 0, 0, 0], dst: [dst, 0, 0, 0], protocol, family: IPV4, ..FlowKey::default() };
    Ok(Network { key, payload: at + header, opaque })
}

/// Source: RFC 8200; RFC 6946 for atomic fragments, which are whole packets.
#[inline(always)]
fn ipv6<P: Packet + ?Sized>(packet: &P, at: u32) -> Result<Network, Reason> {
    let [first, second] = packet.load(at).ok_or(Reason::Truncated)?;
    let src = packet.load(at + 8).ok_or(Reason::Truncated)?;
    let dst = packet.load(at + 24).ok_or(Reason::Truncated)?;
    let [_, a, b, c] = first.to_ne_bytes();
    let flow_label = u32::from_ne_bytes([0, a & 0x0f, b, c]);
    let mut key = FlowKey { src, dst, flow_label, family: IPV6, ..FlowKey::default() };
    let mut next = second.to_ne_bytes()[2];
    let mut payload = at + 40;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        if payload > MAX_HEADER_OFFSET {
            break;
        }
        match next {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS => {
                let [header] = packet.load(payload).ok_or(Reason::Truncated)?;
                let [following, length, ..] = header.to_ne_bytes();
                next = following;
                payload += (u32::from(length) + 1) * 8;
            }
            protocol::FRAGMENT => {
                let [header, _id] = packet.load(payload).ok_or(Reason::Truncated)?;
                let [following, _, offset, flags] = header.to_ne_bytes();
                payload += 8;
                if offset != 0 || flags & 0xf9 != 0 {
                    key.protocol = following;
                    return Ok(Network { key, payload, opaque: true });
                }
                next = following;
            }
            _ => {
                key.protocol = next;
                return Ok(Network { key, payload, opaque: false });
            }
        }
    }
    // The chain is longer than the bound. Only the addresses identify the flow then, for each of its packets alike.
    Ok(Network { key, payload, opaque: true })
}

/// Reads ports, SPI, GRE key or echo id at offset `at` into `key`. `None` if they are cut off.
#[inline(always)]
fn selectors<P: Packet + ?Sized>(packet: &P, key: &mut FlowKey, at: u32) -> Option<()> {
    match key.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP | protocol::DCCP | protocol::UDP_LITE => {
            let [ports] = packet.load(at)?;
            let [a, b, c, d] = ports.to_ne_bytes();
            key.sport = u16::from_ne_bytes([a, b]);
            key.dport = u16::from_ne_bytes([c, d]);
        }
        protocol::ESP => [key.id] = packet.load(at)?,
        // What AH protects is not read: if one security association used several tunnels, the receiver's replay window
        // would drop packets.
        protocol::AH => [_, key.id] = packet.load(at)?,
        protocol::GRE => key.id = gre_key(packet, at)?,
        protocol::ICMP | protocol::ICMPV6 => {
            let [head] = packet.load(at)?;
            if is_echo(key.family, key.protocol, head.to_ne_bytes()[0]) {
                let [rest] = packet.load(at + 4)?;
                let [a, b, ..] = rest.to_ne_bytes();
                key.id = u32::from_ne_bytes([a, b, 0, 0]);
            }
        }
        _ => {}
    }
    Some(())
}

/// Source: RFC 2890; RFC 2637 for version 1, which has the payload's length in the key's upper half.
#[inline(always)]
fn gre_key<P: Packet + ?Sized>(packet: &P, at: u32) -> Option<u32> {
    const CHECKSUM_OR_ROUTING: u8 = 0xc0;
    const KEY: u8 = 0x20;
    let [head] = packet.load(at)?;
    let [flags, version, ..] = head.to_ne_bytes();
    if flags & KEY == 0 {
        return Some(0);
    }
    let skipped = if flags & CHECKSUM_OR_ROUTING == 0 { 4 } else { 8 };
    let [key] = packet.load(at + skipped)?;
    let [_, _, c, d] = key.to_ne_bytes();
    Some(if version & 7 == 1 { u32::from_ne_bytes([0, 0, c, d]) } else { key })
}

#[inline(always)]
fn is_echo(family: u8, protocol: u8, kind: u8) -> bool {
    match (family, protocol) {
        (IPV4, protocol::ICMP) => kind == 8 || kind == 0,
        (IPV6, protocol::ICMPV6) => kind == 128 || kind == 129,
        _ => false,
    }
}

/// The key of the flow that an ICMP error quotes, with the endpoints swapped: the error goes in the direction of the
/// flow's answers. `None` if the packet is no ICMP error, or if its quote is too short or not of the same family.
#[inline(always)]
fn quoted<P: Packet + ?Sized>(packet: &P, family: u8, transport: Transport) -> Option<FlowKey> {
    match (family, transport.protocol) {
        (IPV4, protocol::ICMP) | (IPV6, protocol::ICMPV6) => {}
        _ => return None,
    }
    let [head] = packet.load(transport.offset)?;
    let kind = head.to_ne_bytes()[0];
    let error = if family == IPV4 { matches!(kind, 3 | 4 | 5 | 11 | 12) } else { matches!(kind, 1..=4) };
    let at = transport.offset + 8;
    if !error || at > MAX_HEADER_OFFSET {
        return None;
    }
    let [first] = packet.load(at)?;
    if first.to_ne_bytes()[0] >> 4 != family {
        return None;
    }
    let network = network(packet, at, family).ok()?;
    let mut key = network.key;
    if !network.opaque && network.payload <= MAX_HEADER_OFFSET {
        selectors(packet, &mut key, network.payload)?;
    }
    Some(FlowKey { flow_label: 0, ..key.reversed() })
}

/// Whether packets of this transport may arrive out of order, within bounds, and the flow is not slower for it: TCP
/// alone, whose senders adapt to reordering (RFC 8985, section 6.2). QUIC and SCTP take three packets out of order for a
/// loss (RFC 9002, section 6.1.1; RFC 9260, section 7.2.4), and what else uses UDP or ESP mostly does too. `protocol` is
/// the packet's own, `key` its flow key. Fragments, whose keys have no ports, are not among them, and neither are ICMP errors that quote
/// TCP.
#[must_use]
#[inline(always)]
pub const fn tolerates_reordering(protocol: u8, key: &FlowKey) -> bool {
    protocol == protocol::TCP && key.sport | key.dport != 0
}

/// The packets that a super-packet stands for, and their length on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// At least 1.
    pub packets: u32,
    /// Length of the super-packet plus the headers that segmentation repeats.
    pub bytes: u32,
}

/// Returns what a packet of `len` bytes is on the wire, from the network header on. `gso_size` is 0 for a packet that
/// is not a super-packet. `gso_segs` may be 0 for a super-packet that came from a virtual machine and was not segmented
/// yet (`SKB_GSO_DODGY`).
#[inline(always)]
pub fn segments<P: Packet + ?Sized>(
    packet: &P,
    transport: Transport,
    len: u32,
    gso_size: u32,
    gso_segs: u32,
) -> Segments {
    if gso_size == 0 {
        return Segments { packets: 1, bytes: len };
    }
    let headers = header_length(packet, transport).min(len);
    let packets = if gso_segs == 0 { (len - headers).div_ceil(gso_size) } else { gso_segs };
    let packets = packets.max(1);
    Segments { packets, bytes: len.wrapping_add((packets - 1).wrapping_mul(headers)) }
}

/// Length of the network and transport header of a TCP or UDP packet, bytes; 0 for other packets.
#[inline(always)]
fn header_length<P: Packet + ?Sized>(packet: &P, Transport { protocol, offset }: Transport) -> u32 {
    match protocol {
        _ if offset > MAX_HEADER_OFFSET => 0,
        protocol::TCP => {
            packet.load::<1>(offset + 12).map_or(0, |[word]| offset + u32::from(word.to_ne_bytes()[0] >> 4) * 4)
        }
        protocol::UDP => offset + 8,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// 10.1.0.1 port 1000 to 10.20.0.1 port 80, or the other direction.
    fn tcp(reversed: bool) -> Vec<u8> {
        let mut packet = [&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0][..], &[0; 28]].concat();
        let (a, b) = ([10, 1, 0, 1], [10, 20, 0, 1]);
        packet[12..16].copy_from_slice(if reversed { &b } else { &a });
        packet[16..20].copy_from_slice(if reversed { &a } else { &b });
        packet[20..24].copy_from_slice(if reversed { &[0, 80, 3, 232] } else { &[3, 232, 0, 80] });
        packet[32] = 5 << 4;
        packet
    }

    #[test]
    fn a_key_is_as_the_packet_has_it() {
        let parsed = parse(&tcp(false)[..]).unwrap();
        assert_eq!(parsed.key.src[0].to_ne_bytes(), [10, 1, 0, 1]);
        assert_eq!((parsed.key.sport.to_be(), parsed.key.dport.to_be()), (1000, 80));
        assert_eq!(parsed.destination.address[0].to_ne_bytes(), [10, 20, 0, 1]);
        assert_eq!(parsed.transport, Transport { protocol: 6, offset: 20 });
    }

    #[test]
    fn an_error_has_the_key_of_the_flow_that_it_answers() {
        let mut error = tcp(false);
        error.truncate(20);
        error[9] = 1;
        error.extend([11, 0, 0, 0, 0, 0, 0, 0]);
        error.extend(tcp(true));
        assert_eq!(parse(&error[..]).unwrap().key, parse(&tcp(false)[..]).unwrap().key);
    }

    #[test]
    fn rules_see_an_error_itself_and_not_its_quote() {
        let plain = parse(&tcp(false)[..]).unwrap();
        assert_eq!(plain.outer(), plain.key);
        // From 10.9.9.9 to 10.20.0.1.
        let mut error = tcp(false);
        error.truncate(20);
        error[9] = 1;
        error[12..16].copy_from_slice(&[10, 9, 9, 9]);
        error.extend([3, 1, 0, 0, 0, 0, 0, 0]);
        error.extend(tcp(true));
        let parsed = parse(&error[..]).unwrap();
        assert_eq!(parsed.key, plain.key);
        let outer = parsed.outer();
        assert_eq!(outer.src[0].to_ne_bytes(), [10, 9, 9, 9]);
        assert_eq!(outer.dst[0].to_ne_bytes(), [10, 20, 0, 1]);
        assert_eq!((outer.protocol, outer.sport, outer.dport), (1, 0, 0));
        // A quoted echo request.
        error.truncate(28);
        error.extend(tcp(true));
        error[37] = 1;
        error[48] = 8;
        let outer = parse(&error[..]).unwrap().outer();
        assert_eq!((outer.src[0].to_ne_bytes(), outer.protocol), ([10, 9, 9, 9], 1));
    }

    #[test]
    fn only_whole_tcp_packets_tolerate_reordering() {
        let tolerates = |packet: &[u8]| {
            let parsed = parse(packet).unwrap();
            tolerates_reordering(parsed.transport.protocol, &parsed.key)
        };
        assert!(tolerates(&tcp(false)));
        for (byte, value) in [(9, 17), (9, 132), (9, 50), (6, 0x20), (7, 1)] {
            let mut other = tcp(false);
            other[byte] = value;
            assert!(!tolerates(&other), "byte {byte} is {value}");
        }
        let mut error = tcp(false);
        error.truncate(20);
        error[9] = 1;
        error.extend([3, 1, 0, 0, 0, 0, 0, 0]);
        error.extend(tcp(true));
        assert!(!tolerates(&error), "an error that quotes TCP");
    }

    #[test]
    fn super_packets_count_their_segments() {
        let transport = Transport { protocol: 6, offset: 20 };
        let count = |len, size, segs| segments(&tcp(false)[..], transport, len, size, segs);
        assert_eq!(count(1000, 0, 0), Segments { packets: 1, bytes: 1000 });
        assert_eq!(count(3040, 1000, 3), Segments { packets: 3, bytes: 3120 });
        assert_eq!(count(3041, 1000, 0), Segments { packets: 4, bytes: 3161 });
        assert_eq!(count(10, 1000, 0), Segments { packets: 1, bytes: 10 });
    }

    proptest! {
        #[test]
        fn whatever_comes_is_parsed_or_refused(
            first in prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()],
            mut bytes in prop::collection::vec(any::<u8>(), 0..700),
            sizes in (0u32..70_000, 0u32..2_000, 0u32..100),
        ) {
            if let Some(byte) = bytes.first_mut() {
                *byte = first;
            }
            if let Ok(parsed) = parse(&bytes[..]) {
                prop_assert!(parsed.transport.offset <= MAX_HEADER_OFFSET + 2048);
                let found = segments(&bytes[..], parsed.transport, sizes.0, sizes.1, sizes.2);
                prop_assert!(found.packets >= 1 && found.bytes >= sizes.0);
            }
        }
    }
}
