//! One bulk QUIC flow (quinn). Loss detection is as RFC 9002 recommends it: a packet counts as lost when three later ones
//! of its path have been acknowledged, or after 9/8 of a round trip.
//!
//! Segmentation offload is off: each packet is a datagram of its own, as on a LAN's cable. The MTU is discovered as by
//! any QUIC client.

mod identity;

use std::future::Future;
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::{ClientConfig, ConnectionStats, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, TransportConfig};
use rustix::net::SocketType;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use tokio::time::timeout;

use super::{Path, megabits, open};
use crate::interrupt;

/// Most bytes on the way or waiting to be acknowledged. More than fast links with full queues hold.
const WINDOW: u32 = 8 << 20;
/// Socket buffers, bytes.
const BUFFER: usize = 8 << 20;
/// How long the data that is still on the way may take to arrive after the sender's end.
const DRAIN: Duration = Duration::from_secs(20);
/// The name of the server in TLS. It is not verified: its key is known.
const SERVER: &str = "far";

/// The sender's congestion control.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CongestionControl {
    /// RFC 9438.
    #[default]
    Cubic,
    /// quinn's experimental implementation of BBR, version 1.
    Bbr,
    /// RFC 9002, section 7.
    NewReno,
}

impl CongestionControl {
    fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Cubic => Arc::new(CubicConfig::default()),
            Self::Bbr => Arc::new(BbrConfig::default()),
            Self::NewReno => Arc::new(NewRenoConfig::default()),
        }
    }
}

/// Describes the flow. Times are from the start of the load.
#[derive(Clone, Debug)]
pub struct QuicLoad {
    pub congestion: CongestionControl,
    /// When the client connects.
    pub begin: Duration,
    /// When the client stops sending.
    pub end: Duration,
    /// The goodput counts the bytes that are received in this window.
    pub window: Range<Duration>,
}

/// The result of the flow.
#[derive(Clone, Copy, Debug)]
pub struct QuicReport {
    /// Address and port of the client.
    pub source: SocketAddr,
    /// Bytes written to the stream. All of them were read at the other end.
    pub sent: u64,
    /// Bytes that were read in `window`.
    pub window_bytes: u64,
    /// The time in which the goodput was measured.
    pub window: Duration,
    /// Packets sent by the client.
    pub packets: u64,
    /// Packets that the client took for lost.
    pub lost: u64,
    /// How often the client's congestion control reacted.
    pub congestion_events: u64,
    /// UDP payload of the largest packets at the end, bytes.
    pub mtu: u16,
}

impl QuicReport {
    /// Goodput at the receiver, 10^6 bits a second.
    pub fn goodput(&self) -> f64 {
        megabits(self.window_bytes, self.window)
    }
}

/// What the client knows at its end.
struct Sent {
    bytes: u64,
    stats: ConnectionStats,
}

impl QuicLoad {
    /// Sends the flow over `path`.
    ///
    /// # Errors
    /// The connection cannot be made or breaks, or a byte that was written was not read.
    pub fn run(&self, path: Path<'_>) -> Result<QuicReport> {
        let sockets = [(path.from, path.source), (path.to, path.destination)].map(|(ns, address)| {
            let socket = open(ns, SocketAddr::new(address, 0), SocketType::DGRAM, None)?;
            set_socket_recv_buffer_size_force(&socket, BUFFER)?;
            set_socket_send_buffer_size_force(&socket, BUFFER)?;
            anyhow::Ok(UdpSocket::from(socket))
        });
        let [near, far] = sockets;
        let (near, far) = (near?, far?);
        let (source, destination) = (near.local_addr()?, far.local_addr()?);
        let (client, server) = self.configs()?;
        let total = AtomicU64::new(0);
        let limit = self.end + DRAIN;
        let start = Instant::now();
        let (sent, received, measured) = thread::scope(|scope| -> Result<_> {
            let receiving = scope.spawn(|| block_on(limit, receive(far, server, &total)));
            let sending = scope.spawn(|| block_on(limit, self.send(near, client, destination, start)));
            interrupt::sleep(self.window.start.saturating_sub(start.elapsed()));
            let (from, before) = (Instant::now(), total.load(Ordering::Relaxed));
            interrupt::sleep(self.window.end.saturating_sub(start.elapsed()));
            let measured = (total.load(Ordering::Relaxed) - before, from.elapsed());
            let sent = sending.join().expect("the client does not panic");
            let received = receiving.join().expect("the server does not panic");
            let sent = sent.with_context(|| format!("sending by QUIC from {source} to {destination}"))?;
            Ok((sent, received.with_context(|| format!("receiving by QUIC from {source}"))?, measured))
        })?;
        ensure!(sent.bytes == received, "{source} wrote {} bytes, {received} arrived", sent.bytes);
        let at_end = sent.stats.path;
        Ok(QuicReport {
            source,
            sent: sent.bytes,
            window_bytes: measured.0,
            window: measured.1,
            packets: at_end.sent_packets,
            lost: at_end.lost_packets,
            congestion_events: at_end.congestion_events,
            mtu: at_end.current_mtu,
        })
    }

    fn configs(&self) -> Result<(ClientConfig, ServerConfig)> {
        let (client, server) = identity::new()?;
        let mut transport = TransportConfig::default();
        transport
            .congestion_controller_factory(self.congestion.factory())
            .enable_segmentation_offload(false)
            .stream_receive_window(WINDOW.into())
            .send_window(WINDOW.into());
        let transport = Arc::new(transport);
        let mut client = ClientConfig::new(Arc::new(client));
        client.transport_config(Arc::clone(&transport));
        let mut server = ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport);
        Ok((client, server))
    }

    /// Connects, and sends as much as it can until its end.
    async fn send(
        &self,
        socket: UdpSocket,
        config: ClientConfig,
        destination: SocketAddr,
        start: Instant,
    ) -> Result<Sent> {
        let end = tokio::time::Instant::from_std(start + self.end);
        let endpoint = Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))?;
        tokio::time::sleep_until((start + self.begin).into()).await;
        let connection = endpoint.connect_with(config, destination, SERVER)?.await.context("connecting")?;
        let mut stream = connection.open_uni().await?;
        let block = [0x5a; 16 << 10];
        let mut bytes = 0;
        while !interrupt::requested() {
            // A write that does not end in time has written nothing.
            let Ok(written) = tokio::time::timeout_at(end, stream.write(&block)).await else { break };
            bytes += written? as u64;
        }
        stream.finish()?;
        // Resolves when everything has been acknowledged.
        let stopped = stream.stopped().await?;
        ensure!(stopped.is_none(), "the server stopped the stream with {stopped:?}");
        let stats = connection.stats();
        connection.close(0_u32.into(), b"");
        endpoint.wait_idle().await;
        Ok(Sent { bytes, stats })
    }
}

/// Accepts the connection and reads its stream to the end. Adds bytes to `total` as they arrive. Returns their number.
async fn receive(socket: UdpSocket, config: ServerConfig, total: &AtomicU64) -> Result<u64> {
    let endpoint = Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime))?;
    let connection = endpoint.accept().await.context("the endpoint was closed")?.await.context("accepting")?;
    let mut stream = connection.accept_uni().await?;
    let mut received = 0;
    while let Some(chunk) = stream.read_chunk(64 << 10, true).await? {
        received += chunk.bytes.len() as u64;
        total.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
    }
    // The client closes the connection once it knows that everything has arrived.
    connection.closed().await;
    Ok(received)
}

/// Runs `work` in this thread, for at most `limit`.
fn block_on<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { timeout(limit, work).await.context("it has not ended in time")? })
}
