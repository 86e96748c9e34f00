//! Parses arbitrary bytes as if they came from a raw ICMP socket. What is accepted as a probe or an answer must be one,
//! and must stay the same when it is written and read again.
//!
//! An input is this side's identifier and secret, ten bytes, followed by the packet.

#![no_main]

use ecmpvpn::control::health::PeerMessage;
use ecmpvpn::control::health::wire::{LENGTH, Message, Received, parse, request};
use libfuzzer_sys::fuzz_target;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

fuzz_target!(|bytes: &[u8]| {
    let Some((identifier, rest)) = bytes.split_first_chunk() else { return };
    let Some((secret, packet)) = rest.split_first_chunk() else { return };
    let (identifier, secret) = (u16::from_be_bytes(*identifier), u64::from_be_bytes(*secret));
    let Some(message) = parse(packet, identifier, secret) else { return };
    let header = usize::from(packet[0] & 15) * 4;
    assert_eq!(packet.len(), header + LENGTH);
    let again = match message {
        Message::Answer(sequence) => {
            assert_eq!(packet[header], ECHO_REPLY);
            let probe = request(identifier, sequence, secret, Received::default(), PeerMessage::default());
            answered(packet_of(probe))
        }
        Message::Report(received, word) => {
            assert_eq!(packet[header], ECHO_REQUEST);
            assert!(received.age.is_none_or(|age| age <= 65_534_000_000), "{received:?}");
            packet_of(request(identifier, 0, !secret, received, word))
        }
    };
    assert_eq!(parse(&again, identifier, secret), Some(message));
});

/// The packet as a raw socket delivers it, with its IPv4 header.
fn packet_of(probe: [u8; LENGTH]) -> Vec<u8> {
    let sum = probe.chunks_exact(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the checksum does not fit");
    [&[0x45; 20][..], &probe].concat()
}

/// The answer that the far side's kernel would give.
fn answered(mut packet: Vec<u8>) -> Vec<u8> {
    packet[20] = ECHO_REPLY;
    packet
}
