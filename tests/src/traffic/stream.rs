//! A steady UDP stream. Its datagrams have numbers and times, which show which flow was interrupted, when, and for how
//! long.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::net::SocketType;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use super::{CATCH_UP, Path, limit, open, timed_out};

/// Flow number and sequence number, big endian.
const HEADER: usize = 8;
/// UDP payload, bytes.
const PAYLOAD: usize = 100;
/// The receiver stops when everything has come, or when nothing has come for this long after the sender's end. A busy
/// emulated machine may deliver datagrams late, and these are not lost.
const SILENCE: Duration = Duration::from_secs(5);

/// A stream that is sent until [`Stream::stop`].
pub struct Stream {
    started: Instant,
    finished: Arc<AtomicBool>,
    all: Arc<AtomicUsize>,
    sender: JoinHandle<std::io::Result<Vec<Vec<Instant>>>>,
    sink: JoinHandle<std::io::Result<()>>,
    received: Arc<Mutex<Vec<Vec<bool>>>>,
}

/// The datagrams of a flow, by number.
#[derive(Clone, Debug)]
struct Flow {
    sent: Vec<Instant>,
    received: Vec<bool>,
}

/// Consecutive datagrams of one flow that were lost.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// Number of the flow.
    pub flow: usize,
    /// When the first lost datagram was sent.
    pub from: Instant,
    /// When the last lost datagram was sent.
    pub last: Instant,
    /// When the next datagram that arrived was sent. The end of the stream if none arrived.
    pub to: Instant,
    /// Number of lost datagrams.
    pub lost: usize,
}

/// The result of a stream.
#[derive(Clone, Debug)]
pub struct StreamReport {
    flows: Vec<Flow>,
}

impl Stream {
    /// Starts `flows` flows over `path`. They send in turn, `rate` datagrams a second in total.
    pub fn start(path: Path<'_>, flows: usize, rate: u32) -> Result<Self> {
        let sink = open(path.to, SocketAddr::new(path.destination, 0), SocketType::DGRAM, None)?;
        set_socket_recv_buffer_size_force(&sink, 8 << 20)?;
        let sink = UdpSocket::from(sink);
        limit(&sink, Duration::from_millis(50))?;
        let destination = sink.local_addr()?;
        let mut senders = Vec::with_capacity(flows);
        for _ in 0..flows {
            let socket = UdpSocket::from(open(path.from, SocketAddr::new(path.source, 0), SocketType::DGRAM, None)?);
            socket.connect(destination).with_context(|| format!("connecting {} to {destination}", path.source))?;
            senders.push(socket);
        }
        let finished = Arc::new(AtomicBool::new(false));
        let all = Arc::new(AtomicUsize::new(usize::MAX));
        let received = Arc::new(Mutex::new(vec![Vec::new(); flows]));
        let sending = {
            let finished = Arc::clone(&finished);
            move || send(&senders, rate, &finished)
        };
        let receiving = {
            let (all, received) = (Arc::clone(&all), Arc::clone(&received));
            move || receive(&sink, &all, &received)
        };
        let sink = thread::spawn(receiving);
        let started = Instant::now();
        Ok(Self { started, finished, all, sender: thread::spawn(sending), sink, received })
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    /// Ends the stream.
    ///
    /// # Errors
    /// Sending or receiving failed, or no datagram of a flow arrived.
    pub fn stop(self) -> Result<StreamReport> {
        self.finished.store(true, Ordering::Release);
        let sent = self.sender.join().expect("the sender does not panic").context("sending the stream");
        self.all.store(sent.as_ref().map_or(0, |sent| sent.iter().map(Vec::len).sum()), Ordering::Release);
        self.sink.join().expect("the receiver does not panic").context("receiving the stream")?;
        let mut received = self.received.lock().expect("nobody panicked");
        let sent = sent?;
        let flow = |(sent, received): (Vec<Instant>, &mut Vec<bool>)| {
            let mut received = std::mem::take(received);
            received.resize(sent.len(), false);
            Flow { sent, received }
        };
        let flows: Vec<Flow> = sent.into_iter().zip(received.iter_mut()).map(flow).collect();
        ensure!(flows.iter().all(|flow| flow.received.contains(&true)), "a flow never arrived");
        Ok(StreamReport { flows })
    }
}

impl StreamReport {
    pub fn sent(&self) -> usize {
        self.flows.iter().map(|flow| flow.sent.len()).sum()
    }

