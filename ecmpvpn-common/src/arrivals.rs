//! Recognises the tunnels' outer packets where they arrive, on a bond member. Only the member shows what the switch
//! chose.

use crate::packet::Packet;

/// What identifies the outer packets of a tunnel: key of the map of arrivals.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Source address, network byte order; an IPv4 address as `::ffff:a.b.c.d`.
    pub remote: [u32; 4],
    /// Source and destination port as in the packet: the peer's listen port, and this site's.
    pub ports: [u8; 4],
    /// Interface index of the member on which the packet arrived.
    pub ifindex: u32,
}

/// Counters of one tunnel's packets on one member.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArrivalCounters {
    /// Outer packets; merged packets count as they arrived.
    pub packets: u64,
    /// Their bytes from the network header on.
    pub bytes: u64,
    /// Time of the last packet, nanoseconds of the monotonic clock; 0: none arrived.
    pub last_ns: u64,
    /// Number of the tunnel's [`TunnelId`](crate::layout::TunnelId).
    pub tunnel: u32,
    /// Zero.
    pub padding: u32,
}

/// Bits of the values in the map of members.
pub mod member_flags {
    /// ecmpvpn added the member's clsact qdisc, or was about to.
    pub const CLSACT_ADDED: u32 = 1 << 0;
    /// The program is attached by clsact.
    pub const ATTACHED: u32 = 1 << 1;
}

/// Maximum number of members that are followed at a time, of all bonds together.
pub const MAX_FOLLOWED: u32 = 256;

const _: () = {
    assert!(size_of::<Arrival>() == 24);
    assert!(size_of::<ArrivalCounters>() == 32);
};

/// Ethernet types. Source: `linux/if_ether.h`.
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
/// Offset of the transport header in an IPv6 packet: `WireGuard` sends no extension headers.
const IPV6_HEADER: u32 = 40;

impl Arrival {
    /// The key of packets from `remote`.
    #[must_use]
    pub fn new(remote: core::net::IpAddr, remote_port: u16, listen_port: u16, ifindex: u32) -> Self {
        let octets = match remote {
            core::net::IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            core::net::IpAddr::V6(address) => address.octets(),
        };
        let word = |at: usize| u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
        let ([a, b], [c, d]) = (remote_port.to_be_bytes(), listen_port.to_be_bytes());
        Self { remote: [word(0), word(4), word(8), word(12)], ports: [a, b, c, d], ifindex }
    }
}

/// The key of a datagram that may be a tunnel's, and the offset of its UDP header from the network header, bytes.
/// `None` if the packet is not UDP, is cut off, or is a fragment: bonds and switches hash fragments without their
/// ports, so fragments do not show where whole packets arrive.
///
/// `ethertype` is the network header's, in host byte order. If there is a VLAN tag, it is the type behind the tag.
#[inline(always)]
pub fn arrival<P: Packet + ?Sized>(packet: &P, ethertype: u16, ifindex: u32) -> Option<(Arrival, u32)> {
    let (remote, transport) = match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet)?,
        ETHERTYPE_IPV6 => ipv6(packet)?,
        _ => return None,
    };
    let [ports] = packet.load(transport)?;
    Some((Arrival { remote, ports: ports.to_ne_bytes(), ifindex }, transport))
}

#[inline(always)]
fn ipv4<P: Packet + ?Sized>(packet: &P) -> Option<([u32; 4], u32)> {
    let [first, second, third, source] = packet.load(0)?;
    let version_and_length = first.to_ne_bytes()[0];
    let [_, _, flags, offset] = second.to_ne_bytes();
    let header = u32::from(version_and_length & 0x0f) * 4;
    if third.to_ne_bytes()[1] != UDP || version_and_length >> 4 != 4 || header < 20 || flags & 0x3f != 0 || offset != 0
    {
        return None;
    }
    Some(([0, 0, 0xffff_u32.to_be(), source], header))
}

#[inline(always)]
fn ipv6<P: Packet + ?Sized>(packet: &P) -> Option<([u32; 4], u32)> {
    let [first, second] = packet.load(0)?;
    if second.to_ne_bytes()[2] != UDP || first.to_ne_bytes()[0] >> 4 != 6 {
        return None;
    }
    Some((packet.load(8)?, IPV6_HEADER))
}

