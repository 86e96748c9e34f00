//! Short TCP transfers, each on its own connection. Their begins are drawn beforehand, so that they do not depend on
//! how long earlier transfers take.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ecmpvpn_common::flow::mix;
use rustix::net::{SocketType, connect, getsockname, listen};

use super::{CALL_LIMIT, Path, limit, open};
use crate::interrupt;

/// Describes the transfers.
#[derive(Clone, Copy, Debug)]
pub struct ShortLoad {
    /// Number of transfers.
    pub count: usize,
    /// Bytes of each transfer.
    pub bytes: usize,
    /// Mean time between the begins of two transfers. The begins are a Poisson process.
    pub mean_gap: Duration,
    /// The same seed draws the same times.
    pub seed: u64,
}

impl ShortLoad {
    /// The begin of each transfer, from the start.
    fn begins(self) -> Vec<Duration> {
        let mut at = Duration::ZERO;
        let gap = |number: u64| {
            #[expect(clippy::cast_precision_loss, reason = "53 bits are kept")]
            let uniform = ((mix(self.seed.wrapping_add(number)) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
            self.mean_gap.mul_f64(-uniform.ln())
        };
        let next = |number: u64| {
            let begin = at;
            at += gap(number << 32);
            begin
        };
        (1..).take(self.count).map(next).collect()
    }

    /// Sends the transfers over `path`. Returns how long each took, from before its connection was made until its last
    /// byte was read, in the order of their begins.
    ///
    /// # Errors
    /// A connection cannot be made, or a byte did not arrive.
    pub fn run(self, path: Path<'_>) -> Result<Vec<Duration>> {
        let listener = open(path.to, SocketAddr::new(path.destination, 0), SocketType::STREAM, None)?;
        listen(&listener, 1024)?;
        let listener = TcpListener::from(listener);
        let destination = listener.local_addr()?;
        // The sockets are made beforehand, because entering a namespace takes a thread.
        let socket = |_| open(path.from, SocketAddr::new(path.source, 0), SocketType::STREAM, None);
        let sockets = (0..self.count).map(socket).collect::<Result<Vec<_>>>()?;
        let start = Instant::now();
        thread::scope(|scope| {
            let accepting = scope.spawn(|| self.accept(&listener));
            let mut sending = Vec::with_capacity(self.count);
            for (begin, socket) in self.begins().into_iter().zip(sockets) {
                interrupt::sleep(begin.saturating_sub(start.elapsed()));
                interrupt::check()?;
                sending.push(scope.spawn(move || self.send(socket, destination)));
            }
            let sent = sending.into_iter().map(|one| one.join().expect("a sender does not panic"));
            let sent = sent.collect::<Result<Vec<_>>>()?;
            let received = accepting.join().expect("the receiver does not panic")?;
            let took = |(source, since): (SocketAddr, Instant)| {
                let end = received.iter().find(|(from, _)| *from == source);
                let (_, end) = end.with_context(|| format!("nothing came from {source}"))?;
                Ok(end.duration_since(since))
            };
            sent.into_iter().map(took).collect()
        })
    }

    /// Makes one transfer. Returns its source, and when it began.
    fn send(self, socket: OwnedFd, destination: SocketAddr) -> Result<(SocketAddr, Instant)> {
        let since = Instant::now();
        connect(&socket, &destination).with_context(|| format!("connecting to {destination}"))?;
        let source = SocketAddr::try_from(getsockname(&socket)?)?;
        let mut stream = TcpStream::from(socket);
        let send = |stream: &mut TcpStream| {
            stream.write_all(&vec![0x5a; self.bytes])?;
            stream.shutdown(std::net::Shutdown::Write)?;
            // Waits until the receiver is done. If this end closed now, errors while the kernel sends the rest would
            // not be seen.
            stream.read_to_end(&mut Vec::new())
        };
        send(&mut stream).with_context(|| format!("sending from {source} to {destination}"))?;
        Ok((source, since))
    }

    /// Accepts and reads every transfer. Returns its source, and when its last byte was read.
    fn accept(self, listener: &TcpListener) -> Result<Vec<(SocketAddr, Instant)>> {
        thread::scope(|scope| {
            let mut receiving = Vec::with_capacity(self.count);
            for number in 0..self.count {
                let (stream, source) =
                    listener.accept().with_context(|| format!("accepting transfer {number} of {}", self.count))?;
                receiving.push(scope.spawn(move || {
                    let received = receive(stream).with_context(|| format!("receiving from {source}"))?;
                    ensure!(received.0 == self.bytes, "{} of {} bytes came from {source}", received.0, self.bytes);
                    Ok((source, received.1))
                }));
            }
            receiving.into_iter().map(|one| one.join().expect("a receiver does not panic")).collect()
        })
    }
}

/// Reads to the end. Returns the bytes read, and when the last one was read.
fn receive(mut stream: TcpStream) -> io::Result<(usize, Instant)> {
    limit(&stream, CALL_LIMIT)?;
    let mut block = vec![0; 64 << 10];
    let (mut received, mut last) = (0, Instant::now());
    loop {
        match stream.read(&mut block)? {
            0 => return Ok((received, last)),
            length => {
                received += length;
                last = Instant::now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_are_drawn_from_the_seed_with_the_mean_gap() {
        let load = ShortLoad { count: 2000, bytes: 1, mean_gap: Duration::from_millis(10), seed: 7 };
        let begins = load.begins();
        assert_eq!(begins, load.begins());
        assert_ne!(begins, ShortLoad { seed: 8, ..load }.begins());
        assert!(begins.is_sorted() && begins[0] == Duration::ZERO);
        assert!((18.0..22.0).contains(&begins[1999].as_secs_f64()), "{:?}", begins[1999]);
    }
}
