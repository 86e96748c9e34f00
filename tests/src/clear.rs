//! Watches the wires between the sites for frames that should not be there. Allowed are the tunnels' own packets, and
//! what links need (LACP, ARP, IPv6 neighbour discovery, ICMP errors between the gateways).
//!
//! A socket filter in the kernel drops the allowed frames, so that they do not wake this program.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::netns::Netns;
use anyhow::{Context as _, Result};

/// `ETH_P_ALL`, in network byte order.
const ALL: u16 = 3_u16.to_be();
/// How many bytes of a frame are read to describe it.
const TOLD: usize = 128;

/// Describes the tunnels' outer packets.
#[derive(Clone, Debug)]
pub struct Outer {
    /// The gateways' network and its mask, in host byte order.
    pub network: (u32, u32),
    /// UDP ports that tunnels have or had.
    pub ports: Vec<u16>,
}

/// A socket that receives the frames which should not be there.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
}

impl Watch {
    /// Watches all frames that enter at the wires' ends in the namespace `wires`.
    pub fn begin(wires: &Netns, outer: &Outer) -> Result<Self> {
        Self::begin_at(wires, None, outer)
    }

    /// Watches the frames that enter `machine` at the device with this interface index; `None`: at every device.
    pub fn begin_at(machine: &Netns, device: Option<u32>, outer: &Outer) -> Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let socket = machine.run(|| {
            // With protocol 0, the socket receives nothing before the filter is attached.
            // SAFETY: `socket` takes no pointers.
            match unsafe { libc::socket(libc::AF_PACKET, kind, 0) } {
                // SAFETY: the descriptor is new and open, and no other code owns it.
                fd @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
                _ => Err(io::Error::last_os_error()),
            }
        });
        let watch = Self { socket: socket.context("opening a packet socket")? };
        // Each frame is seen once, where it enters a wire.
        watch.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1_i32).context("ignoring outgoing frames")?;
        watch.expect(outer)?;
        // SAFETY: a sockaddr_ll consists of integers, for which zero is a valid value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::c_ushort::try_from(libc::AF_PACKET).expect("17");
        address.sll_protocol = ALL;
        address.sll_ifindex = device.map_or(Ok(0), i32::try_from).context("an interface index")?;
        let length = libc::socklen_t::try_from(size_of_val(&address)).expect("20");
        // SAFETY: the address lives until the call returns, and has the given length.
        let bound = unsafe { libc::bind(watch.socket.as_raw_fd(), (&raw const address).cast(), length) };
        if bound == 0 { Ok(watch) } else { Err(io::Error::last_os_error()).context("binding a packet socket") }
    }

    /// Allows these packets from now on, in place of the former ones.
    pub fn expect(&self, outer: &Outer) -> Result<()> {
        let mut program = filter(outer);
        let length = u16::try_from(program.len()).context("too many ports")?;
        let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program).context("attaching a filter")
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        let length = libc::socklen_t::try_from(size_of::<T>()).expect("small");
        // SAFETY: the value and the data that it points to live until the call returns.
        match unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, (&raw const *value).cast(), length) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Describes the next frame that should not be there. `None` if there was none.
    pub fn next(&self) -> Result<Option<String>> {
        let mut frame = [0_u8; TOLD];
        // SAFETY: the buffer lives until the call returns, and has the given length.
        let length = unsafe { libc::recv(self.socket.as_raw_fd(), frame.as_mut_ptr().cast(), TOLD, 0) };
        match usize::try_from(length) {
            Ok(length) => Ok(Some(describe(&frame[..length]))),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                // One end of a wire is down.
                error if error.raw_os_error() == Some(libc::ENETDOWN) => Ok(None),
                error => Err(error).context("looking at the wires"),
            },
        }
    }
}

/// Number of frames that have entered the wires so far.
pub fn frames(wires: &Netns) -> Result<u64> {
    let text = wires.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).context("counting frames")?;
    let received = |line: &str| line.split_once(':')?.1.split_whitespace().nth(1)?.parse::<u64>().ok();
    Ok(text.lines().filter_map(received).sum())
}

