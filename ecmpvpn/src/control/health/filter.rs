//! The socket filter of the probes: what cannot be a probe, nor the answer to one of this end's, is dropped before it
//! takes room in the socket or wakes the probing thread. Pure.
//!
//! Classic BPF. The kernel runs it on each ICMP packet, from the IP header on (`raw_rcv()`, net/ipv4/raw.c). It only
//! saves work: what passes is judged by [`super::dialogue`].

use socket2::SockFilter;

use super::wire::{ECHO_REQUEST, LENGTH, MARK};

// Operation codes; source: include/uapi/linux/filter.h and bpf_common.h. The index register has the length of the IP
// header.
/// `BPF_LDX | BPF_B | BPF_MSH`
const LOAD_HEADER_LENGTH: u16 = 0xb1;
/// `BPF_LD | BPF_W | BPF_LEN`
const LOAD_PACKET_LENGTH: u16 = 0x80;
/// `BPF_ALU | BPF_SUB | BPF_X`
const SUBTRACT_HEADER_LENGTH: u16 = 0x1c;
/// `BPF_LD | BPF_IND` of a word, a half word and a byte
const LOAD_WORD: u16 = 0x40;
const LOAD_HALF: u16 = 0x48;
const LOAD_BYTE: u16 = 0x50;
/// `BPF_JMP | BPF_JEQ | BPF_K`
const IF_EQUAL: u16 = 0x15;
/// `BPF_RET | BPF_K`
const RETURN: u16 = 0x06;

/// The filter for the end whose probes have this identifier.
pub fn program(identifier: u16) -> [SockFilter; 12] {
    let step = |code, value: u32| SockFilter::new(code, 0, 0, value);
    let length = u32::try_from(LENGTH).unwrap_or(u32::MAX);
    [
        step(LOAD_HEADER_LENGTH, 0),
        step(LOAD_PACKET_LENGTH, 0),
        step(SUBTRACT_HEADER_LENGTH, 0),
        // Jumps are relative to the next instruction. The last instruction drops the packet.
        SockFilter::new(IF_EQUAL, 0, 7, length),
        step(LOAD_WORD, 8),
        SockFilter::new(IF_EQUAL, 0, 5, u32::from_be_bytes(MARK)),
        step(LOAD_BYTE, 0),
        SockFilter::new(IF_EQUAL, 2, 0, u32::from(ECHO_REQUEST)),
        // The socket passes only requests and answers.
        step(LOAD_HALF, 4),
        SockFilter::new(IF_EQUAL, 0, 1, u32::from(identifier)),
        step(RETURN, u32::MAX),
        step(RETURN, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use socket2::SockRef;

    use super::super::wire::ECHO_REPLY;
    use super::*;

    const IDENTIFIER: u16 = 0x1234;

    /// A message with the mark, as a raw socket gets it.
    fn packet(header: usize, kind: u8, identifier: u16) -> Vec<u8> {
        let mut packet = vec![0x40 | u8::try_from(header / 4).unwrap(); header];
        packet.extend([kind, 0, 0, 0]);
        packet.extend(identifier.to_be_bytes());
        packet.extend([0, 9]);
        packet.extend(MARK);
        packet.resize(header + LENGTH, 7);
        packet
    }

    /// What of `packets` the kernel lets through.
    fn passed(packets: &[Vec<u8>]) -> Vec<bool> {
        let [near, far] = UnixDatagram::pair().map(<[_; 2]>::from).unwrap();
        near.set_nonblocking(true).unwrap();
        SockRef::from(&near).attach_filter(&program(IDENTIFIER)).unwrap();
        let passes = |packet: &Vec<u8>| {
            far.send(packet).unwrap();
            near.recv(&mut [0; 256]).is_ok_and(|length| length == packet.len())
        };
        packets.iter().map(passes).collect()
    }

    #[test]
    fn probes_and_own_answers_pass() {
        let good = [
            packet(20, ECHO_REQUEST, IDENTIFIER),
            packet(20, ECHO_REQUEST, 1),
            packet(20, ECHO_REPLY, IDENTIFIER),
            packet(60, ECHO_REPLY, IDENTIFIER),
        ];
        assert_eq!(passed(&good), [true; 4]);
    }

    #[test]
    fn the_rest_wakes_nobody() {
        let sound = packet(20, ECHO_REPLY, IDENTIFIER);
        let mut bad: Vec<Vec<u8>> = (0..sound.len()).map(|length| sound[..length].to_vec()).collect();
        bad.push([&sound[..], &[0]].concat());
        bad.push(packet(20, ECHO_REPLY, IDENTIFIER ^ 1));
        // An ICMP error, and another mark.
        bad.push(packet(20, 3, 9));
        for at in 28..32 {
            let mut other = packet(20, ECHO_REQUEST, IDENTIFIER);
            other[at] ^= 1;
            bad.push(other);
        }
        // The header's length points behind the packet's end.
        bad.push([&[0x4f; 20][..], &sound[20..]].concat());
        assert_eq!(passed(&bad), vec![false; bad.len()]);
    }
}
