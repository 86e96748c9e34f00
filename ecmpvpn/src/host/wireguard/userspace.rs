//! WireGuard in this process: the library gotatun on TUN devices.
//!
//! A TUN device exists as long as its descriptor, so the tunnels end with the process, even if it is killed. This code
//! only makes the devices. Addresses, MTU, alias and state are set by netlink, as for any other link.

mod error;
mod tun;

use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// Requested buffer size of each tunnel's socket, bytes. The kernel may give less (`net.core.rmem_max`). A burst that
/// does not fit is lost, and the tunnel's counters do not show it.
const SOCKET_BUFFER: usize = 4 << 20;

struct Running {
    tunnel: Tunnel,
    device: Device<(BoundTo, Tun, Tun)>,
    tun: tun::Closed,
}

/// Number of tunnels that are being stopped.
static STOPPING: AtomicUsize = AtomicUsize::new(0);

/// Whether a tunnel is being stopped. The library then logs errors of its own tasks that end.
pub fn is_stopping() -> bool {
    STOPPING.load(Ordering::Relaxed) > 0
}

/// Counts in [`STOPPING`] while it exists.
struct Stopping;

impl Stopping {
    fn new() -> Self {
        STOPPING.fetch_add(1, Ordering::Relaxed);
        Self
    }
}

impl Drop for Stopping {
    fn drop(&mut self) {
        STOPPING.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Running {
    async fn stop(self) {
        let _stopping = Stopping::new();
        self.device.stop().await;
        if !self.tun.wait().await {
            let name = self.tunnel.name;
            tracing::warn!(
                "tunnel {name} was stopped, but its device is still there; it is removed when this process ends"
            );
        }
    }
}

fn peer_of(tunnel: &Tunnel) -> Peer {
    let mut peer = Peer::new(PublicKey::from(*tunnel.public_key.as_bytes())).with_endpoint(tunnel.remote_endpoint);
    for net in &tunnel.allowed_ips {
        // gotatun uses the network type of another crate, and does not re-export it.
        peer = peer.with_allowed_ip(net.to_string().parse().expect("both crates write networks as ADDRESS/LENGTH"));
    }
    peer.preshared_key = tunnel.preshared_key.as_ref().map(|key| *key.as_bytes());
    peer
}

/// Opens the socket of a suspended tunnel. Repeats for a second: the former socket may take a moment to close.
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

/// The tunnels and the steering device of this process. They end when this is dropped. [`Userspace::stop`] also waits
/// until they are gone.
#[derive(Default)]
pub struct Userspace {
    tunnels: Vec<Running>,
    steering: Vec<Steering>,
}

/// The steering device. A task reads its packets and drops them.
struct Steering {
    name: InterfaceName,
    task: JoinHandle<()>,
    tun: tun::Closed,
}

impl Userspace {
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a TUN device with the tunnel's name and starts WireGuard on it. The device is down, and has the default
    /// MTU and no address: the caller must set `tunnel.mtu`. The socket is bound to `tunnel.local_endpoint`, which must
    /// be usable (a tentative IPv6 address is not).
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

    /// Makes a TUN device that drops every packet that the steering program does not redirect. So nothing leaks while
    /// no program is attached. The device is down and has no address.
    pub fn create_steering(&mut self, name: &InterfaceName) -> Result<(), UserspaceError> {
        let tun = Tun::create(name, u16::MAX)?;
        let closed = tun.closed();
        // Read the packets and drop them: a full queue would keep their memory.
        let task = tokio::spawn(tun.discard());
        self.steering.push(Steering { name: name.clone(), task, tun: closed });
        Ok(())
    }

    /// How a running tunnel differs from `tunnel`. `None`: no tunnel with this name runs here.
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

    /// Changes `parts` of a running tunnel. The device stays. `Part::Port` also binds to a new `local_endpoint`.
    pub async fn alter(&mut self, tunnel: &Tunnel, parts: &[Part]) -> Result<(), UserspaceError> {
        let Some(running) = self.tunnels.iter_mut().find(|running| running.tunnel.name == tunnel.name) else {
            return Ok(());
        };
        let failed = |source| UserspaceError::Start { name: tunnel.name.clone(), source };
        let device = &running.device;
        // Each of these closes the socket and opens another one, but the former is not gone at once. So suspend the
        // device meanwhile.
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

    /// Stops one tunnel and waits until its device is gone from the host.
    pub async fn stop_tunnel(&mut self, name: &InterfaceName) {
        if let Some(at) = self.tunnels.iter().position(|running| running.tunnel.name == *name) {
            self.tunnels.remove(at).stop().await;
        }
    }

    /// Stops a tunnel, or the steering device, after somebody else deleted its device.
    pub async fn forget(&mut self, name: &InterfaceName) {
        self.stop_tunnel(name).await;
        if let Some(at) = self.steering.iter().position(|steering| steering.name == *name) {
            let steering = self.steering.remove(at);
            steering.task.abort();
            // The error is expected: the task was aborted, or had ended with its device.
            let _ = steering.task.await;
        }
    }

    /// The time since the last handshake of each tunnel; `None`: there was none yet.
    pub async fn last_handshakes(&self) -> Vec<(InterfaceName, Option<Duration>)> {
        let mut ages = Vec::with_capacity(self.tunnels.len());
        for tunnel in &self.tunnels {
            let peers = tunnel.device.peers().await;
            ages.push((tunnel.tunnel.name.clone(), peers.first().and_then(|peer| peer.stats.last_handshake)));
        }
        ages
    }

    /// Gives a tunnel a new socket, and forgets its session keys: the next packet starts a handshake. The device stays.
    pub async fn restart(&self, name: &InterfaceName) -> Result<(), UserspaceError> {
        let Some(tunnel) = self.tunnels.iter().find(|tunnel| tunnel.tunnel.name == *name) else { return Ok(()) };
        tunnel.device.suspend().await;
        resume(&tunnel.device, &tunnel.tunnel).await
    }

    /// Stops every tunnel and waits until the devices are gone from the host.
    pub async fn stop(self) {
        for running in self.tunnels {
            running.stop().await;
        }
        for steering in self.steering {
            steering.task.abort();
            // The error is expected: the task was aborted.
            let _ = steering.task.await;
            steering.tun.wait().await;
        }
    }
}

/// Binds a tunnel's socket to its local endpoint, so that outer packets have the source address that the port plan
/// assumes.
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
