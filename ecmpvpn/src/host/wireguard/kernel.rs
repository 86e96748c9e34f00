//! The kernel's WireGuard: sets and reads keys, port and peer of an existing device.
//!
//! Errors of wireguard-control never leave this file unchanged: the text of some has keys.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use wireguard_control::{
    AllowedIp, Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfig, PeerConfigBuilder, PeerInfo,
};

use crate::config::{PrivateKey, PublicKey};
use crate::fault;
use crate::host::alteration::Part;
use crate::plan::Tunnel;

/// The most allowed networks in one request. A request that does not fit into a netlink message is refused as a whole.
const ALLOWED_IPS_AT_ONCE: usize = 64;

/// A network's address and prefix length.
pub type Net = (IpAddr, u8);

/// Whether this kernel has WireGuard. The request loads the module, if there is one.
pub fn is_available() -> bool {
    // No device can have this name. The kernel looks up the netlink family first (ENOENT), then the device (ENODEV).
    let Ok(nobody) = "ecmpvpn:probe".parse::<InterfaceName>() else { return false };
    match Device::get(&nobody, Backend::Kernel) {
        Ok(_) => true,
        Err(e) => e.raw_os_error() == Some(libc::ENODEV),
    }
}

/// Sets key, port and peer of the device. While the device is down a port in use is not an error: setting it up fails
/// then.
///
/// Blocks for a few round trips to the kernel, in the calling thread's network namespace.
pub fn configure(tunnel: &Tunnel) -> io::Result<()> {
    let invalid_name = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let name: InterfaceName = tunnel.name.as_str().parse().map_err(invalid_name)?;
    let device = DeviceUpdate::new()
        .set_private_key(Key(*tunnel.private_key.as_bytes()))
        .set_listen_port(tunnel.listen_port)
        .replace_peers();
    apply(&device, &name)?;
    let public_key = Key(*tunnel.public_key.as_bytes());
    let mut peer = PeerConfigBuilder::new(&public_key).set_endpoint(tunnel.remote_endpoint);
    if let Some(key) = &tunnel.preshared_key {
        peer = peer.set_preshared_key(Key(*key.as_bytes()));
    }
    apply(&DeviceUpdate::new().add_peer(peer), &name)?;
    allow(&public_key, desired(tunnel), &name)
}

/// How a device differs from `tunnel`. If `previous` has the same endpoint, a different endpoint on the device has
/// roamed, and is not a difference.
pub fn differences(tunnel: &Tunnel, previous: Option<&Tunnel>) -> io::Result<Vec<Part>> {
    let name: InterfaceName = tunnel.name.as_str().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let device = Device::get(&name, Backend::Kernel).map_err(|e| without_key_text(&e))?;
    let mut parts = Vec::new();
    if device.private_key.as_ref().is_none_or(|key| key.0 != *tunnel.private_key.as_bytes()) {
        parts.push(Part::Key);
    }
    if device.listen_port != Some(tunnel.listen_port) {
        parts.push(Part::Port);
    }
    // One peer may be listed in several parts.
    let peers: Vec<&PeerConfig> = device.peers.iter().map(|peer| &peer.config).collect();
    let is_peer = |peer: &&PeerConfig| peer.public_key.0 == *tunnel.public_key.as_bytes();
    let Some(first) = peers.first().filter(|_| peers.iter().all(is_peer)) else {
        parts.push(Part::Peer);
        return Ok(parts);
    };
    let shared = first.preshared_key.as_ref().map(|key| key.0).filter(|key| *key != [0; 32]);
    if shared != tunnel.preshared_key.as_ref().map(|key| *key.as_bytes()) {
        parts.push(Part::PresharedKey);
    }
    let was_desired = previous.is_some_and(|previous| previous.remote_endpoint == tunnel.remote_endpoint);
    if first.endpoint != Some(tunnel.remote_endpoint) && !was_desired {
        parts.push(Part::Endpoint);
    }
    if device.peers.iter().flat_map(allowed).collect::<BTreeSet<_>>() != desired(tunnel) {
        parts.push(Part::AllowedIps);
    }
    Ok(parts)
}

/// Changes only `parts` of a device. Everything else works on without interruption.
pub fn alter(tunnel: &Tunnel, parts: &[Part]) -> io::Result<()> {
    let name: InterfaceName = tunnel.name.as_str().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    if parts.contains(&Part::Key) {
        apply(&DeviceUpdate::new().set_private_key(Key(*tunnel.private_key.as_bytes())), &name)?;
    }
    if parts.contains(&Part::Port) {
        apply(&DeviceUpdate::new().set_listen_port(tunnel.listen_port), &name)?;
    }
    if parts.contains(&Part::Peer) {
        // This also sets everything else of the new peer.
        return configure(tunnel);
    }
    let public_key = Key(*tunnel.public_key.as_bytes());
    if parts.contains(&Part::PresharedKey) {
        let key = tunnel.preshared_key.as_ref().map_or([0; 32], |key| *key.as_bytes());
        let peer = PeerConfigBuilder::new(&public_key).set_preshared_key(Key(key));
        apply(&DeviceUpdate::new().add_peer(peer), &name)?;
    }
    if parts.contains(&Part::Endpoint) {
        let peer = PeerConfigBuilder::new(&public_key).set_endpoint(tunnel.remote_endpoint);
        apply(&DeviceUpdate::new().add_peer(peer), &name)?;
    }
    if parts.contains(&Part::AllowedIps) {
        alter_allowed(tunnel, &name)?;
    }
    Ok(())
}

