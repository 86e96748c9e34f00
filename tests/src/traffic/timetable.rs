//! TCP flows that each have their own begin, end and addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::net::{SocketType, connect, getsockname, listen};

use super::tcp::{DRAIN, send, take};
use super::{CALL_LIMIT, Path, TcpFlow, TcpReport, Until, open};
use crate::interrupt;

/// One flow. It connects at its begin and sends as much as it can until its end.
#[derive(Clone, Copy, Debug)]
pub struct TimedFlow<'a> {
    /// The addresses of the flow. All flows of a timetable have the same two namespaces.
    pub path: Path<'a>,
    /// Time from the start of the timetable.
    pub begin: Duration,
    /// Time from the start of the timetable.
    pub end: Duration,
}

/// Describes the flows, and when the goodput is measured.
#[derive(Clone, Debug)]
pub struct Timetable<'a> {
    /// In any order.
    pub flows: Vec<TimedFlow<'a>>,
    /// The goodput counts the bytes that are received in this window. Times from the start of the timetable.
    pub window: Range<Duration>,
    /// How often the receiver reads what has arrived, as [`super::LOOK`].
    pub look: Duration,
}

/// A sender's address and the bytes that it wrote.
type Sent = (SocketAddr, u64);

impl Timetable<'_> {
    /// Sends the flows.
    ///
    /// # Errors
    /// A connection cannot be made, or a byte that was written was not read.
    pub fn run(&self) -> Result<TcpReport> {
        let to = self.flows.first().context("a timetable has flows")?.path;
        let any: IpAddr =
            if to.destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let listener = open(to.to, SocketAddr::new(any, 0), SocketType::STREAM, None)?;
        listen(&listener, 1024)?;
        let listener = TcpListener::from(listener);
        let port = listener.local_addr()?.port();
        // The sockets are made beforehand, because entering a namespace takes a thread.
        let socket =
            |flow: &TimedFlow<'_>| open(flow.path.from, SocketAddr::new(flow.path.source, 0), SocketType::STREAM, None);
        let sockets = self.flows.iter().map(socket).collect::<Result<Vec<_>>>()?;
        let (total, give_up) = (AtomicU64::new(0), AtomicBool::new(false));
        let start = Instant::now();
        let (sent, received, measured) = thread::scope(|scope| -> Result<_> {
            let receiving = scope.spawn(|| self.receive(&listener, &total, &give_up, start));
            let sending: Vec<_> = self
                .flows
                .iter()
                .zip(sockets)
                .map(|(flow, socket)| {
                    scope.spawn(move || -> Result<Sent> {
                        let destination = SocketAddr::new(flow.path.destination, port);
                        interrupt::sleep(flow.begin.saturating_sub(start.elapsed()));
                        connect(&socket, &destination)
                            .with_context(|| format!("connecting {} to {destination}", flow.path.source))?;
                        let source = SocketAddr::try_from(getsockname(&socket)?)?;
                        let sent = send(TcpStream::from(socket), Until::Time(flow.end), start);
                        Ok((source, sent.with_context(|| format!("sending from {source} to {destination}"))?))
                    })
                })
                .collect();
            interrupt::sleep(self.window.start.saturating_sub(start.elapsed()));
            let (from, before) = (Instant::now(), total.load(Ordering::Relaxed));
            interrupt::sleep(self.window.end.saturating_sub(start.elapsed()));
            let measured = (total.load(Ordering::Relaxed) - before, from.elapsed());
            let sent = sending.into_iter().map(|one| one.join().expect("a sender does not panic"));
            let sent: Vec<Result<Sent>> = sent.collect();
            give_up.store(sent.iter().any(Result::is_err), Ordering::Relaxed);
            // The receiver's error comes first: when it fails, the senders fail as well.
            let received = receiving.join().expect("the receiver does not panic")?;
            Ok((sent.into_iter().collect::<Result<Vec<_>>>()?, received, measured))
        })?;
        let flow = |(source, sent): &Sent| {
            let found = received.iter().find(|(from, _)| from == source);
            let received = found.with_context(|| format!("nothing came from {source}"))?.1;
            ensure!(*sent == received, "{source} wrote {sent} bytes, {received} arrived");
            Ok(TcpFlow { source: *source, sent: *sent, received })
        };
        let flows = sent.iter().map(flow).collect::<Result<Vec<_>>>()?;
        Ok(TcpReport { flows, window_bytes: measured.0, window: measured.1 })
    }

    /// Accepts every flow and reads until all have ended, or until `give_up` is set. Returns each flow's source and
    /// bytes. Adds bytes to `total` as they arrive.
    fn receive(
        &self,
        listener: &TcpListener,
        total: &AtomicU64,
        give_up: &AtomicBool,
        start: Instant,
    ) -> Result<Vec<Sent>> {
        listener.set_nonblocking(true)?;
        let limit = self.flows.iter().map(|flow| flow.end).max().unwrap_or_default() + DRAIN;
        let mut block = vec![0; 64 << 10];
        let (mut open, mut ended) = (Vec::<(TcpStream, SocketAddr, AtomicU64)>::new(), Vec::new());
        let (mut last, mut seen) = (Instant::now(), 0);
        while ended.len() < self.flows.len() && !give_up.load(Ordering::Relaxed) {
            thread::sleep(self.look);
            while let Some((socket, source)) = accepted(listener)? {
                socket.set_nonblocking(true)?;
                open.push((socket, source, AtomicU64::new(0)));
            }
            let mut still = Vec::with_capacity(open.len());
            for (mut socket, source, counter) in open {
                let before = counter.load(Ordering::Relaxed);
                let at_end = take(&mut socket, &mut block, &counter)
                    .with_context(|| format!("receiving from {source}, after {before} bytes"))?;
                let bytes = counter.load(Ordering::Relaxed);
                total.fetch_add(bytes - before, Ordering::Relaxed);
                if at_end {
                    ended.push((source, bytes));
                } else {
                    still.push((socket, source, counter));
                }
            }
            open = still;
            let now = total.load(Ordering::Relaxed) + ended.len() as u64;
            if now > seen {
                (last, seen) = (Instant::now(), now);
            }
            interrupt::check()?;
            ensure!(
                last.elapsed() < CALL_LIMIT || start.elapsed() < limit,
                "{} of {} flows have ended, {} are open, and nothing came for {} s",
                ended.len(),
                self.flows.len(),
                open.len(),
                CALL_LIMIT.as_secs()
            );
        }
        Ok(ended)
    }
}

/// Accepts the next connection, if one waits.
fn accepted(listener: &TcpListener) -> Result<Option<(TcpStream, SocketAddr)>> {
    match listener.accept() {
        Ok(pair) => Ok(Some(pair)),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e).context("accepting a flow"),
    }
}
