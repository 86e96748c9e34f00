//! A paced UDP stream, as RTP sends it: numbered datagrams with their send time, and a receiver that does not repair
//! order. All datagrams have DF set.

use std::net::{SocketAddr, UdpSocket};
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::net::SocketType;
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, set_ip_mtu_discover, set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force,
};
use rustix::thread::set_current_timer_slack;

use super::order::Order;
use super::{CATCH_UP, Path, limit, megabits, open, timed_out};
use crate::interrupt;

/// Sequence number and send time (nanoseconds from the start), 4 and 8 bytes, big endian.
const HEADER: usize = 12;
/// Socket buffers, bytes.
const BUFFER: usize = 8 << 20;
/// The receiver stops when nothing has come for this long after the sender's end.
const SILENCE: Duration = Duration::from_secs(1);

/// Describes the stream. Times are from the start of the load.
#[derive(Clone, Debug)]
pub struct RtpLoad {
    /// UDP payload of each datagram, bytes. At least 12.
    pub payload: usize,
    /// 10^6 bits of payload a second.
    pub rate: f64,
    /// When the first datagram is sent.
    pub begin: Duration,
    /// When the last one is sent.
    pub end: Duration,
    /// Goodput, loss and delay are those of the datagrams that are sent in this window. Order is that of all.
    pub window: Range<Duration>,
}

/// One-way delays. Both ends read the same clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delays {
    pub least: Duration,
    pub median: Duration,
    /// 99th percentile.
    pub p99: Duration,
    pub greatest: Duration,
}

impl Delays {
    /// Of unsorted delays. All are zero if there are none.
    fn of(mut delays: Vec<Duration>) -> Self {
        delays.sort_unstable();
        let Some(last) = delays.len().checked_sub(1) else { return Self::default() };
        let rank = |percent: usize| delays[((last + 1) * percent).div_ceil(100) - 1];
        Self { least: delays[0], median: rank(50), p99: rank(99), greatest: delays[last] }
    }
}

/// The result of the stream.
#[derive(Clone, Debug)]
pub struct RtpReport {
    /// Datagrams sent.
    pub sent: u32,
    /// What came of all datagrams.
    pub order: Order,
    /// Datagrams sent in the window, and those of them that arrived.
    pub window_sent: u32,
    pub window_received: u32,
    pub window: Duration,
    /// Of the datagrams sent in the window.
    pub delays: Delays,
    /// UDP payload of each datagram, bytes.
    pub payload: usize,
}

impl RtpReport {
    /// 10^6 bits of payload a second, of what was sent in the window and arrived.
    pub fn goodput(&self) -> f64 {
        megabits(u64::from(self.window_received) * self.payload as u64, self.window)
    }

    /// Share of all that was received that came out of order, 0 to 1.
    pub fn out_of_order(&self) -> f64 {
        f64::from(self.order.reordered) / f64::from(self.order.received.max(1))
    }

    /// Share of what was sent in the window that did not arrive, 0 to 1.
    pub fn loss(&self) -> f64 {
        1.0 - f64::from(self.window_received) / f64::from(self.window_sent.max(1))
    }
}

/// What the receiver has seen.
struct Seen {
    order: Order,
    window_received: u32,
    delays: Vec<Duration>,
}

impl RtpLoad {
    /// Sends the stream over `path`. Loss is not an error: the caller judges it.
    ///
    /// # Errors
    /// A datagram cannot be sent, or something else arrives.
    pub fn run(&self, path: Path<'_>) -> Result<RtpReport> {
        ensure!(self.payload >= HEADER, "a payload of {} bytes does not hold number and time", self.payload);
        let receiver = open(path.to, SocketAddr::new(path.destination, 0), SocketType::DGRAM, None)?;
        set_socket_recv_buffer_size_force(&receiver, BUFFER)?;
        let receiver = UdpSocket::from(receiver);
        limit(&receiver, Duration::from_millis(50))?;
        let destination = receiver.local_addr()?;
        let sender = open(path.from, SocketAddr::new(path.source, 0), SocketType::DGRAM, None)?;
        set_socket_send_buffer_size_force(&sender, BUFFER)?;
        if path.source.is_ipv4() {
            set_ip_mtu_discover(&sender, Ipv4PathMtuDiscovery::DO)?;
        }
        let sender = UdpSocket::from(sender);
        sender.connect(destination).with_context(|| format!("connecting {} to {destination}", path.source))?;
        let source = sender.local_addr()?;
        let start = Instant::now();
        let finished = AtomicBool::new(false);
        let (sent, seen) = thread::scope(|scope| {
            let receiving = scope.spawn(|| self.receive(&receiver, source, start, &finished));
            let sent = scope.spawn(|| self.send(&sender, start)).join().expect("the sender does not panic");
            finished.store(true, Ordering::Release);
            (sent, receiving.join().expect("the receiver does not panic"))
        });
        let (sent, window_sent) = sent.with_context(|| format!("sending from {source} to {destination}"))?;
        let seen = seen?;
        Ok(RtpReport {
            sent,
            order: seen.order,
            window_sent,
            window_received: seen.window_received,
            window: self.window.end.saturating_sub(self.window.start),
            delays: Delays::of(seen.delays),
            payload: self.payload,
        })
    }