/// The networks that a peer may send from.
fn allowed(peer: &PeerInfo) -> impl Iterator<Item = Net> {
    peer.config.allowed_ips.iter().map(|net| (net.address, net.cidr))
}

/// The networks that `tunnel`'s peer must be allowed to send from.
fn desired(tunnel: &Tunnel) -> BTreeSet<Net> {
    tunnel.allowed_ips.iter().map(|net| (net.network(), net.prefix_len())).collect()
}

/// Adds missing networks and removes surplus ones. The others stay allowed at every moment. If the whole list were
/// replaced, packets between the removal of the old list and the addition of the new one would be lost (`set_peer()`,
/// drivers/net/wireguard/netlink.c). Before Linux 6.16 no request removes a single network from a peer. But a network
/// belongs to one peer only: so a temporary peer takes it, and is removed.
fn alter_allowed(tunnel: &Tunnel, name: &InterfaceName) -> io::Result<()> {
    let device = Device::get(name, Backend::Kernel).map_err(|e| without_key_text(&e))?;
    let now: BTreeSet<Net> = device.peers.iter().flat_map(allowed).collect();
    let desired = desired(tunnel);
    allow(&Key(*tunnel.public_key.as_bytes()), desired.difference(&now).copied(), name)?;
    if desired.is_superset(&now) {
        return Ok(());
    }
    let nobody = Key(*PrivateKey::generate().public_key().as_bytes());
    let taken = allow(&nobody, now.difference(&desired).copied(), name);
    apply(&DeviceUpdate::new().add_peer(PeerConfigBuilder::new(&nobody).remove()), name)?;
    taken
}

/// Allows a peer to send from `nets` too.
fn allow(peer: &Key, nets: impl IntoIterator<Item = Net>, name: &InterfaceName) -> io::Result<()> {
    let nets: Vec<AllowedIp> = nets.into_iter().map(|(address, cidr)| AllowedIp { address, cidr }).collect();
    for nets in nets.chunks(ALLOWED_IPS_AT_ONCE) {
        apply(&DeviceUpdate::new().add_peer(PeerConfigBuilder::new(peer).add_allowed_ips(nets)), name)?;
    }
    Ok(())
}

/// The state of a device's peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    pub public_key: PublicKey,
    /// Where packets to it are sent. Changes when the peer roams.
    pub endpoint: Option<SocketAddr>,
    /// The networks that it may send from: addresses and prefix lengths.
    pub allowed_ips: BTreeSet<Net>,
    /// Time since the last handshake; `None`: there was none.
    pub last_handshake: Option<Duration>,
}

/// Reads the peers of a device.
///
/// Blocks for a round trip to the kernel, in the calling thread's network namespace.
pub fn peers(name: &str) -> io::Result<Vec<PeerState>> {
    let name: InterfaceName = name.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let device = Device::get(&name, Backend::Kernel).map_err(|e| without_key_text(&e))?;
    let seen = |peer: &PeerInfo| PeerState {
        public_key: PublicKey::from_bytes(peer.config.public_key.0),
        endpoint: peer.config.endpoint,
        allowed_ips: allowed(peer).collect(),
        // If the clock was set back since, the handshake seems to be in the future.
        last_handshake: peer
            .stats
            .last_handshake_time
            .map(|last| SystemTime::now().duration_since(last).unwrap_or_default()),
    };
    Ok(device.peers.iter().map(seen).collect())
}

/// Time since the last handshake of a device's peer. `None`: there was none, or the device cannot be read.
///
/// Blocks for a round trip to the kernel, in the calling thread's network namespace.
pub fn last_handshake(name: &str) -> Option<Duration> {
    peers(name).ok()?.into_iter().filter_map(|peer| peer.last_handshake).min()
}

/// Time of the last handshake of a device's peer, by the wall clock as it was then. `None`: there was none, or the device
/// cannot be read.
///
/// Blocks for a round trip to the kernel, in the calling thread's network namespace.
pub fn last_handshake_at(name: &str) -> Option<SystemTime> {
    let name: InterfaceName = name.parse().ok()?;
    let device = Device::get(&name, Backend::Kernel).ok()?;
    device.peers.iter().filter_map(|peer| peer.stats.last_handshake_time).max()
}

fn apply(update: &DeviceUpdate, name: &InterfaceName) -> io::Result<()> {
    fault::point("WireGuard");
    update.clone().apply(name, Backend::Kernel).map_err(|e| without_key_text(&e))?;
    fault::point("WireGuard");
    Ok(())
}

fn without_key_text(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        // The text of the error may have keys.
        None => io::Error::new(error.kind(), "the request could not be built"),
    }
}
