//! Bulk TCP in one direction, with several flows at once.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::net::{SocketType, connect, getsockname, listen};

use crate::interrupt;

use super::{CALL_LIMIT, Path, limit, megabits, open, timed_out};

/// How long data that is still in buffers may take to arrive after the senders have stopped.
pub(super) const DRAIN: Duration = Duration::from_secs(20);
/// How often the receiver reads what has arrived. Waking for each segment took a tenth of an emulated machine's time,
/// so that the measurement made the traffic slower. This is short compared with the round trips of full links, so that
/// TCP windows stay open.
pub const LOOK: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After this time.
    Time(Duration),
    /// After this many bytes on each flow.
    Bytes(u64),
}

/// Describes the traffic to send.
#[derive(Clone, Copy, Debug)]
pub struct TcpLoad {
    /// Number of connections at once.
    pub flows: usize,
    /// When each connection stops.
    pub until: Until,
    /// With [`Until::Time`]: the time at the start that the goodput leaves out.
    pub warm_up: Duration,
}

/// The result of one connection.
#[derive(Clone, Copy, Debug)]
pub struct TcpFlow {
    /// Address and port of the sender.
    pub source: SocketAddr,
    /// Bytes written.
    pub sent: u64,
    /// Bytes read at the other end.
    pub received: u64,
}

/// The result of all connections.
#[derive(Clone, Debug)]
pub struct TcpReport {
    pub flows: Vec<TcpFlow>,
    /// Bytes of all flows that were read in `window`.
    pub window_bytes: u64,
    /// The time in which the goodput was measured.
    pub window: Duration,
}

impl TcpReport {
    /// Bytes written.
    pub fn sent(&self) -> u64 {
        self.flows.iter().map(|flow| flow.sent).sum()
    }

    /// Bytes read at the receiver.
    pub fn received(&self) -> u64 {
        self.flows.iter().map(|flow| flow.received).sum()
    }

    /// Goodput at the receiver, 10^6 bits a second.
    pub fn goodput(&self) -> f64 {
        megabits(self.window_bytes, self.window)
    }
}

impl TcpLoad {
    /// `flows` connections for `seconds`. The first quarter is not measured.
    pub fn timed(flows: usize, seconds: f64) -> Self {
        let time = Duration::from_secs_f64(seconds);
        Self { flows, until: Until::Time(time), warm_up: time / 4 }
    }

    /// `flows` connections with `each` bytes each.
    pub fn bytes(flows: usize, each: u64) -> Self {
        Self { flows, until: Until::Bytes(each), warm_up: Duration::ZERO }
    }

    /// Sends the traffic over `path`.
    ///
    /// # Errors
    /// A connection cannot be made, or a byte that was written was not read.
    pub fn run(self, path: Path<'_>) -> Result<TcpReport> {
        let pairs = connect_all(self.flows, path)?;
        let counters: Vec<AtomicU64> = pairs.iter().map(|_| AtomicU64::new(0)).collect();
        let total = || counters.iter().map(|c| c.load(Ordering::Relaxed)).sum::<u64>();
        let start = Instant::now();
        let (flows, window_bytes, window) = thread::scope(|scope| -> Result<_> {
            let (ends, receivers): (Vec<_>, Vec<_>) =
                pairs.into_iter().map(|(source, sender, receiver)| ((source, sender), receiver)).unzip();
            let receiving = scope.spawn(|| receive(receivers, &counters, self.until, start));
            let sending: Vec<_> = ends
                .into_iter()
                .map(|(source, sender)| (source, scope.spawn(move || send(sender, self.until, start))))
                .collect();
            let mut measured = None;
            if let Until::Time(time) = self.until {
                interrupt::sleep(self.warm_up.saturating_sub(start.elapsed()));
                let (from, before) = (Instant::now(), total());
                interrupt::sleep(time.saturating_sub(start.elapsed()));
                measured = Some((total() - before, from.elapsed()));
            }
            // The receiver's error comes first: when it fails, the senders fail as well.
            let received = receiving.join().expect("the receiver does not panic")?;
            let mut flows = Vec::with_capacity(sending.len());
            for ((source, sending), received) in sending.into_iter().zip(received) {
                let sent = sending.join().expect("the sender does not panic");
                let sent = sent.with_context(|| format!("sending from {source} to {}", path.destination))?;
                flows.push(TcpFlow { source, sent, received });
            }
            let (bytes, window) = measured.unwrap_or_else(|| (total(), start.elapsed()));
            Ok((flows, bytes, window))
        })?;
        for flow in &flows {
            ensure!(flow.sent == flow.received, "{} wrote {} bytes, {} arrived", flow.source, flow.sent, flow.received);
        }
        Ok(TcpReport { flows, window_bytes, window })
    }
}