    /// Time between two datagrams.
    fn gap(&self) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "a payload has at most 65,507 bytes")]
        Duration::from_secs_f64(self.payload as f64 * 8.0 / (self.rate * 1e6))
    }

    /// An upper bound of the number of datagrams.
    fn count(&self) -> u32 {
        let time = self.end.saturating_sub(self.begin);
        u32::try_from(time.as_nanos() / self.gap().as_nanos().max(1) + 2).unwrap_or(u32::MAX)
    }

    /// Returns the number of datagrams sent, and of those in the window.
    fn send(&self, socket: &UdpSocket, start: Instant) -> Result<(u32, u32)> {
        // The kernel may wake a thread later than asked by this time, 50 us by default: more than between two datagrams.
        set_current_timer_slack(NonZeroU64::new(1))?;
        let (gap, end) = (self.gap(), start + self.end);
        let mut datagram = vec![0xa5; self.payload];
        let (mut number, mut in_window) = (0_u32, 0);
        let mut due = start + self.begin;
        while due < end && number < self.count() && !interrupt::requested() {
            // A sleep may take too long. The sender then sends faster until it has caught up.
            let now = Instant::now();
            thread::sleep(due.saturating_duration_since(now));
            due = due.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + gap;
            let at = start.elapsed();
            datagram[..4].copy_from_slice(&number.to_be_bytes());
            datagram[4..HEADER].copy_from_slice(&u64::try_from(at.as_nanos())?.to_be_bytes());
            socket.send(&datagram)?;
            in_window += u32::from(self.window.contains(&at));
            number += 1;
        }
        Ok((number, in_window))
    }

    fn receive(&self, socket: &UdpSocket, source: SocketAddr, start: Instant, finished: &AtomicBool) -> Result<Seen> {
        let mut seen = Seen { order: Order::new(self.count()), window_received: 0, delays: Vec::new() };
        let mut buffer = vec![0; self.payload + 1];
        let mut quiet_since = Instant::now();
        loop {
            match socket.recv_from(&mut buffer) {
                Ok((length, from)) => {
                    let now = start.elapsed();
                    ensure!(length == self.payload && from == source, "{length} bytes came from {from}");
                    let number = u32::from_be_bytes(buffer[..4].try_into()?);
                    let at = Duration::from_nanos(u64::from_be_bytes(buffer[4..HEADER].try_into()?));
                    if seen.order.add(number) && self.window.contains(&at) {
                        seen.window_received += 1;
                        seen.delays.push(now.saturating_sub(at));
                    }
                    quiet_since = Instant::now();
                }
                Err(e) if timed_out(&e) => {
                    if finished.load(Ordering::Acquire) && quiet_since.elapsed() >= SILENCE {
                        return Ok(seen);
                    }
                }
                Err(e) => return Err(e).context("receiving the stream"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_sorted_delays() {
        let delays = Delays::of((1..=200).rev().map(Duration::from_millis).collect());
        let ms = Duration::from_millis;
        assert_eq!(delays, Delays { least: ms(1), median: ms(100), p99: ms(198), greatest: ms(200) });
        assert_eq!(Delays::of(vec![ms(7)]), Delays { least: ms(7), median: ms(7), p99: ms(7), greatest: ms(7) });
        assert_eq!(Delays::of(Vec::new()), Delays::default());
    }

    #[test]
    fn the_rate_sets_the_gap() {
        let second = Duration::from_secs(1);
        let load = RtpLoad { payload: 1200, rate: 250.0, begin: second, end: 2 * second, window: second..2 * second };
        assert_eq!(load.gap(), Duration::from_nanos(38_400));
        assert!((26_042..26_045).contains(&load.count()), "{}", load.count());
    }
}
