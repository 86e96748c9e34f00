//! The maximum segment size of TCP connections that begin.

use std::collections::BTreeMap;

use anyhow::ensure;
use ecmpvpn::dataplane::Options;

use super::build::{TCP, UDP, V4, tcp, udp, v6};
use super::rig::{Rig, ifindexes, table};

/// The MTU of loopback, which the tests use as the tunnels' device. Larger values are lowered.
const MTU: u32 = 65_536;
/// What they become: [`MTU`] less the headers.
const MSS_V4: u16 = 65_496;
const MSS_V6: u16 = 65_476;

/// A segment with these flags and options.
fn segment(flags: u8, options: &[u8]) -> Vec<u8> {
    let mut segment = tcp(40_000, 443, 0);
    segment.extend_from_slice(options);
    segment.resize(segment.len().next_multiple_of(4), 0);
    segment[12] = u8::try_from(segment.len() / 4).expect("at most 60 bytes") << 4;
    segment[13] = flags;
    segment
}

/// The packet with the right checksum of its TCP segment, RFC 9293, section 3.1.
fn with_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    let (addresses, header) = if packet[0] >> 4 == 4 { (12..20, usize::from(packet[0] & 15) * 4) } else { (8..40, 40) };
    packet[header + 16..header + 18].fill(0);
    let length = packet.len() - header;
    let bytes =
        [&packet[addresses], &[0, TCP], &u16::try_from(length).expect("short").to_be_bytes(), &packet[header..]];
    let sum: u32 =
        bytes.concat().chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("16 bits");
    packet[header + 16..header + 18].copy_from_slice(&checksum.to_be_bytes());
    packet
}

fn v4(options: u8, protocol: u8, payload: &[u8], [src, dst]: [&'static str; 2]) -> Vec<u8> {
    V4 { src, dst, options: options.into(), fragment: 0x4000 }.with(protocol, payload)
}

pub fn connections_begin_with_segments_that_fit() -> anyhow::Result<()> {
    const SYN: u8 = 0x02;
    const SYN_ACK: u8 = 0x12;
    let mtu = std::fs::read_to_string("/sys/class/net/lo/mtu")?;
    ensure!(mtu.trim() == MTU.to_string(), "loopback has MTU {mtu}");
    let table = table(3);
    let on_loopback: BTreeMap<_, _> = ifindexes(&table).into_keys().map(|name| (name, 1)).collect();
    let mut rig = Rig::with_ifindexes(&table, &on_loopback, &Options::default())?;
    let mss = |value: u16| [&[2, 4][..], &value.to_be_bytes()].concat();
    // What Linux sends, with the option at an odd offset, after other options, and in the longest header.
    let placed = |value: u16| {
        [
            [mss(value), vec![4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7]].concat(),
            [vec![1], mss(value)].concat(),
            [vec![253, 5, 9, 9, 9], mss(value), vec![1, 1]].concat(),
            [vec![1; 36], mss(value)].concat(),
        ]
    };
    let (ways_v4, ways_v6) = (
        [["10.1.0.1", "10.20.0.1"], ["10.20.0.1", "10.1.0.1"]],
        [["fd00:10::1", "fd00:20::1"], ["fd00:20::1", "fd00:10::1"]],
    );
    for arrives in [false, true] {
        let mut passes = |packet: &[u8]| -> anyhow::Result<Vec<u8>> {
            Ok(if arrives { rig.arrived(packet)?.3 } else { rig.sent(packet, (0, 0))?.1 })
        };
        let (of_v4, [src, dst]) = (ways_v4[usize::from(arrives)], ways_v6[usize::from(arrives)]);
        for (value, [to_v4, to_v6]) in
            [(65_535, [MSS_V4, MSS_V6]), (MSS_V6, [MSS_V6; 2]), (1_380, [1_380; 2]), (0, [0; 2])]
        {
            let after = placed(to_v4).into_iter().zip(placed(to_v6)).zip([SYN, SYN_ACK, SYN, SYN_ACK]);
            for (before, ((after_v4, after_v6), flags)) in placed(value).iter().zip(after) {
                for options in [0, 8] {
                    let expected = with_checksum(v4(options, TCP, &segment(flags, &after_v4), of_v4));
                    let sent = with_checksum(v4(options, TCP, &segment(flags, before), of_v4));
                    let out = passes(&sent)?;
                    ensure!(out == expected, "{sent:02x?} became {out:02x?}, not {expected:02x?}; arrives: {arrives}");
                }
                let expected = with_checksum(v6(src, dst, TCP, &segment(flags, &after_v6)));
                let sent = with_checksum(v6(src, dst, TCP, &segment(flags, before)));
                let out = passes(&sent)?;
                ensure!(out == expected, "{sent:02x?} became {out:02x?}, not {expected:02x?}; arrives: {arrives}");
            }
        }
        // What opens no connection, is malformed, or is cut off.
        let longest = mss(65_535);
        let mut cut = v4(0, TCP, &segment(SYN, &longest), of_v4);
        cut.truncate(42);
        for packet in [
            v4(0, TCP, &segment(0x10, &longest), of_v4),
            v4(0, UDP, &segment(SYN, &longest), of_v4),
            v4(0, TCP, &segment(SYN, &[[9, 0].as_slice(), &longest].concat()), of_v4),
            v4(0, TCP, &segment(SYN, &[[9, 99].as_slice(), &longest].concat()), of_v4),
            v4(0, TCP, &segment(SYN, &[[0].as_slice(), &longest].concat()), of_v4),
            v4(0, TCP, &segment(SYN, &[]), of_v4),
            v6(src, dst, UDP, &udp(2, 2, 30)),
            cut,
        ] {
            let out = passes(&packet)?;
            ensure!(out == packet, "{packet:02x?} became {out:02x?}");
        }
    }
    Ok(())
}
