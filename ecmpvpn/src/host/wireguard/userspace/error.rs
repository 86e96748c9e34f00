//! Why a tunnel of this process cannot be.

use std::io;
use std::net::IpAddr;

use gotatun::device::Error as DeviceError;

use crate::config::InterfaceName;

/// The largest tunnel MTU, bytes: gotatun's packet buffers have 4,096, and WireGuard adds 32.
pub const MAX_MTU: u32 = 4096 - 32;

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UserspaceError {
    /// The kernel has no TUN devices, or gives us none.
    #[error("creating {name}: cannot open /dev/net/tun: load the tun module, and run as root with access to that file")]
    NoTun {
        /// The interface to be.
        name: InterfaceName,
        /// What the kernel said.
        source: io::Error,
    },
    /// The name belongs to a device that we did not make.
    #[error("creating {name}: an interface of that name exists already: remove it or choose another name")]
    NameTaken {
        /// The interface to be.
        name: InterfaceName,
    },
    /// The kernel refused the device.
    #[error("creating TUN device {name}")]
    Create {
        /// The interface to be.
        name: InterfaceName,
        /// What the kernel said.
        source: io::Error,
    },
    /// The MTU is more than gotatun can carry.
    #[error(
        "starting tunnel {name}: an MTU of {mtu} is above {MAX_MTU}, the most that the userspace backend carries: \
         lower `steering.mtu`, or use the kernel backend"
    )]
    Mtu {
        /// The tunnel.
        name: InterfaceName,
        /// What was asked for, bytes.
        mtu: u32,
    },
    /// The UDP port or the local address is not to be had.
    #[error("starting tunnel {name}: cannot listen on {address} port {port}: {}", bind_advice(source))]
    Bind {
        /// The tunnel.
        name: InterfaceName,
        /// The local endpoint.
        address: IpAddr,
        /// The listen port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// gotatun could not start.
    #[error("starting tunnel {name}")]
    Start {
        /// The tunnel.
        name: InterfaceName,
        /// What gotatun said.
        source: DeviceError,
    },
}

fn bind_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another program has that port: stop it, or change `listen_port`",
        io::ErrorKind::AddrNotAvailable => "no interface here has that address: correct `local_endpoint`",
        _ => "the kernel refuses",
    }
}
