//! Generates traffic between two namespaces: TCP, QUIC, UDP and ping. It is counted at both ends and bounded in time.
//!
//! A socket belongs to the namespace of the thread that made it. Any other thread may use it afterwards.

mod icmp;
mod order;
mod quic;
mod rtp;
mod short;
mod stream;
mod tcp;
#[cfg(test)]
mod tests;
mod timetable;
mod udp;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, bind, socket_with};

use crate::netns::Netns;

pub use icmp::{PingReport, ping, wait_for_reply};
pub use order::Order;
pub use quic::{CongestionControl, QuicLoad, QuicReport};
pub use rtp::{Delays, RtpLoad, RtpReport};
pub use short::ShortLoad;
pub use stream::{Outage, Stream, StreamReport};
pub use tcp::{LOOK, TcpFlow, TcpLoad, TcpReport, Until, connect_all};
pub use timetable::{TimedFlow, Timetable};
pub use udp::{UdpFlow, UdpLoad, UdpReport};

/// Longest time of a single socket call.
const CALL_LIMIT: Duration = Duration::from_secs(20);
/// How far behind its rate a sender may be and still catch up. After a longer delay on a busy machine, the burst that
/// catches up would be more than queues hold.
const CATCH_UP: Duration = Duration::from_millis(30);

/// One direction of traffic between two namespaces.
#[derive(Clone, Copy, Debug)]
pub struct Path<'a> {
    /// The sending namespace.
    pub from: &'a Netns,
    pub source: IpAddr,
    /// The receiving namespace.
    pub to: &'a Netns,
    pub destination: IpAddr,
}

impl Path<'_> {
    /// The path in the other direction.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { from: self.to, source: self.destination, to: self.from, destination: self.source }
    }
}

/// The rate of `bytes` in `time`, 10^6 bits a second.
pub fn megabits(bytes: u64, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 bytes")]
    let bits = bytes as f64 * 8.0;
    bits / time.as_secs_f64() / 1e6
}

/// Makes a socket in `ns` and binds it to `address`. Port 0 means any port. Calls on it time out after [`CALL_LIMIT`].
fn open(ns: &Netns, address: SocketAddr, kind: SocketType, protocol: Option<Protocol>) -> Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    ns.run(|| -> io::Result<OwnedFd> {
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?;
        limit(&socket, CALL_LIMIT)?;
        bind(&socket, &address)?;
        Ok(socket)
    })
    .with_context(|| format!("binding a socket to {address} in {}", ns.name()))
}

/// Makes every later call on `socket` time out after `time`, `connect` too.
fn limit(socket: impl AsFd, time: Duration) -> io::Result<()> {
    set_socket_timeout(&socket, Timeout::Recv, Some(time))?;
    set_socket_timeout(&socket, Timeout::Send, Some(time))?;
    Ok(())
}

/// Whether the error means that the call timed out.
fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
