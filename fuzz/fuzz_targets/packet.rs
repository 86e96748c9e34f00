//! Parses arbitrary bytes as a packet. The parser must stay within its bounds, and what it finds must be in the packet.

#![no_main]

use std::net::{Ipv4Addr, Ipv6Addr};

use ecmpvpn_common::flow::{IPV4, IPV6};
use ecmpvpn_common::layout::Reason;
use ecmpvpn_common::packet::{MAX_HEADER_OFFSET, MAX_LOAD_OFFSET, Packet, Parsed, parse, segments};
use libfuzzer_sys::fuzz_target;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];
/// Length of the longest extension header, bytes: 8, and 255 times 8 behind them.
const LONGEST_EXTENSION: u32 = 256 * 8;

/// A packet that checks that the parser stays within the bounds that the BPF side relies on.
struct Watched<'a>(&'a [u8]);

impl Packet for Watched<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        assert!(offset <= MAX_LOAD_OFFSET, "loaded at {offset}");
        self.0.load(offset)
    }

    fn length(&self) -> u32 {
        self.0.length()
    }

    fn mark(&self) -> u32 {
        0
    }
}

fuzz_target!(|bytes: &[u8]| {
    let parsed = match parse(&Watched(bytes)) {
        Ok(parsed) => parsed,
        Err(reason) => return assert_refused(bytes, reason),
    };
    assert_addresses(bytes, &parsed);
    assert_ports(bytes, &parsed);
    assert_segments(bytes, &parsed);
    if !matches!(parsed.transport.protocol, ICMP | ICMPV6) {
        // The quote of an ICMP error may be cut off. For all other packets, nothing that was found depends on what
        // follows.
        let longer = [bytes, &[0x5a; 64]].concat();
        assert_eq!(parse(&Watched(&longer)), Ok(parsed), "with more behind it");
    }
    assert_fragments_stay_together(bytes, &parsed);
});

fn assert_refused(bytes: &[u8], reason: Reason) {
    let family = bytes.first().map(|first| first >> 4);
    match reason {
        Reason::NotIp => assert!(family.is_some_and(|family| family != IPV4 && family != IPV6)),
        Reason::Truncated | Reason::Multicast | Reason::LinkLocal => {}
        other => panic!("{other:?} is nothing that a parser can know"),
    }
}

/// Checks the destination, and also the flow's addresses unless they come from the quote of an ICMP error.
fn assert_addresses(bytes: &[u8], parsed: &Parsed) {
    let Parsed { key, destination, transport, .. } = parsed;
    assert_eq!(key.padding, [0; 2]);
    assert_eq!(u32::from(key.family), destination.family);
    let octets = |words: &[u32; 4]| words.map(u32::to_ne_bytes).concat();
    let (src, dst) = match key.family {
        IPV4 => {
            let to = Ipv4Addr::from(<[u8; 4]>::try_from(&bytes[16..20]).unwrap());
            assert!(!to.is_multicast() && !to.is_broadcast() && !to.is_link_local(), "{to}");
            (&bytes[12..16], &bytes[16..20])
        }
        IPV6 => {
            let to = Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[24..40]).unwrap());
            assert!(!to.is_multicast() && !to.is_unicast_link_local(), "{to}");
            (&bytes[8..24], &bytes[24..40])
        }
        other => panic!("family {other}"),
    };
    assert_eq!(octets(&destination.address)[..dst.len()], *dst);
    assert!(octets(&destination.address)[dst.len()..].iter().all(|byte| *byte == 0));
    if !matches!(transport.protocol, ICMP | ICMPV6) {
        assert_eq!(key.dst, destination.address);
        assert_eq!(octets(&key.src)[..src.len()], *src);
    }
    assert!(key.flow_label.to_be() <= 0x000f_ffff && (key.family == IPV6 || key.flow_label == 0));
    assert!(transport.offset <= MAX_HEADER_OFFSET + LONGEST_EXTENSION, "{transport:?}");
}

fn assert_ports(bytes: &[u8], parsed: &Parsed) {
    let Parsed { key, transport, .. } = parsed;
    assert!(key.id == 0 || key.sport | key.dport == 0, "ports and an id share a place in the hash: {key:?}");
    let is_fragment = key.family == IPV4 && (bytes[6] & 0x3f != 0 || bytes[7] != 0);
    if key.family == IPV4 && !is_fragment && WITH_PORTS.contains(&transport.protocol) {
        let at = usize::from(bytes[0] & 15) * 4;
        assert_eq!(transport.offset as usize, at);
        assert_eq!([key.sport.to_ne_bytes(), key.dport.to_ne_bytes()].concat(), bytes[at..at + 4]);
    }
    if is_fragment {
        assert_eq!((key.sport, key.dport, key.id), (0, 0, 0), "only the first fragment has them");
    }
}

fn assert_segments(bytes: &[u8], parsed: &Parsed) {
    let length = u32::try_from(bytes.len()).unwrap();
    for (length, size, count) in [(length, 0, 0), (length, 1, 0), (65_535, 1, 65_535), (3_040, 1_000, 3), (0, 9, 0)] {
        let found = segments(&Watched(bytes), parsed.transport, length, size, count);
        assert!(found.packets >= 1 && found.bytes >= length, "{found:?} of {length}, {size}, {count}");
        assert!(size != 0 || found.packets == 1 && found.bytes == length, "{found:?}");
    }
}

/// Checks that all fragments of an IPv4 datagram have the same key.
fn assert_fragments_stay_together(bytes: &[u8], parsed: &Parsed) {
    if bytes[0] >> 4 != IPV4 || bytes[6] & 0x3f == 0 && bytes[7] == 0 {
        return;
    }
    for offset in [[0x20, 0], [0x20, 1], [0x00, 0xb9]] {
        let mut other = bytes.to_owned();
        other[6..8].copy_from_slice(&offset);
        assert_eq!(parse(&Watched(&other)).map(|other| other.key), Ok(parsed.key), "at {offset:?}");
    }
}
