//! Builds packets byte by byte, from the network header on. Checksums are zero, because steering does not read them.

use std::net::{Ipv4Addr, Ipv6Addr};

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMPV6: u8 = 58;

/// An IPv4 packet. `options` is in words of 4 bytes. `fragment` is the field of flags and offset.
pub struct V4<'a> {
    pub src: &'a str,
    pub dst: &'a str,
    pub options: usize,
    pub fragment: u16,
}

impl V4<'_> {
    pub fn with(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let header = 20 + 4 * self.options;
        let mut packet = vec![0; header];
        packet[0] = 0x40 | u8::try_from(header / 4).expect("at most 15 words");
        packet[2..4].copy_from_slice(&be16(header + payload.len()));
        packet[6..8].copy_from_slice(&self.fragment.to_be_bytes());
        packet[8] = 64;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&self.src.parse::<Ipv4Addr>().expect("an address").octets());
        packet[16..20].copy_from_slice(&self.dst.parse::<Ipv4Addr>().expect("an address").octets());
        packet[20..].fill(1);
        packet.extend(payload);
        packet
    }
}

/// A plain IPv4 packet.
pub fn v4(src: &str, dst: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    V4 { src, dst, options: 0, fragment: 0 }.with(protocol, payload)
}

/// A plain IPv6 packet. `next` and `payload` may begin with extension headers.
pub fn v6(src: &str, dst: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 40];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&be16(payload.len()));
    packet[6] = next;
    packet[7] = 64;
    packet[8..24].copy_from_slice(&src.parse::<Ipv6Addr>().expect("an address").octets());
    packet[24..40].copy_from_slice(&dst.parse::<Ipv6Addr>().expect("an address").octets());
    packet.extend(payload);
    packet
}

fn be16(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

/// A TCP segment with a header of 20 bytes.
pub fn tcp(sport: u16, dport: u16, data: usize) -> Vec<u8> {
    let mut segment = ports(sport, dport);
    segment.resize(20 + data, 0);
    segment[12] = 5 << 4;
    segment
}

/// A UDP datagram.
pub fn udp(sport: u16, dport: u16, data: usize) -> Vec<u8> {
    let mut datagram = ports(sport, dport);
    datagram.resize(8 + data, 0);
    datagram
}

/// Source and destination port.
pub fn ports(sport: u16, dport: u16) -> Vec<u8> {
    [sport.to_be_bytes(), dport.to_be_bytes()].concat()
}

/// An ICMP or `ICMPv6` message: type, code, checksum, the next word, the rest.
pub fn icmp(kind: u8, word: u32, rest: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0][..], &word.to_be_bytes(), rest].concat()
}

/// An IPv6 extension header of 8 + 8 × `more` bytes, before `payload`.
pub fn extension(next: u8, more: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 8 + 8 * usize::from(more)];
    (header[0], header[1]) = (next, more);
    header.extend(payload);
    header
}

/// An IPv6 fragment header, before `payload`. `offset` is the field with offset and flags.
pub fn fragment(next: u8, offset: u16, payload: &[u8]) -> Vec<u8> {
    let [high, low] = offset.to_be_bytes();
    [&[next, 0, high, low, 1, 2, 3, 4][..], payload].concat()
}
