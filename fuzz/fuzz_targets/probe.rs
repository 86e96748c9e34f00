//! Parses arbitrary bytes as if they came from a raw ICMP socket. What is accepted as a probe or an answer must be one,
//! and must stay the same when it is written and read again. Nothing counts as a report unless the far end sealed it,
//! and what it sealed counts once.
//!
//! An input is this side's identifier and secret, ten bytes, followed by the packet.

#![no_main]

use std::net::Ipv4Addr;
use std::sync::LazyLock;

use ecmpvpn::config::PrivateKey;
use ecmpvpn::control::health::dialogue::{Dialogue, Heard};
use ecmpvpn::control::health::seal::Keys;
use ecmpvpn::control::health::wire::{Kind, LENGTH, Message, parse, request};
use libfuzzer_sys::fuzz_target;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// The keys of this end, and of the far end.
static KEYS: LazyLock<[Keys; 2]> = LazyLock::new(|| {
    let [near, far] = ["A", "E"].map(|letter| format!("{}=", letter.repeat(43)));
    let [near, far]: [PrivateKey; 2] = [near, far].map(|text| text.parse().expect("a key in base64"));
    let addresses = [Ipv4Addr::new(169, 254, 0, 0), Ipv4Addr::new(169, 254, 0, 1)];
    let [a, b] = addresses;
    [Keys::derive(&near, &far.public_key(), [a, b]), Keys::derive(&far, &near.public_key(), [b, a])]
});

fuzz_target!(|bytes: &[u8]| {
    let Some((identifier, rest)) = bytes.split_first_chunk() else { return };
    let Some((secret, packet)) = rest.split_first_chunk() else { return };
    let (identifier, secret) = (u16::from_be_bytes(*identifier), u64::from_be_bytes(*secret));
    let secret = secret.max(1);
    let [near, far] = &*KEYS;
    let mut dialogue = Dialogue::new(near.clone(), [identifier.into(), secret], 0, 100_000_000);
    let heard = dialogue.take(packet);
    let Some(message) = parse(packet) else {
        assert_eq!(heard, None);
        return;
    };
    let header = usize::from(packet[0] & 15) * 4;
    assert_eq!(packet.len(), header + LENGTH);
    let Message { kind, probe, sealed, tag } = message;
    assert_eq!(packet[header], if kind == Kind::Answer { ECHO_REPLY } else { ECHO_REQUEST });
    assert!(probe.received.age.is_none_or(|age| age <= 65_534_000_000), "{probe:?}");
    match heard {
        Some(Heard::Answer(sequence)) => {
            let own = (probe.identifier, probe.secret, probe.sequence);
            assert_eq!((kind, own), (Kind::Answer, (identifier, secret, sequence)));
        }
        Some(Heard::Report(..)) => assert!(near.is_sealed(sealed, secret, tag), "{probe:?}"),
        None => {}
    }
    // Written again, it is the same. The fields leave some bits of the packet unused, so the bytes may differ.
    let again = packet_of(request(probe, |_| *tag));
    assert_eq!(parse(&again).map(|again| (again.probe, again.tag)), Some((probe, tag)));
    // Sealed by the far end it counts, once.
    let again = packet_of(request(probe, |sealed| far.seal(sealed, secret)));
    let mut dialogue = Dialogue::new(near.clone(), [identifier.into(), secret], 0, 100_000_000);
    let expected = Heard::Report(probe.sequence, probe.received, probe.peer_message);
    let counts = probe.secret != secret && probe.secret != 0;
    assert_eq!(dialogue.take(&again), counts.then_some(expected));
    assert_eq!(dialogue.take(&again), None);
});

/// The packet as a raw socket delivers it, with its IPv4 header.
fn packet_of(probe: [u8; LENGTH]) -> Vec<u8> {
    let sum = probe.chunks_exact(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the checksum does not fit");
    [&[0x45; 20][..], &probe].concat()
}