/// Both records are `repr(C)`, have no implicit padding (see the sizes above), and are valid for any bytes.
#[cfg(feature = "aya")]
mod pod {
    #![allow(clippy::undocumented_unsafe_blocks, reason = "the module says it once for all")]
    unsafe impl aya::Pod for super::Arrival {}
    unsafe impl aya::Pod for super::ArrivalCounters {}
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    const MEMBER: u32 = 7;

    /// 10.2.3.5 port 51822 to 10.2.3.4 port 51820, `options` words of options.
    fn v4(options: u8) -> Vec<u8> {
        let mut packet = std::vec![0x45 + options, 0, 0, 60, 0, 0, 0x40, 0, 64, UDP, 0, 0, 10, 2, 3, 5, 10, 2, 3, 4];
        packet.extend(std::vec![1; 4 * usize::from(options)]);
        packet.extend([51822u16.to_be_bytes(), 51820u16.to_be_bytes()].concat());
        packet.extend([0; 36]);
        packet
    }

    /// The same between `fd00::5` and `fd00::4`.
    fn v6() -> Vec<u8> {
        let mut packet = std::vec![0; 40];
        (packet[0], packet[6], packet[7]) = (0x60, UDP, 64);
        (packet[8], packet[23], packet[24], packet[39]) = (0xfd, 5, 0xfd, 4);
        packet.extend([51822u16.to_be_bytes(), 51820u16.to_be_bytes()].concat());
        packet.extend([0; 36]);
        packet
    }

    fn expected(remote: &str) -> Arrival {
        Arrival::new(remote.parse().unwrap(), 51822, 51820, MEMBER)
    }

    #[test]
    fn outer_packets_are_known_by_source_address_and_ports() {
        assert_eq!(arrival(&v4(0)[..], 0x0800, MEMBER), Some((expected("10.2.3.5"), 20)));
        assert_eq!(arrival(&v4(10)[..], 0x0800, MEMBER), Some((expected("10.2.3.5"), 60)));
        assert_eq!(arrival(&v6()[..], 0x86dd, MEMBER), Some((expected("fd00::5"), 40)));
        // An IPv6 address that begins like the IPv4 one is another sender.
        assert_ne!(expected("10.2.3.5").remote, expected("a02:305::").remote);
        assert_ne!(arrival(&v4(0)[..], 0x0800, MEMBER + 1), arrival(&v4(0)[..], 0x0800, MEMBER));
    }

    #[test]
    fn other_packets_are_not_for_a_peer() {
        let changed = |mut packet: Vec<u8>, at: usize, to: u8, ethertype| {
            packet[at] = to;
            arrival(&packet[..], ethertype, MEMBER)
        };
        for (what, at, to) in [
            ("TCP", 9, 6),
            ("a first fragment", 6, 0x20),
            ("a later fragment", 7, 1),
            ("IPv6 that calls itself IPv4", 0, 0x65),
            ("a header that is too short", 0, 0x44),
        ] {
            assert_eq!(changed(v4(0), at, to, 0x0800), None, "{what}");
        }
        for (what, at, to) in [("TCP", 6, 6), ("a fragment", 6, 44), ("IPv4 that calls itself IPv6", 0, 0x40)] {
            assert_eq!(changed(v6(), at, to, 0x86dd), None, "{what}");
        }
        // LACP, ARP, and a second VLAN tag.
        for ethertype in [0x8809, 0x0806, 0x8100] {
            assert_eq!(arrival(&v4(0)[..], ethertype, MEMBER), None, "{ethertype:#x}");
        }
        assert_eq!(arrival(&v4(0)[..23], 0x0800, MEMBER), None, "cut off");
        assert_eq!(arrival(&v6()[..43], 0x86dd, MEMBER), None, "cut off");
    }

    proptest! {
        #[test]
        fn whatever_comes_is_recognised_or_not(
            ipv6: bool,
            first in prop_oneof![Just(0x45u8), Just(0x4f), Just(0x60), any::<u8>()],
            mut bytes in prop::collection::vec(any::<u8>(), 0..120),
        ) {
            if let Some(byte) = bytes.first_mut() {
                *byte = first;
            }
            if let Some((found, transport)) = arrival(&bytes[..], if ipv6 { 0x86dd } else { 0x0800 }, MEMBER) {
                let at = transport as usize;
                prop_assert_eq!(&found.ports[..], &bytes[at..at + 4]);
                let source = if ipv6 { &bytes[8..24] } else { &bytes[12..16] };
                let remote: Vec<u8> = found.remote.iter().flat_map(|word| word.to_ne_bytes()).collect();
                prop_assert!(remote.ends_with(source));
            }
        }
    }
}
