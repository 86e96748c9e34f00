//! WireGuard in this process, by the gotatun library on TUN devices.
//!
//! A TUN device lives as long as its descriptor, so the tunnels go with the process even if it is killed. Only the
//! devices are made here: addresses, MTU, alias and state are set by netlink like any other link's.

mod error;
mod tun;

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use gotatun::device::{Device, DeviceBuilder, Error as DeviceError, Peer};
use gotatun::udp::socket::{UdpSocket, UdpSocketFactory};
use gotatun::udp::{UdpTransportFactory, UdpTransportFactoryParams};
use gotatun::x25519::{PublicKey, StaticSecret};
use tokio::task::JoinHandle;

use crate::config::InterfaceName;
use crate::host::alteration::Part;
use crate::plan::Tunnel;

pub use error::{MAX_MTU, UserspaceError};
use tun::Tun;

/// Asked of the kernel for each tunnel's socket, bytes; it may give less (`net.core.rmem_max`). A burst that does not
/// fit is lost without a trace in the tunnel's counters.
const SOCKET_BUFFER: usize = 4 << 20;

struct Running {
    tunnel: Tunnel,
    device: Device<(BoundTo, Tun, Tun)>,
    tun: tun::Closed,
}

impl Running {
    async fn stop(self) {
        self.device.stop().await;
        if !self.tun.wait().await {
            let name = self.tunnel.name;
            tracing::warn!("tunnel {name} is still held after it was stopped; it goes when this process ends");
        }
    }
}

fn peer_of(tunnel: &Tunnel) -> Peer {
    let mut peer = Peer::new(PublicKey::from(*tunnel.public_key.as_bytes())).with_endpoint(tunnel.remote_endpoint);
    for net in &tunnel.allowed_ips {
        // gotatun takes the networks of another crate, which it does not re-export.
        peer = peer.with_allowed_ip(net.to_string().parse().expect("both crates write networks as ADDRESS/LENGTH"));
    }
    peer.preshared_key = tunnel.preshared_key.as_ref().map(|key| *key.as_bytes());
    peer
}

