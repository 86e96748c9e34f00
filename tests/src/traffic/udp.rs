//! UDP streams with sequence numbers: what was lost, repeated or overtaken shows.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::net::SocketType;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};

use super::{CATCH_UP, Path, limit, megabits, open, timed_out};

/// Flow number and sequence number, big endian.
const HEADER: usize = 12;
/// The receiver stops when nothing came for this long after the sender's end.
const SILENCE: Duration = Duration::from_secs(2);

/// What is to be sent.
#[derive(Clone, Copy, Debug)]
pub struct UdpLoad {
    /// Source ports, served in turn.
    pub flows: usize,
    /// Datagrams of each flow.
    pub packets: u32,
    /// UDP payload, bytes; at least 12.
    pub payload: usize,
    /// 10^6 bits of payload a second, all flows together.
    pub rate: f64,
}

/// One source port.
#[derive(Clone, Copy, Debug)]
pub struct UdpFlow {
    /// Its sending end.
    pub source: SocketAddr,
    /// Datagrams sent.
    pub sent: u32,
    /// Datagrams received, repeated ones not counted.
    pub received: u32,
    /// Datagrams that came again.
    pub repeated: u32,
    /// Datagrams that came after a later one.
    pub reordered: u32,
}

/// What arrived.
#[derive(Clone, Debug)]
pub struct UdpReport {
    /// Every flow.
    pub flows: Vec<UdpFlow>,
    /// UDP payload of one datagram, bytes.
    pub payload: usize,
    /// From the first datagram sent to the last one received.
    pub time: Duration,
}

impl UdpReport {
    /// Datagrams sent.
    pub fn sent(&self) -> u32 {
        self.flows.iter().map(|flow| flow.sent).sum()
    }

    /// Datagrams received, repeated ones not counted.
    pub fn received(&self) -> u32 {
        self.flows.iter().map(|flow| flow.received).sum()
    }

    /// Datagrams that came after a later one of their flow.
    pub fn reordered(&self) -> u32 {
        self.flows.iter().map(|flow| flow.reordered).sum()
    }

    /// Share of the datagrams that never came, 0 to 1.
    pub fn loss(&self) -> f64 {
        1.0 - f64::from(self.received()) / f64::from(self.sent())
    }

    /// UDP payload received, bytes.
    pub fn received_bytes(&self) -> u64 {
        u64::from(self.received()) * self.payload as u64
    }

    /// 10^6 bits of payload a second at the receiver.
    pub fn goodput(&self) -> f64 {
        megabits(self.received_bytes(), self.time)
    }
}

/// What the receiver knows of one flow.
#[derive(Clone, Default)]
struct Seen {
    numbers: Vec<bool>,
    highest: Option<u32>,
    received: u32,
    repeated: u32,
    reordered: u32,
}

impl Seen {
    fn add(&mut self, number: u32) {
        match self.numbers.get_mut(number as usize) {
            Some(seen) if *seen => self.repeated += 1,
            Some(seen) => {
                *seen = true;
                self.received += 1;
                if self.highest.is_some_and(|highest| highest > number) {
                    self.reordered += 1;
                }
                self.highest = self.highest.max(Some(number));
            }
            // Not one of ours.
            None => {}
        }
    }
}