/// Describes a frame in words.
fn describe(frame: &[u8]) -> String {
    let byte = |at: usize| frame.get(at).copied().unwrap_or(0);
    let half = |at: usize| u16::from_be_bytes([byte(at), byte(at + 1)]);
    let address = |at: usize, count: usize| frame.get(at..at + count).unwrap_or_default().to_vec();
    let v4 =
        |at| <[u8; 4]>::try_from(address(at, 4)).map_or("?".to_owned(), |a| std::net::Ipv4Addr::from(a).to_string());
    let v6 =
        |at| <[u8; 16]>::try_from(address(at, 16)).map_or("?".to_owned(), |a| std::net::Ipv6Addr::from(a).to_string());
    match half(12) {
        0x0800 => {
            let mut text = format!("IPv4, protocol {}, from {} to {}", byte(23), v4(26), v4(30));
            if [6, 17].contains(&byte(23)) {
                let _ = write!(text, ", ports {} and {}", half(34), half(36));
            }
            text
        }
        0x86dd => format!("IPv6, next header {}, from {} to {}", byte(20), v6(22), v6(38)),
        kind => format!("Ethernet type {kind:#06x}"),
    }
}

/// The target of a jump in a classic BPF program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    Next,
    Label(&'static str),
}

/// A classic BPF program with labels.
#[derive(Default)]
struct Assembler {
    code: Vec<(u16, To, To, u32)>,
    labels: Vec<(&'static str, usize)>,
}

const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const LOAD_HALF_BEHIND: u16 = 0x48;
const LOAD_BYTE_BEHIND: u16 = 0x50;
const LOAD_HEADER_LENGTH: u16 = 0xb1;
const AND: u16 = 0x54;
const IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

impl Assembler {
    fn label(&mut self, name: &'static str) {
        self.labels.push((name, self.code.len()));
    }

    fn emit(&mut self, code: u16, value: u32) {
        self.code.push((code, To::Next, To::Next, value));
    }

    /// Jumps to a label if the accumulator is `value`.
    fn equal(&mut self, value: u32, label: &'static str) {
        self.code.push((IF_EQUAL, To::Label(label), To::Next, value));
    }

    /// Jumps to a label unless the accumulator is `value`.
    fn unless(&mut self, value: u32, label: &'static str) {
        self.code.push((IF_EQUAL, To::Next, To::Label(label), value));
    }

