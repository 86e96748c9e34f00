//! Finds the maximum segment size (MSS) that a TCP connection is opened with. A gateway lowers it to what fits through a
//! tunnel: then both ends send packets that need no fragmentation, also where somebody drops the ICMP errors that would
//! tell them (RFC 4459, section 3.2).

use crate::packet::{Packet, protocol::TCP};

/// Bytes of an IPv4 and a TCP header without options, and of an IPv6 and a TCP header: an MSS counts neither options nor
/// these (RFC 9293, section 3.7.1).
pub const HEADERS_V4: u32 = 40;
pub const HEADERS_V6: u32 = 60;
/// Offset of the checksum in a TCP header, bytes.
pub const CHECKSUM: u32 = 16;
/// Most options in a TCP header, if each has one byte.
const MOST_OPTIONS: u32 = 40;

/// A TCP segment that opens a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syn {
    /// Offset of the TCP header from the network header, bytes.
    pub tcp: u32,
    /// Bytes of the headers that an MSS does not count.
    pub headers: u32,
}

/// Whether the packet, or the first of its fragments, opens a TCP connection. IPv6 packets with extension headers are not
/// looked at.
#[inline(always)]
pub fn syn<P: Packet + ?Sized>(packet: &P) -> Option<Syn> {
    let [first, second, third] = packet.peek(0)?;
    let [version, ..] = first.to_ne_bytes();
    let syn = if version >> 4 == 4 {
        let [_, _, flags, offset] = second.to_ne_bytes();
        let [_, protocol, ..] = third.to_ne_bytes();
        if protocol != TCP || flags & 0x1f != 0 || offset != 0 {
            return None;
        }
        Syn { tcp: u32::from(version & 0x0f) * 4, headers: HEADERS_V4 }
    } else {
        let [_, _, protocol, _] = second.to_ne_bytes();
        if protocol != TCP {
            return None;
        }
        Syn { tcp: 40, headers: HEADERS_V6 }
    };
    is_syn(packet, syn.tcp).then_some(syn)
}

/// Whether the segment whose TCP header is at offset `tcp` opens a connection.
#[inline(always)]
pub fn is_syn<P: Packet + ?Sized>(packet: &P, tcp: u32) -> bool {
    let flags = packet.peek(tcp + 12).map_or(0, |[word]: [u32; 1]| word);
    flags & u32::from_ne_bytes([0, 0x02, 0, 0]) != 0
}

/// The MSS option of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mss {
    /// Offset of the value from the network header, bytes.
    pub offset: u32,
    /// Bytes.
    pub value: u16,
}

/// The MSS option of the segment whose TCP header is at offset `tcp`. `None`: it has none, or its options are malformed
/// before it. Source: RFC 9293, section 3.2.
#[inline(always)]
pub fn find<P: Packet + ?Sized>(packet: &P, tcp: u32) -> Option<Mss> {
    let [word] = packet.load(tcp + 12)?;
    let [length, ..] = word.to_ne_bytes();
    let end = tcp + u32::from(length >> 4) * 4;
    let mut at = tcp + 20;
    for _ in 0..MOST_OPTIONS {
        // A shorter rest has no room for the option.
        if at + 4 > end {
            return None;
        }
        let [option] = packet.load(at)?;
        let [kind, length, high, low] = option.to_ne_bytes();
        if kind == 2 && length == 4 {
            return Some(Mss { offset: at + 2, value: u16::from_be_bytes([high, low]) });
        }
        // 1 for an option of one byte, without a branch: the verifier would follow each one in each iteration.
        let is_padding = (u32::from(kind ^ 1).wrapping_sub(1)) >> 31;
        let step = is_padding + u32::from(length) * (1 - is_padding);
        if kind == 0 || step == 0 {
            return None;
        }
        at += step;
    }
    None
}

