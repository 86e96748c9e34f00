//! Format of the probes: ICMP echo requests, which any Linux host answers. Pure.
//!
//! The payload has a mark, a secret that the answer must return, the number of packets that this end received from the
//! tunnel, and how long ago the last one came. A far end that runs ecmpvpn reads both from the requests, and so knows
//! whether its packets arrive. It also has the message that coordinates changes of a tunnel ([`PeerMessage`]), and ends
//! with the seal ([`super::seal`]). Integers are big-endian.

use super::handover::PeerMessage;
use super::nanos::{MILLISECOND, Nanos};
use super::ordering::Ordering;
use super::seal::TAG;

/// Identifies the payload and its version. Up to version 2 it had four more letters.
pub(super) const MARK: [u8; 4] = *b"ecm\x03";
/// Length of a probe in bytes, from the ICMP header on.
pub const LENGTH: usize = 44;
/// Where the seal begins.
const SEALED: usize = LENGTH - TAG;

const ASKS: u32 = 1;
const HAS_LEFT: u32 = 2;
/// The bits of [`Ordering`]. Former versions write zeros here, and do not look at them.
const OFFERS: u32 = 1 << 4;
const ACTS: u32 = 1 << 5;
const READY: u32 = 1 << 6;
/// The count is that of the device when the probe came whose sequence number has these lower 8 bits.
const COUNTED: u32 = 1 << 7;
const COUNTED_SHIFT: u32 = 8;
/// The upper 16 bits of the flags word: how long ago the last packet came, in milliseconds plus one; 0: not known.
const AGE_SHIFT: u32 = 16;

pub(super) const ECHO_REPLY: u8 = 0;
pub(super) const ECHO_REQUEST: u8 = 8;

/// What one end received from a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Number of packets in total. A probe has its lower 32 bits.
    pub count: u64,
    /// How long ago the last one came, as an upper bound; `None`: not known.
    pub age: Option<Nanos>,
    /// The count is that of the device when the far end's probe came whose sequence number has these lower 8 bits;
    /// `None`: it is that of the steering program, of late.
    pub at_probe: Option<u8>,
}

/// The content of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub identifier: u16,
    pub sequence: u16,
    /// The secret of the end that sent it.
    pub secret: u64,
    pub received: Received,
    pub peer_message: PeerMessage,
}

/// Whether a message is a probe, or the answer to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Answer,
    Request,
}

/// A message that has the format of a probe. Anybody may have sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    pub kind: Kind,
    pub probe: Probe,
    /// The bytes that the seal covers.
    pub sealed: &'a [u8],
    pub tag: &'a [u8; TAG],
}

/// Builds a probe, from the ICMP header on. `seal` makes the tag of the bytes that it covers.
pub fn request(probe: Probe, seal: impl FnOnce(&[u8]) -> [u8; TAG]) -> [u8; LENGTH] {
    let Probe { identifier, sequence, secret, received, peer_message } = probe;
    let mut message = [0; LENGTH];
    message[0] = ECHO_REQUEST;
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    message[8..12].copy_from_slice(&MARK);
    message[12..20].copy_from_slice(&secret.to_be_bytes());
    let milliseconds = |age: Nanos| u32::try_from(age.div_ceil(MILLISECOND) + 1).unwrap_or(u32::MAX).min(0xffff);
    let flags = if peer_message.asks { ASKS } else { 0 } | if peer_message.has_left { HAS_LEFT } else { 0 };
    let Ordering { offers, acts, ready } = peer_message.ordering;
    let bit = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
    let flags = flags | bit(offers, OFFERS) | bit(acts, ACTS) | bit(ready, READY);
    let counted = received.at_probe.map_or(0, |sequence| COUNTED | u32::from(sequence) << COUNTED_SHIFT);
    let flags = received.age.map_or(0, milliseconds) << AGE_SHIFT | counted | flags;
    message[20..24].copy_from_slice(&flags.to_be_bytes());
    message[24..28].copy_from_slice(&peer_message.rotation.to_be_bytes());
    message[28..32].copy_from_slice(&received.count.to_be_bytes()[4..]);
    let tag = seal(&message[4..SEALED]);
    message[SEALED..].copy_from_slice(&tag);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Parses an IPv4 packet from a raw ICMP socket. `None`: it does not have the format of a probe or of its answer.
pub fn parse(packet: &[u8]) -> Option<Message<'_>> {
    let header = usize::from(packet.first()? & 15) * 4;
    let message: &[u8; LENGTH] = packet.get(header..)?.try_into().ok()?;
    let kind = match message[0] {
        ECHO_REPLY => Kind::Answer,
        ECHO_REQUEST => Kind::Request,
        _ => return None,
    };
    if message[8..12] != MARK {
        return None;
    }
    let u16_at = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) << 16 | u32::from(u16_at(at + 2));
    let flags = u32_at(20);
    let [.., lower, _] = flags.to_be_bytes();
    let at_probe = (flags & COUNTED != 0).then_some(lower);
    let age = (flags >> AGE_SHIFT).checked_sub(1).map(|age| Nanos::from(age) * MILLISECOND);
    let probe = Probe {
        identifier: u16_at(4),
        sequence: u16_at(6),
        secret: u64::from(u32_at(12)) << 32 | u64::from(u32_at(16)),
        received: Received { count: u32_at(28).into(), age, at_probe },
        peer_message: PeerMessage {
            asks: flags & ASKS != 0,
            has_left: flags & HAS_LEFT != 0,
            rotation: u32_at(24),
            ordering: Ordering { offers: flags & OFFERS != 0, acts: flags & ACTS != 0, ready: flags & READY != 0 },
        },
    };
    Some(Message { kind, probe, sealed: &message[4..SEALED], tag: message.last_chunk()? })
}

