//! UDP streams with sequence numbers, which show loss, repetition and reordering.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::net::SocketType;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};

use super::{CATCH_UP, Path, limit, megabits, open, timed_out};

/// Smallest payload, bytes. It begins with the flow number and the sequence number, 4 bytes each, big endian.
const HEADER: usize = 12;
/// The receiver stops when nothing has come for this long after the sender's end.
const SILENCE: Duration = Duration::from_secs(2);

/// Describes the traffic to send.
#[derive(Clone, Copy, Debug)]
pub struct UdpLoad {
    /// Number of flows. Each has its own source port. They send in turn.
    pub flows: usize,
    /// Number of datagrams of each flow.
    pub packets: u32,
    /// UDP payload, bytes. At least 12.
    pub payload: usize,
    /// Rate of all flows together, 10^6 bits of payload a second.
    pub rate: f64,
}

/// The result of one flow.
#[derive(Clone, Copy, Debug)]
pub struct UdpFlow {
    /// Address and port of the sender.
    pub source: SocketAddr,
    /// Datagrams sent.
    pub sent: u32,
    /// Datagrams received, without repeated ones.
    pub received: u32,
    /// Datagrams that came once more.
    pub repeated: u32,
    /// Datagrams that came after one with a higher number.
    pub reordered: u32,
}

/// The result of all flows.
#[derive(Clone, Debug)]
pub struct UdpReport {
    pub flows: Vec<UdpFlow>,
    /// UDP payload of each datagram, bytes.
    pub payload: usize,
    /// Time from the first datagram sent to the last one received.
    pub time: Duration,
}

impl UdpReport {
    /// Datagrams sent.
    pub fn sent(&self) -> u32 {
        self.flows.iter().map(|flow| flow.sent).sum()
    }

    /// Datagrams received, without repeated ones.
    pub fn received(&self) -> u32 {
        self.flows.iter().map(|flow| flow.received).sum()
    }

    /// Datagrams that came after one of the same flow with a higher number.
    pub fn reordered(&self) -> u32 {
        self.flows.iter().map(|flow| flow.reordered).sum()
    }

    /// Share of the datagrams that were lost, 0 to 1.
    pub fn loss(&self) -> f64 {
        1.0 - f64::from(self.received()) / f64::from(self.sent())
    }

    /// UDP payload received, bytes.
    pub fn received_bytes(&self) -> u64 {
        u64::from(self.received()) * self.payload as u64
    }

    /// Goodput at the receiver, 10^6 bits of payload a second.
    pub fn goodput(&self) -> f64 {
        megabits(self.received_bytes(), self.time)
    }
}

/// What the receiver has seen of one flow.
#[derive(Clone, Default)]
struct Arrivals {
    numbers: Vec<bool>,
    highest: Option<u32>,
    received: u32,
    repeated: u32,
    reordered: u32,
}

impl Arrivals {
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
            // No datagram with this number was sent.
            None => {}
        }
    }
}

impl UdpLoad {
    /// Sends the traffic over `path`. Loss is not an error: the caller judges it.
    ///
    /// # Errors
    /// A datagram cannot be sent, or came from an address that is not its sender's.
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
            // With a small buffer, a full queueing discipline would make the sender wait, and nothing would ever be
            // lost.
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
                // A sleep may take too long. The sender then sends faster until it has caught up.
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
    ) -> Result<(Vec<Arrivals>, Duration)> {
        let empty = Arrivals { numbers: vec![false; self.packets as usize], ..Arrivals::default() };
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
    fn loss_repetition_and_reordering_are_distinguished() {
        let mut seen = Arrivals { numbers: vec![false; 6], ..Arrivals::default() };
        for number in [0, 2, 1, 2, 5, 9] {
            seen.add(number);
        }
        assert_eq!((seen.received, seen.repeated, seen.reordered), (4, 1, 1));
    }
}