/// Makes `flows` connections over `path`. Returns for each its source address, its sending end and its receiving end.
pub fn connect_all(flows: usize, path: Path<'_>) -> Result<Vec<(SocketAddr, TcpStream, TcpStream)>> {
    let listener = open(path.to, SocketAddr::new(path.destination, 0), SocketType::STREAM, None)?;
    listen(&listener, 1024)?;
    let listener = TcpListener::from(listener);
    let destination = listener.local_addr()?;
    let mut pairs = Vec::with_capacity(flows);
    for _ in 0..flows {
        let socket = open(path.from, SocketAddr::new(path.source, 0), SocketType::STREAM, None)?;
        connect(&socket, &destination).with_context(|| {
            format!("connecting {} in {} to {destination} in {}", path.source, path.from.name(), path.to.name())
        })?;
        let source = SocketAddr::try_from(getsockname(&socket)?)?;
        let (accepted, from) = listener.accept().with_context(|| format!("accepting {source}"))?;
        ensure!(from == source, "{source} connected, but {from} was accepted: something translates addresses");
        limit(&accepted, CALL_LIMIT)?;
        pairs.push((source, TcpStream::from(socket), accepted));
    }
    Ok(pairs)
}

/// Writes until it is time to stop, and then closes the connection for writing. Returns the bytes written.
pub(super) fn send(mut socket: TcpStream, until: Until, start: Instant) -> io::Result<u64> {
    let block = [0x5a; 16 << 10];
    let mut sent = 0_u64;
    loop {
        let length = match until {
            Until::Time(time) if start.elapsed() >= time || interrupt::requested() => 0,
            Until::Time(_) => block.len(),
            Until::Bytes(all) => usize::try_from(all - sent).map_or(block.len(), |left| left.min(block.len())),
        };
        if length == 0 {
            break;
        }
        match socket.write(&block[..length]) {
            Ok(written) => sent += written as u64,
            // The connection is stuck for that long. This is no error by itself: the loop ends in time.
            Err(e) if timed_out(&e) && matches!(until, Until::Time(_)) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    socket.shutdown(std::net::Shutdown::Write)?;
    // Closing the socket here would reset the connection if the other end wrote. It does not write, so no wait is
    // needed.
    Ok(sent)
}

/// Reads from every connection until its end. Returns the bytes read from each.
fn receive(sockets: Vec<TcpStream>, counters: &[AtomicU64], until: Until, start: Instant) -> Result<Vec<u64>> {
    let mut block = vec![0; 64 << 10];
    let mut open: Vec<(TcpStream, &AtomicU64)> = sockets.into_iter().zip(counters).collect();
    for (socket, _) in &open {
        socket.set_nonblocking(true)?;
    }
    let limit = match until {
        Until::Time(time) => time + DRAIN,
        Until::Bytes(_) => Duration::ZERO,
    };
    let mut last = Instant::now();
    while !open.is_empty() {
        thread::sleep(LOOK);
        let mut still = Vec::with_capacity(open.len());
        for (mut socket, counter) in open {
            let before = counter.load(Ordering::Relaxed);
            let ended = take(&mut socket, &mut block, counter)
                .with_context(|| format!("receiving, after {} bytes", counter.load(Ordering::Relaxed)))?;
            if ended || counter.load(Ordering::Relaxed) > before {
                last = Instant::now();
            }
            if !ended {
                still.push((socket, counter));
            }
        }
        open = still;
        ensure!(
            last.elapsed() < CALL_LIMIT || start.elapsed() < limit,
            "{} of {} connections did not end, and nothing came on them for {} s; received: {counters:?} bytes",
            open.len(),
            counters.len(),
            CALL_LIMIT.as_secs()
        );
    }
    Ok(counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect())
}

/// Reads what has arrived and adds it to `counter`. Returns whether the stream has ended.
pub(super) fn take(socket: &mut TcpStream, block: &mut [u8], counter: &AtomicU64) -> io::Result<bool> {
    loop {
        match socket.read(block) {
            Ok(0) => return Ok(true),
            Ok(length) => _ = counter.fetch_add(length as u64, Ordering::Relaxed),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        }
    }
}
