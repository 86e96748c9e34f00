//! Sends echo requests over raw sockets. Labs also run where there is no `ping` program.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::net::{SocketType, ipproto};

use super::{limit, open, timed_out};
use crate::interrupt;
use crate::netns::Netns;

/// The next identifier. It is unique in this process. Other processes have other namespaces.
static IDENTIFIER: AtomicU16 = AtomicU16::new(1);

/// Time between two requests.
const GAP: Duration = Duration::from_millis(20);

/// The result of several echo requests.
#[derive(Clone, Debug)]
pub struct PingReport {
    pub sent: u16,
    /// Round trip times of the answered requests, in the order of the answers.
    pub round_trips: Vec<Duration>,
}

impl PingReport {
    pub fn answered(&self) -> usize {
        self.round_trips.len()
    }

    /// The median round trip time. `None` without an answer.
    pub fn median(&self) -> Option<Duration> {
        let mut times = self.round_trips.clone();
        times.sort();
        times.get(times.len() / 2).copied()
    }
}

/// Sends `count` echo requests with `payload` bytes each, one after another, and waits at most `patience` for each
/// answer. A request that cannot be sent, for example without a route, counts as unanswered.
pub fn ping(
    ns: &Netns,
    source: IpAddr,
    destination: IpAddr,
    count: u16,
    payload: usize,
    patience: Duration,
) -> Result<PingReport> {
    let (protocol, request, reply) = match destination {
        IpAddr::V4(_) => (ipproto::ICMP, 8, 0),
        IpAddr::V6(_) => (ipproto::ICMPV6, 128, 129),
    };
    let socket = open(ns, SocketAddr::new(source, 0), SocketType::RAW, Some(protocol))?;
    // The system calls are the same for raw sockets, which ignore the port.
    let socket = UdpSocket::from(socket);
    let identifier = IDENTIFIER.fetch_add(1, Ordering::Relaxed);
    let mut report = PingReport { sent: 0, round_trips: Vec::new() };
    let mut buffer = vec![0; payload + 200];
    for sequence in 0..count {
        let mut message = vec![request, 0, 0, 0];
        message.extend(identifier.to_be_bytes());
        message.extend(sequence.to_be_bytes());
        message.resize(8 + payload, 0xc3);
        if destination.is_ipv4() {
            // For ICMPv6, the kernel fills in the checksum, which covers the addresses.
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let start = Instant::now();
        report.sent += 1;
        if socket.send_to(&message, SocketAddr::new(destination, 0)).is_err() {
            std::thread::sleep(GAP);
            continue;
        }
        while let Some(left) = patience.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
            limit(&socket, left)?;
            let (length, from) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(e) if timed_out(&e) => break,
                Err(e) => return Err(e).context("receiving echo replies"),
            };
            // IPv4 raw sockets also deliver the IP header.
            let skip = if destination.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
            let answer = buffer.get(skip..length).unwrap_or_default();
            if from.ip() == destination && answer.first() == Some(&reply) && answer.get(4..) == Some(&message[4..]) {
                report.round_trips.push(start.elapsed());
                break;
            }
        }
        if sequence + 1 < count {
            std::thread::sleep(GAP.saturating_sub(start.elapsed()));
        }
    }
    Ok(report)
}

/// Pings until there is an answer, at most for `patience`. Returns how long it took.
pub fn wait_for_reply(ns: &Netns, source: IpAddr, destination: IpAddr, patience: Duration) -> Result<Duration> {
    let start = Instant::now();
    while start.elapsed() < patience && !interrupt::requested() {
        if ping(ns, source, destination, 1, 56, Duration::from_millis(200))?.answered() > 0 {
            return Ok(start.elapsed());
        }
    }
    interrupt::check()?;
    bail!("{destination} does not answer {source} in {} within {} s", ns.name(), patience.as_secs())
}

/// The Internet checksum, RFC 1071.
fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks(2).map(|pair| u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    !words.fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[0x12]), !0x1200);
    }
}