/// Opens a suspended tunnel's socket. The former one may take a moment to go.
async fn resume(device: &Device<(BoundTo, Tun, Tun)>, tunnel: &Tunnel) -> Result<(), UserspaceError> {
    let mut tries = 0;
    loop {
        let (name, address, port) = (tunnel.name.clone(), tunnel.local_endpoint, tunnel.listen_port);
        match device.resume().await {
            Err(DeviceError::Bind(source, _)) if source.kind() == io::ErrorKind::AddrInUse && tries < 100 => {
                tries += 1;
                device.suspend().await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(DeviceError::Bind(source, _)) => return Err(UserspaceError::Bind { name, address, port, source }),
            resumed => return resumed.map_err(|source| UserspaceError::Start { name, source }),
        }
    }
}

/// The tunnels and the steering device of one process. They end when this is dropped; [`Userspace::stop`] also waits
/// until they are gone.
#[derive(Default)]
pub struct Userspace {
    tunnels: Vec<Running>,
    steering: Vec<Steering>,
}

/// A device that is read and whose packets are dropped.
struct Steering {
    name: InterfaceName,
    task: JoinHandle<()>,
    tun: tun::Closed,
}

impl Userspace {
    /// No devices yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a TUN device of the tunnel's name and starts WireGuard on it. The device is down, has the default MTU and
    /// no address; `tunnel.mtu` must be set on it. The socket is bound to `tunnel.local_endpoint`, which must be usable
    /// (an IPv6 address that is still tentative is not).
    pub async fn start_tunnel(&mut self, tunnel: &Tunnel) -> Result<(), UserspaceError> {
        let name = &tunnel.name;
        let mtu = match u16::try_from(tunnel.mtu) {
            Ok(mtu) if tunnel.mtu <= MAX_MTU => mtu,
            _ => return Err(UserspaceError::Mtu { name: name.clone(), mtu: tunnel.mtu }),
        };
        let tun = Tun::create(name, mtu)?;
        let closed = tun.closed();
        let device = DeviceBuilder::new()
            .with_udp(BoundTo { address: tunnel.local_endpoint })
            .with_ip(tun)
            .with_private_key(StaticSecret::from(*tunnel.private_key.as_bytes()))
            .with_listen_port(tunnel.listen_port)
            .with_peer(peer_of(tunnel))
            .build()
            .await
            .map_err(|e| match e {
                DeviceError::Bind(source, _) => UserspaceError::Bind {
                    name: name.clone(),
                    address: tunnel.local_endpoint,
                    port: tunnel.listen_port,
                    source,
                },
                source => UserspaceError::Start { name: name.clone(), source },
            })?;
        tracing::debug!("tunnel {name} runs in this process");
        self.tunnels.push(Running { tunnel: tunnel.clone(), device, tun: closed });
        Ok(())
    }

    /// Makes a TUN device that carries nothing: what the steering program does not redirect away is dropped, so that
    /// nothing leaks when no program is attached. The device is down and has no address.
    pub fn create_steering(&mut self, name: &InterfaceName) -> Result<(), UserspaceError> {
        let tun = Tun::create(name, u16::MAX)?;
        let closed = tun.closed();
        // Read and dropped, for a full queue would hold on to the packets' memory.
        let task = tokio::spawn(tun.discard());
        self.steering.push(Steering { name: name.clone(), task, tun: closed });
        Ok(())
    }

    /// In what a running tunnel differs from `tunnel`; `None`: there is none of its name.
    pub fn differences(&self, tunnel: &Tunnel) -> Option<Vec<Part>> {
        let now = &self.tunnels.iter().find(|running| running.tunnel.name == tunnel.name)?.tunnel;
        let differs = [
            (now.private_key != tunnel.private_key, Part::Key),
            (now.listen_port != tunnel.listen_port || now.local_endpoint != tunnel.local_endpoint, Part::Port),
            (now.public_key != tunnel.public_key, Part::Peer),
            (now.preshared_key != tunnel.preshared_key, Part::PresharedKey),
            (now.remote_endpoint != tunnel.remote_endpoint, Part::Endpoint),
            (now.allowed_ips != tunnel.allowed_ips, Part::AllowedIps),
        ];
        Some(differs.into_iter().filter_map(|(differs, part)| differs.then_some(part)).collect())
    }

    /// Changes a running tunnel; the device stays. A new `local_endpoint` is bound to with the port.
    pub async fn alter(&mut self, tunnel: &Tunnel, parts: &[Part]) -> Result<(), UserspaceError> {
        let Some(running) = self.tunnels.iter_mut().find(|running| running.tunnel.name == tunnel.name) else {
            return Ok(());
        };
        let failed = |source| UserspaceError::Start { name: tunnel.name.clone(), source };
        let device = &running.device;
        // Each of these would close the socket and open another one, where the former is not gone at once.
        let rebinds = parts.iter().any(|part| matches!(part, Part::Key | Part::Port | Part::Peer));
        if rebinds {
            device.suspend().await;
        }
        if parts.contains(&Part::Key) {
            let key = StaticSecret::from(*tunnel.private_key.as_bytes());
            device.set_private_key(key).await.map_err(failed)?;
        }
        if parts.contains(&Part::Port) {
            device.set_listen_port(tunnel.listen_port).await.map_err(failed)?;
        }
        let peer = peer_of(tunnel);
        if parts.contains(&Part::Peer) {
            device.clear_peers().await.map_err(failed)?;
            device.add_peer(peer).await.map_err(failed)?;
        } else if parts.iter().any(|part| matches!(part, Part::PresharedKey | Part::Endpoint | Part::AllowedIps)) {
            device.update_peer(peer).await.map_err(failed)?;
        }
        if rebinds {
            resume(device, tunnel).await?;
        }
        running.tunnel = tunnel.clone();
        Ok(())
    }

    /// Ends one tunnel and waits until its device is gone from the host.
    pub async fn stop_tunnel(&mut self, name: &InterfaceName) {
        if let Some(at) = self.tunnels.iter().position(|running| running.tunnel.name == *name) {
            self.tunnels.remove(at).stop().await;
        }
    }

    /// Ends a tunnel, or the steering device, whose device somebody else has deleted.
    pub async fn forget(&mut self, name: &InterfaceName) {
        self.stop_tunnel(name).await;
        if let Some(at) = self.steering.iter().position(|steering| steering.name == *name) {
            let steering = self.steering.remove(at);
            steering.task.abort();
            // Cancelled, as asked, or it had ended with its device.
            let _ = steering.task.await;
        }
    }

    /// Each tunnel's time since its last handshake; `None`: there was none yet.
    pub async fn last_handshakes(&self) -> Vec<(InterfaceName, Option<Duration>)> {
        let mut ages = Vec::with_capacity(self.tunnels.len());
        for tunnel in &self.tunnels {
            let peers = tunnel.device.peers().await;
            ages.push((tunnel.tunnel.name.clone(), peers.first().and_then(|peer| peer.stats.last_handshake)));
        }
        ages
    }

    /// Gives a tunnel a new socket, and forgets its keys: the next packet begins a handshake. Its device stays.
    pub async fn restart(&self, name: &InterfaceName) -> Result<(), UserspaceError> {
        let Some(tunnel) = self.tunnels.iter().find(|tunnel| tunnel.tunnel.name == *name) else { return Ok(()) };
        tunnel.device.suspend().await;
        resume(&tunnel.device, &tunnel.tunnel).await
    }

    /// Ends every tunnel and waits until the devices are gone from the host.
    pub async fn stop(self) {
        for running in self.tunnels {
            running.stop().await;
        }
        for steering in self.steering {
            steering.task.abort();
            // Cancelled, as asked.
            let _ = steering.task.await;
            steering.tun.wait().await;
        }
    }
}

/// Binds a tunnel's socket to its local endpoint, so that the outer packets leave from the address that the bond
/// member was planned for.
struct BoundTo {
    address: IpAddr,
}

impl UdpTransportFactory for BoundTo {
    type Send = UdpSocket;
    type Recv = UdpSocket;

    async fn bind(&mut self, params: &UdpTransportFactoryParams) -> io::Result<(UdpSocket, UdpSocket)> {
        let mut sockets =
            UdpSocketFactory { recv_buffer_size: Some(SOCKET_BUFFER), send_buffer_size: Some(SOCKET_BUFFER) };
        sockets.bind(&UdpTransportFactoryParams { addr: Some(self.address), ..params.clone() }).await
    }
}