/// The Internet checksum, RFC 1071.
fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    !words.fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_TUNNELS_PER_PEER;

    /// Total bytes of a probe on an Ethernet wire: padded to 16 and encrypted, in WireGuard, UDP, IPv6 (longer than
    /// IPv4), and Ethernet with preamble and gap.
    const ON_THE_WIRE: usize = (20 + LENGTH).next_multiple_of(16) + 32 + 8 + 40 + 38;

    const PROBE: Probe = Probe {
        identifier: 7,
        sequence: 300,
        secret: 0xdead_beef_0123_4567,
        received: Received { count: 0xffff_fffe, age: Some(7 * MILLISECOND), at_probe: Some(0x81) },
        peer_message: PeerMessage {
            asks: true,
            has_left: false,
            rotation: 0x1234_5678,
            ordering: Ordering { offers: true, acts: false, ready: true },
        },
    };

    /// The packet as a raw socket delivers it.
    fn packet(message: &[u8]) -> Vec<u8> {
        [&[0x45; 20][..], message].concat()
    }

    #[test]
    fn a_probe_is_read_as_it_was_written() {
        let bytes = request(PROBE, |covered| {
            assert_eq!(covered.len(), LENGTH - 4 - TAG);
            [9; TAG]
        });
        assert_eq!(checksum(&bytes), 0);
        let mut packet = packet(&bytes);
        let read = parse(&packet).unwrap();
        assert_eq!((read.kind, read.probe, read.tag), (Kind::Request, PROBE, &[9; TAG]));
        assert_eq!(read.sealed, &bytes[4..LENGTH - TAG]);
        packet[20] = ECHO_REPLY;
        assert_eq!(parse(&packet).map(|answer| (answer.kind, answer.probe)), Some((Kind::Answer, PROBE)));
    }

    #[test]
    fn what_has_another_format_is_no_probe() {
        let bytes = request(PROBE, |_| [9; TAG]);
        for length in 0..LENGTH {
            assert_eq!(parse(&packet(&bytes[..length])), None);
        }
        assert_eq!(parse(&packet(&[&bytes[..], &[0]].concat())), None);
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0x4f]), None);
        // The former version, anybody's ping, and an ICMP error.
        for (at, byte) in [(11, 2), (8, 0), (0, 3)] {
            let mut other = bytes;
            other[at] = byte;
            assert_eq!(parse(&packet(&other)), None, "{at}");
        }
    }

    #[test]
    fn the_age_of_the_last_arrival_is_rounded_up_and_bounded() {
        let decoded = |age| {
            let bytes = request(Probe { received: Received { count: 5, age, at_probe: None }, ..PROBE }, |_| [0; TAG]);
            parse(&packet(&bytes)).unwrap().probe.received.age
        };
        assert_eq!([decoded(None), decoded(Some(0)), decoded(Some(1))], [None, Some(0), Some(MILLISECOND)]);
        assert_eq!(decoded(Some(Nanos::MAX / 2)), Some(65_534 * MILLISECOND));
    }

    #[test]
    fn probes_are_less_than_a_thousandth_of_a_gigabit() {
        // The maximum of tunnels for one peer: this end's probes, and its answers to the far end's.
        let bits = ON_THE_WIRE * 8 * 10 * 2 * MAX_TUNNELS_PER_PEER;
        assert!(bits < 1_000_000, "{bits} bits a second");
    }
}
