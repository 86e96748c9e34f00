//! The kernel's WireGuard: keys, port and peer of a device that exists.
//!
//! Errors are taken apart here: wireguard-control prints keys in some of its own.

use std::io;
use std::time::{Duration, SystemTime};

use wireguard_control::{AllowedIp, Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder};

use crate::plan::Tunnel;

/// Allowed networks in one request: one that does not fit into a netlink message is refused as a whole.
const ALLOWED_IPS_AT_ONCE: usize = 64;

/// Whether this kernel has WireGuard. Asking loads the module where there is one.
pub fn is_available() -> bool {
    // A device that cannot be there. The family is looked up first (ENOENT), then the device (ENODEV).
    let Ok(nobody) = "ecmpvpn:probe".parse::<InterfaceName>() else { return false };
    match Device::get(&nobody, Backend::Kernel) {
        Ok(_) => true,
        Err(e) => e.raw_os_error() == Some(libc::ENODEV),
    }
}

/// Gives the device its key, port and peer. The device is down: a port in use shows when it is set up.
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
    for nets in tunnel.allowed_ips.chunks(ALLOWED_IPS_AT_ONCE) {
        let allowed: Vec<AllowedIp> =
            nets.iter().map(|net| AllowedIp { address: net.network(), cidr: net.prefix_len() }).collect();
        let peer = PeerConfigBuilder::new(&public_key).add_allowed_ips(&allowed);
        apply(&DeviceUpdate::new().add_peer(peer), &name)?;
    }
    Ok(())
}

/// Time since the last handshake of a device's peer; `None`: there was none, or the device cannot be asked.
///
/// Blocks for a round trip to the kernel, in the calling thread's network namespace.
pub fn last_handshake(name: &str) -> Option<Duration> {
    let device = Device::get(&name.parse().ok()?, Backend::Kernel).ok()?;
    let last = device.peers.iter().filter_map(|peer| peer.stats.last_handshake_time).max()?;
    // A clock that was set back since makes the handshake seem to lie ahead.
    Some(SystemTime::now().duration_since(last).unwrap_or_default())
}

fn apply(update: &DeviceUpdate, name: &InterfaceName) -> io::Result<()> {
    update.clone().apply(name, Backend::Kernel).map_err(|e| match e.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        // Its text may hold keys.
        None => io::Error::new(e.kind(), "the request could not be built"),
    })
}