    /// Datagrams that did not arrive.
    pub fn lost(&self) -> usize {
        self.flows.iter().flat_map(|flow| &flow.received).filter(|came| !**came).count()
    }

    /// All interruptions, ordered by flow and time.
    pub fn outages(&self) -> Vec<Outage> {
        let mut outages = Vec::new();
        for (number, flow) in self.flows.iter().enumerate() {
            let mut at = 0;
            while let Some(first) = flow.received.iter().skip(at).position(|came| !came).map(|ahead| at + ahead) {
                let lost = flow.received[first..].iter().take_while(|came| !**came).count();
                at = first + lost;
                let end = flow.sent[flow.sent.len() - 1];
                outages.push(Outage {
                    flow: number,
                    from: flow.sent[first],
                    last: flow.sent[at - 1],
                    to: *flow.sent.get(at).unwrap_or(&end),
                    lost,
                });
            }
        }
        outages
    }
}

fn send(senders: &[UdpSocket], rate: u32, finished: &AtomicBool) -> std::io::Result<Vec<Vec<Instant>>> {
    let gap = Duration::from_secs(1) / rate;
    let mut sent = vec![Vec::new(); senders.len()];
    let mut due = Instant::now();
    let mut datagram = [0x5a; PAYLOAD];
    while !finished.load(Ordering::Acquire) {
        for (number, (socket, sent)) in (0_u32..).zip(senders.iter().zip(&mut sent)) {
            datagram[..4].copy_from_slice(&number.to_be_bytes());
            datagram[4..HEADER].copy_from_slice(&u32::try_from(sent.len()).unwrap_or(u32::MAX).to_be_bytes());
            // A sleep may take too long. The sender then sends faster until it has caught up.
            let now = Instant::now();
            thread::sleep(due.saturating_duration_since(now));
            due = due.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + gap;
            sent.push(Instant::now());
            socket.send(&datagram)?;
        }
    }
    Ok(sent)
}

/// Records the datagrams that arrive, until `all` of them have arrived or [`SILENCE`] has passed.
fn receive(socket: &UdpSocket, all: &AtomicUsize, received: &Mutex<Vec<Vec<bool>>>) -> std::io::Result<()> {
    let mut received = received.lock().expect("nobody panicked");
    let mut came = 0;
    let mut buffer = [0; PAYLOAD + 1];
    let mut quiet_since = Instant::now();
    loop {
        match socket.recv(&mut buffer) {
            Ok(_) => {
                let word = |at: usize| u32::from_be_bytes(buffer[at..at + 4].try_into().expect("four bytes")) as usize;
                if let Some(flow) = received.get_mut(word(0)) {
                    let number = word(4);
                    flow.resize(flow.len().max(number + 1), false);
                    came += usize::from(!flow[number]);
                    flow[number] = true;
                }
                quiet_since = Instant::now();
            }
            Err(e) if timed_out(&e) => {
                let all = all.load(Ordering::Acquire);
                if came >= all || all != usize::MAX && quiet_since.elapsed() >= SILENCE {
                    return Ok(());
                }
            }
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_from_the_first_lost_to_the_next_that_came() {
        let start = Instant::now();
        let sent: Vec<Instant> = (0..8).map(|i| start + Duration::from_millis(10 * i)).collect();
        let flow = Flow { sent, received: [1, 1, 0, 0, 1, 1, 1, 0].map(|came| came == 1).to_vec() };
        let report = StreamReport { flows: vec![flow] };
        let found: Vec<_> = report.outages().iter().map(|o| ((o.from - start), (o.to - start), o.lost)).collect();
        let ms = Duration::from_millis;
        assert_eq!(found, [(ms(20), ms(40), 2), (ms(70), ms(70), 1)]);
        assert_eq!((report.sent(), report.lost()), (8, 3));
    }
}
