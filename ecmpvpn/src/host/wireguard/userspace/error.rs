//! Errors of the userspace backend.

use std::io;
use std::net::IpAddr;

use gotatun::device::Error as DeviceError;

use crate::config::InterfaceName;

/// The largest tunnel MTU, bytes: gotatun's packet buffers have 4,096 bytes, and WireGuard adds 32.
pub const MAX_MTU: u32 = 4096 - 32;

/// Why a device could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum UserspaceError {
    /// The kernel has no TUN devices, or refuses access.
    #[error("creating {name}: cannot open /dev/net/tun: load the tun module, and run as root with access to that file")]
    NoTun { name: InterfaceName, source: io::Error },
    /// A device with this name exists already.
    #[error("creating {name}: an interface of that name exists already: remove it or choose another name")]
    NameTaken { name: InterfaceName },
    #[error("creating TUN device {name}")]
    Create { name: InterfaceName, source: io::Error },
    /// The MTU is more than gotatun can carry.
    #[error(
        "starting tunnel {name}: an MTU of {mtu} is above {MAX_MTU}, the most that the userspace backend carries: \
         lower `steering.mtu`, or use the kernel backend"
    )]
    Mtu {
        name: InterfaceName,
        /// The requested MTU, bytes.
        mtu: u32,
    },
    /// The socket cannot be bound to the UDP port or the local address.
    #[error("starting tunnel {name}: cannot listen on {address} port {port}: {}", bind_advice(source))]
    Bind { name: InterfaceName, address: IpAddr, port: u16, source: io::Error },
    #[error("starting tunnel {name}")]
    Start { name: InterfaceName, source: DeviceError },
}

fn bind_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another program has that port: stop it, or change `listen_port`",
        io::ErrorKind::AddrNotAvailable => "no interface here has that address: correct `local_endpoint`",
        _ => "the kernel refuses",
    }
}