impl UdpLoad {
    /// Sends it over `path`. Fails if something cannot be sent, or a datagram comes from an address that is not its
    /// sender's; loss is the caller's to judge.
    pub fn run(self, path: Path<'_>) -> Result<UdpReport> {
        ensure!(self.payload >= HEADER, "a payload of {} bytes does not hold the numbers", self.payload);
        let receiver = open(path.to, SocketAddr::new(path.destination, 0), SocketType::DGRAM, None)?;
        set_socket_recv_buffer_size_force(&receiver, 8 << 20)?;
        let receiver = UdpSocket::from(receiver);
        limit(&receiver, Duration::from_millis(50))?;
        let destination = receiver.local_addr()?;
        let mut senders = Vec::with_capacity(self.flows);
        for _ in 0..self.flows {
            let socket = open(path.from, SocketAddr::new(path.source, 0), SocketType::DGRAM, None)?;
            // Else a full queueing discipline makes the sender wait, and nothing is ever lost.
            set_socket_send_buffer_size_force(&socket, 8 << 20)?;
            let socket = UdpSocket::from(socket);
            socket.connect(destination).with_context(|| format!("connecting {} to {destination}", path.source))?;
            senders.push((socket.local_addr()?, socket));
        }
        let sources: Vec<SocketAddr> = senders.iter().map(|(source, _)| *source).collect();
        let start = Instant::now();
        let finished = AtomicBool::new(false);
        let (seen, last) = thread::scope(|scope| -> Result<_> {
            let receiving = scope.spawn(|| self.receive(&receiver, &sources, start, &finished));
            let sent = self.send(&senders);
            finished.store(true, Ordering::Release);
            let arrived = receiving.join().expect("the receiver does not panic");
            sent.with_context(|| format!("sending from {} to {destination}", path.source))?;
            arrived
        })?;
        let flows = sources.into_iter().zip(seen).map(|(source, seen)| UdpFlow {
            source,
            sent: self.packets,
            received: seen.received,
            repeated: seen.repeated,
            reordered: seen.reordered,
        });
        Ok(UdpReport { flows: flows.collect(), payload: self.payload, time: last })
    }

    fn send(self, senders: &[(SocketAddr, UdpSocket)]) -> std::io::Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "a payload has at most 65,507 bytes")]
        let gap = Duration::from_secs_f64(self.payload as f64 * 8.0 / (self.rate * 1e6));
        let mut datagram = vec![0xa5; self.payload];
        let mut due = Instant::now();
        for number in 0..self.packets {
            for (flow, (_, socket)) in (0_u32..).zip(senders) {
                datagram[..4].copy_from_slice(&flow.to_be_bytes());
                datagram[4..8].copy_from_slice(&number.to_be_bytes());
                // The sleep is coarse, and what it oversleeps is caught up with.
                let now = Instant::now();
                thread::sleep(due.saturating_duration_since(now));
                due = due.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + gap;
                socket.send(&datagram)?;
            }
        }
        Ok(())
    }

    fn receive(
        self,
        socket: &UdpSocket,
        sources: &[SocketAddr],
        start: Instant,
        finished: &AtomicBool,
    ) -> Result<(Vec<Seen>, Duration)> {
        let empty = Seen { numbers: vec![false; self.packets as usize], ..Seen::default() };
        let mut seen = vec![empty; sources.len()];
        let mut missing = u64::from(self.packets) * sources.len() as u64;
        let mut buffer = vec![0; self.payload + 1];
        let (mut last, mut quiet_since) = (Duration::ZERO, Instant::now());
        while missing > 0 {
            match socket.recv_from(&mut buffer) {
                Ok((length, from)) => {
                    ensure!(length == self.payload, "a datagram of {} bytes came as {length}", self.payload);
                    let word = |at: usize| u32::from_be_bytes(buffer[at..at + 4].try_into().expect("four bytes"));
                    let (flow, number) = (word(0) as usize, word(4));
                    ensure!(sources.get(flow) == Some(&from), "flow {flow} came from {from}");
                    let before = seen[flow].received;
                    seen[flow].add(number);
                    missing -= u64::from(seen[flow].received - before);
                    last = start.elapsed();
                    quiet_since = Instant::now();
                }
                Err(e) if timed_out(&e) => {
                    if finished.load(Ordering::Acquire) && quiet_since.elapsed() >= SILENCE {
                        break;
                    }
                }
                Err(e) => return Err(e).context("receiving datagrams"),
            }
        }
        Ok((seen, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_repetition_and_reordering_are_told_apart() {
        let mut seen = Seen { numbers: vec![false; 6], ..Seen::default() };
        for number in [0, 2, 1, 2, 5, 9] {
            seen.add(number);
        }
        assert_eq!((seen.received, seen.repeated, seen.reordered), (4, 1, 1));
    }
}