    fn assemble(self) -> Vec<libc::sock_filter> {
        let offset = |at: usize, to: To| match to {
            To::Next => 0,
            To::Label(name) => {
                let (_, place) = self.labels.iter().find(|(label, _)| *label == name).expect("every label is set");
                u8::try_from(place - at - 1).expect("labels are ahead, and near")
            }
        };
        let line = |(at, (code, yes, no, value)): (usize, &(u16, To, To, u32))| libc::sock_filter {
            code: *code,
            jt: offset(at, *yes),
            jf: offset(at, *no),
            k: *value,
        };
        self.code.iter().enumerate().map(line).collect()
    }
}

/// The filter that passes frames which should not be there. It sees frames from the Ethernet header on.
fn filter(outer: &Outer) -> Vec<libc::sock_filter> {
    let mut f = Assembler::default();
    f.emit(LOAD_HALF, 12);
    for kind in [0x8809, 0x0806] {
        f.equal(kind, "fine");
    }
    f.equal(0x86dd, "IPv6");
    f.unless(0x0800, "wrong");
    let (network, mask) = outer.network;
    for address in [26, 30] {
        f.emit(LOAD_WORD, address);
        f.emit(AND, mask);
        f.unless(network, "wrong");
    }
    f.emit(LOAD_HEADER_LENGTH, 14);
    f.emit(LOAD_BYTE, 23);
    f.equal(1, "ICMP");
    f.unless(17, "wrong");
    f.emit(LOAD_HALF_BEHIND, 14);
    for port in &outer.ports {
        f.equal(u32::from(*port), "known source");
    }
    f.emit(RETURN, u32::MAX);
    f.label("known source");
    f.emit(LOAD_HALF_BEHIND, 16);
    for port in &outer.ports {
        f.equal(u32::from(*port), "fine");
    }
    f.emit(RETURN, u32::MAX);
    f.label("ICMP");
    // Destination unreachable, redirect, time exceeded: these quote an outer packet.
    f.emit(LOAD_BYTE_BEHIND, 14);
    for kind in [3, 5, 11] {
        f.equal(kind, "fine");
    }
    f.emit(RETURN, u32::MAX);
    f.label("IPv6");
    // Neighbour discovery and multicast listener reports: from a link-local or the unspecified address.
    f.emit(LOAD_HALF, 22);
    f.emit(AND, 0xffc0);
    f.equal(0xfe80, "fine");
    for word in [22, 26, 30, 34] {
        f.emit(LOAD_WORD, word);
        f.unless(0, "wrong");
    }
    f.label("fine");
    f.emit(RETURN, 0);
    f.label("wrong");
    f.emit(RETURN, u32::MAX);
    f.assemble()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets a program as the kernel does (`bpf_prog_run_clear_cb()`), for the instructions that are used here.
    fn passes(program: &[libc::sock_filter], frame: &[u8]) -> bool {
        let load =
            |at: usize, count: usize| frame[at..at + count].iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
        let (mut a, mut x, mut at) = (0, 0_usize, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            let place = k as usize;
            at += 1;
            match code {
                LOAD_WORD => a = load(place, 4),
                LOAD_HALF => a = load(place, 2),
                LOAD_BYTE => a = load(place, 1),
                LOAD_HALF_BEHIND => a = load(x + place, 2),
                LOAD_BYTE_BEHIND => a = load(x + place, 1),
                LOAD_HEADER_LENGTH => x = 4 * (load(place, 1) & 15) as usize,
                AND => a &= k,
                IF_EQUAL => at += usize::from(if a == k { jt } else { jf }),
                RETURN => return k != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn ethernet(kind: u16, rest: &[u8]) -> Vec<u8> {
        [&[0; 12][..], &kind.to_be_bytes(), rest].concat()
    }

    fn ipv4(protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let header = [&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0][..], &from, &to].concat();
        ethernet(0x0800, &[header, payload.to_vec()].concat())
    }

    fn udp(sport: u16, dport: u16) -> Vec<u8> {
        [&sport.to_be_bytes()[..], &dport.to_be_bytes(), &[0; 12]].concat()
    }

    fn ipv6(from: &str) -> Vec<u8> {
        let from: std::net::Ipv6Addr = from.parse().unwrap();
        ethernet(0x86dd, &[&[0x60, 0, 0, 0, 0, 0, 58, 255][..], &from.octets(), &[0xff; 16]].concat())
    }

    #[test]
    fn only_what_should_not_be_there_passes() {
        let outer = Outer { network: (0x0a02_0300, 0xffff_ff00), ports: vec![51_820, 51_823] };
        let program = filter(&outer);
        let (a, b) = ([10, 2, 3, 4], [10, 2, 3, 5]);
        let fine = [
            ethernet(0x8809, &[0; 60]),
            ethernet(0x0806, &[0; 40]),
            ipv4(17, a, b, &udp(51_820, 51_823)),
            ipv4(17, b, a, &udp(51_820, 51_820)),
            ipv4(1, b, a, &[3, 3, 0, 0]),
            ipv6("fe80::1"),
            ipv6("::"),
        ];
        for frame in &fine {
            assert!(!passes(&program, frame), "{}", describe(frame));
        }
        let wrong = [
            ipv4(17, [10, 10, 0, 10], [10, 20, 0, 10], &udp(51_820, 51_823)),
            ipv4(17, a, [10, 20, 0, 10], &udp(51_820, 51_823)),
            ipv4(17, a, b, &udp(51_820, 9)),
            ipv4(17, a, b, &udp(9, 51_820)),
            ipv4(6, a, b, &udp(51_820, 51_820)),
            ipv4(1, a, b, &[8, 0, 0, 0]),
            ipv6("fd00:10::10"),
            ethernet(0x9000, &[0; 40]),
        ];
        for frame in &wrong {
            assert!(passes(&program, frame), "{}", describe(frame));
        }
    }

    #[test]
    fn a_frame_is_described_in_words() {
        let frame = ipv4(17, [10, 10, 0, 10], [10, 20, 0, 10], &udp(7, 9));
        assert_eq!(describe(&frame), "IPv4, protocol 17, from 10.10.0.10 to 10.20.0.10, ports 7 and 9");
        assert_eq!(describe(&frame[..20]), "IPv4, protocol 0, from ? to ?");
    }
}