/// What the MSS becomes where packets of at most `mtu` bytes fit; `None`: it may stay.
#[must_use]
#[inline(always)]
pub const fn lowered(mss: u16, mtu: u32, headers: u32) -> Option<u16> {
    let most = mtu.saturating_sub(headers);
    // Below the largest value, since `mss` is above it.
    if mss as u32 > most { Some(most as u16) } else { None }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// An IPv4 SYN with these options, padded.
    fn with_options(options: &[u8]) -> Vec<u8> {
        let mut tcp = vec![0; 20];
        tcp.extend_from_slice(options);
        tcp.resize(tcp.len().next_multiple_of(4), 0);
        (tcp[12], tcp[13]) = (u8::try_from(tcp.len() / 4).unwrap() << 4, 0x02);
        let mut packet = vec![0; 20];
        (packet[0], packet[9]) = (0x45, TCP);
        packet.extend(tcp);
        packet
    }

    fn found(options: &[u8]) -> Option<u16> {
        find(with_options(options).as_slice(), 20).map(|mss| mss.value)
    }

    #[test]
    fn the_option_is_found_wherever_it_stands() {
        assert_eq!(found(&[2, 4, 5, 0xb4]), Some(1460));
        assert_eq!(found(&[1, 2, 4, 5, 0xb4]), Some(1460));
        assert_eq!(found(&[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 3, 3, 7, 2, 4, 5, 0xb4]), Some(1460));
        assert_eq!(found(&[[1; 36].as_slice(), &[2, 4, 5, 0xb4]].concat()), Some(1460));
        assert_eq!(
            found(&[
                253, 36, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                0, 0, 0, 2, 4, 2, 0
            ]),
            Some(512)
        );
    }

    #[test]
    fn what_is_no_such_option_is_left_alone() {
        for options in [
            &[][..],
            &[1, 1, 1],
            &[0, 2, 4, 5, 0xb4],
            &[2, 3, 5, 0xb4],
            &[7, 0, 2, 4, 5, 0xb4],
            &[7, 200, 2, 4, 5, 0xb4],
        ] {
            assert_eq!(found(options), None, "{options:?}");
        }
        // The header ends before the option, or the packet does.
        let mut packet = with_options(&[1, 1, 1, 1, 2, 4, 5, 0xb4]);
        assert_eq!(find(&packet[..46], 20), None);
        packet[32] = 6 << 4;
        assert_eq!(find(packet.as_slice(), 20), None);
    }

    #[test]
    fn only_segments_that_open_a_connection_count() {
        let packet = with_options(&[2, 4, 5, 0xb4]);
        assert_eq!(syn(packet.as_slice()), Some(Syn { tcp: 20, headers: HEADERS_V4 }));
        for (at, value) in [(33, 0x10), (9, 17), (6, 0x01), (7, 1)] {
            let mut other = packet.clone();
            other[at] = value;
            assert_eq!(syn(other.as_slice()), None);
        }
        let mut six = vec![0; 40];
        (six[0], six[6]) = (0x60, TCP);
        six.extend_from_slice(&packet[20..]);
        assert_eq!(syn(six.as_slice()), Some(Syn { tcp: 40, headers: HEADERS_V6 }));
        six[6] = 0;
        assert_eq!(syn(six.as_slice()), None);
    }

    #[test]
    fn a_value_is_only_lowered() {
        assert_eq!(lowered(1460, 1420, HEADERS_V4), Some(1380));
        assert_eq!(lowered(1440, 1420, HEADERS_V6), Some(1360));
        assert_eq!([lowered(1380, 1420, HEADERS_V4), lowered(0, 1420, HEADERS_V4), lowered(9, 9_000, 40)], [None; 3]);
        assert_eq!(lowered(1, 20, HEADERS_V4), Some(0));
    }

    proptest! {
        #[test]
        fn no_bytes_harm(bytes in prop::collection::vec(any::<u8>(), 0..120), tcp in 0u32..100) {
            syn(bytes.as_slice());
            if let Some(mss) = find(bytes.as_slice(), tcp) {
                let at = mss.offset as usize;
                prop_assert_eq!(&bytes[at - 2..at], &[2, 4]);
            }
        }
    }
}
