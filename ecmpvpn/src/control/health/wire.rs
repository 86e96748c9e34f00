//! Format of the probes: ICMP echo requests, which any Linux host answers. Pure.
//!
//! The payload has a mark, a secret that the answer must return, the number of packets that this end received from the
//! tunnel, and how long ago the last one came. A far end that runs ecmpvpn reads both from the requests, and so knows
//! whether its packets arrive. The payload ends with the message that coordinates changes of a tunnel
//! ([`PeerMessage`]). Integers are big-endian.

use super::handover::PeerMessage;
use super::nanos::{MILLISECOND, Nanos};

/// Identifies the payload and its version.
const MARK: [u8; 8] = *b"ecmpvpn\x02";
/// Length of a probe in bytes, from the ICMP header on.
pub const LENGTH: usize = 40;

const ASKS: u32 = 1;
const HAS_LEFT: u32 = 2;
/// The upper 16 bits of the flags word: how long ago the last packet came, in milliseconds plus one; 0: not known.
const AGE_SHIFT: u32 = 16;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// A packet received from a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The answer to this end's probe with this sequence number.
    Answer(u16),
    /// A probe of the far end: what it received from this end, and its message.
    Report(Received, PeerMessage),
}

/// What one end received from a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Number of packets in total.
    pub count: u64,
    /// How long ago the last one came, as an upper bound; `None`: not known.
    pub age: Option<Nanos>,
}

/// Builds a probe, from the ICMP header on.
pub fn request(
    identifier: u16,
    sequence: u16,
    secret: u64,
    received: Received,
    peer_message: PeerMessage,
) -> [u8; LENGTH] {
    let mut message = [0; LENGTH];
    message[0] = ECHO_REQUEST;
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    message[8..16].copy_from_slice(&MARK);
    message[16..24].copy_from_slice(&secret.to_be_bytes());
    message[24..32].copy_from_slice(&received.count.to_be_bytes());
    let milliseconds = |age: Nanos| u32::try_from(age.div_ceil(MILLISECOND) + 1).unwrap_or(u32::MAX).min(0xffff);
    let flags = if peer_message.asks { ASKS } else { 0 } | if peer_message.has_left { HAS_LEFT } else { 0 };
    let flags = received.age.map_or(0, milliseconds) << AGE_SHIFT | flags;
    message[32..36].copy_from_slice(&flags.to_be_bytes());
    message[36..40].copy_from_slice(&peer_message.rotation.to_be_bytes());
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Parses an IPv4 packet from a raw ICMP socket. `None`: neither an answer to a probe with this `identifier` and
/// `secret`, nor a probe of the far end.
pub fn parse(packet: &[u8], identifier: u16, secret: u64) -> Option<Message> {
    let header = usize::from(packet.first()? & 15) * 4;
    let message: &[u8; LENGTH] = packet.get(header..)?.try_into().ok()?;
    if message[8..16] != MARK {
        return None;
    }
    let u16_at = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let long = |at: usize| message[at..at + 8].iter().fold(0, |long, byte| long << 8 | u64::from(*byte));
    match message[0] {
        ECHO_REPLY if u16_at(4) == identifier && long(16) == secret => Some(Message::Answer(u16_at(6))),
        // A probe with this end's secret is its own, returned by a loop: not a report.
        ECHO_REQUEST if long(16) != secret => {
            let flags = u32::from(u16_at(32)) << 16 | u32::from(u16_at(34));
            let rotation = u32::from(u16_at(36)) << 16 | u32::from(u16_at(38));
            let far = PeerMessage { asks: flags & ASKS != 0, has_left: flags & HAS_LEFT != 0, rotation };
            let age = (flags >> AGE_SHIFT).checked_sub(1).map(|age| Nanos::from(age) * MILLISECOND);
            Some(Message::Report(Received { count: long(24), age }, far))
        }
        _ => None,
    }
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

    /// The answer of the far end's kernel.
    fn answer(mut request: [u8; LENGTH]) -> Vec<u8> {
        request[0] = ECHO_REPLY;
        [&[0x45; 20][..], &request].concat()
    }

    #[test]
    fn an_answer_must_bring_number_identifier_and_secret_back() {
        let probe = request(7, 300, 0xdead_beef_0123_4567, Received::default(), PeerMessage::default());
        assert_eq!(checksum(&probe), 0);
        assert_eq!(parse(&answer(probe), 7, 0xdead_beef_0123_4567), Some(Message::Answer(300)));
        assert_eq!(parse(&answer(probe), 8, 0xdead_beef_0123_4567), None);
        assert_eq!(parse(&answer(probe), 7, 0xdead_beef_0123_4568), None);
        let mut packet = answer(probe);
        packet.pop();
        assert_eq!(parse(&packet, 7, 0xdead_beef_0123_4567), None);
        assert_eq!(parse(&[], 7, 0), None);
        assert_eq!(parse(&[0x4f], 7, 0), None);
    }

    #[test]
    fn the_far_sides_probe_reports_and_our_own_does_not() {
        let message = PeerMessage { asks: true, has_left: false, rotation: 0x1234_5678 };
        let received = Received { count: u64::MAX, age: Some(7 * MILLISECOND) };
        let packet = [&[0x45; 20][..], &request(1, 2, 3, received, message)].concat();
        assert_eq!(parse(&packet, 1, 4), Some(Message::Report(received, message)));
        assert_eq!(parse(&packet, 1, 3), None);
        let mut ping = packet;
        ping[30] = 0;
        assert_eq!(parse(&ping, 1, 4), None, "anybody's ping");
    }

    #[test]
    fn the_age_of_the_last_arrival_is_rounded_up_and_bounded() {
        let decoded = |age| {
            let probe = request(1, 2, 3, Received { count: 5, age }, PeerMessage::default());
            match parse(&[&[0x45; 20][..], &probe].concat(), 1, 4) {
                Some(Message::Report(received, message)) if message == PeerMessage::default() => received.age,
                other => panic!("{other:?}"),
            }
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
