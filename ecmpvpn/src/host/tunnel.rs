//! Makes and changes tunnels and the steering device, with either backend.

use std::io;

use ipnet::IpNet;
use rtnetlink::{LinkMessageBuilder, LinkWireguard};

use super::alteration::Part;
use super::device::{self, New};
use super::error::{Conflict, During as _, HostError};
use super::journal::Journal;
use super::netlink::{Netlink, errno_of};
use super::record::LinkId;
use super::sysctl;
use super::wireguard::kernel;
use super::wireguard::userspace::{Userspace, UserspaceError};
use crate::config::InterfaceName;
use crate::plan::{Backend, SteeringDevice, Tunnel};

/// The kind of link that a backend makes, as `ip -d link` names it.
pub fn kind(backend: Backend) -> &'static str {
    match backend {
        Backend::Kernel => "wireguard",
        Backend::Userspace => "tun",
    }
}

/// Makes a tunnel and sets it up. Returns its interface index.
pub async fn create(
    netlink: &Netlink,
    journal: &mut Journal,
    userspace: Option<&mut Userspace>,
    alias: &str,
    tunnel: &Tunnel,
) -> Result<u32, HostError> {
    let name = tunnel.name.as_str();
    let index = match userspace {
        None => {
            sysctl::expect_wireguard(journal)?;
            let new = New { name, kind: kind(Backend::Kernel), alias };
            let message = LinkMessageBuilder::<LinkWireguard>::new(name).build();
            let index = new.create(netlink, journal, message).await?;
            kernel::configure(tunnel).during(|| format!("setting key, port and peer of {name}"))?;
            index
        }
        Some(userspace) => {
            let new = New { name, kind: kind(Backend::Userspace), alias };
            new.announce(journal)?;
            let started = userspace.start_tunnel(tunnel).await;
            started.map_err(|e| retracted(journal, &tunnel.name, e))?;
            new.adopt(netlink, journal).await?
        }
    };
    device::prepare(netlink, name, index, tunnel.mtu, &[IpNet::V4(tunnel.address)]).await?;
    set_up(netlink, tunnel, index).await?;
    Ok(index)
}

/// Changes `parts` of an existing tunnel to match `tunnel`.
pub async fn alter(userspace: Option<&mut Userspace>, tunnel: &Tunnel, parts: &[Part]) -> Result<(), HostError> {
    match userspace {
        None => match kernel::alter(tunnel, parts) {
            Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) => {
                Err(Conflict::PortInUse { port: tunnel.listen_port, tunnel: tunnel.name.clone() }.into())
            }
            altered => altered.during(|| format!("changing {}", tunnel.name)),
        },
        Some(userspace) => {
            let altered = userspace.alter(tunnel, parts).await;
            altered.map_err(|source| HostError::Userspace { tunnel: tunnel.name.clone(), source })
        }
    }
}

/// Makes the steering device and sets it up: a WireGuard device without peers, or a TUN device whose packets are
/// discarded. Without a program attached it drops everything.
pub async fn create_steering(
    netlink: &Netlink,
    journal: &mut Journal,
    userspace: Option<&mut Userspace>,
    alias: &str,
    steering: &SteeringDevice,
) -> Result<LinkId, HostError> {
    let name = steering.name.as_str();
    let (new, index) = match userspace {
        None => {
            sysctl::expect_wireguard(journal)?;
            let new = New { name, kind: kind(Backend::Kernel), alias };
            let message = LinkMessageBuilder::<LinkWireguard>::new(name).build();
            (new, new.create(netlink, journal, message).await?)
        }
        Some(userspace) => {
            let new = New { name, kind: kind(Backend::Userspace), alias };
            new.announce(journal)?;
            let made = userspace.create_steering(&steering.name);
            made.map_err(|e| retracted(journal, &steering.name, e))?;
            (new, new.adopt(netlink, journal).await?)
        }
    };
    device::prepare(netlink, name, index, steering.mtu, &steering.addresses).await?;
    netlink.set_up(index).await.during(|| format!("setting {name} up"))?;
    Ok(new.id(index))
}

/// Removes the record of a device that was not made: a device with this name is not made by ecmpvpn.
fn retracted(journal: &mut Journal, name: &InterfaceName, source: UserspaceError) -> HostError {
    match journal.retract() {
        Ok(()) => HostError::Userspace { tunnel: name.clone(), source },
        Err(e) => e.into(),
    }
}

/// Restarts a tunnel of the kernel backend: sets its key, port and peer again, to start a new handshake. With `whole`
/// the interface is down meanwhile, and so gets a new socket. `alias`: the alias of this site's links.
pub async fn restart(tunnel: &Tunnel, alias: &str, whole: bool) -> Result<(), HostError> {
    let name = tunnel.name.as_str();
    let netlink = Netlink::open()?;
    let link = netlink.link(name).await.during(|| format!("looking {name} up"))?;
    let link = link.filter(|link| link.alias.as_deref() == Some(alias)).ok_or_else(|| unplanned(&tunnel.name))?;
    if whole {
        netlink.set_down(link.ifindex).await.during(|| format!("setting {name} down"))?;
    }
    let configured = kernel::configure(tunnel).during(|| format!("setting key, port and peer of {name}"));
    // Even after an error the interface must not stay down.
    if whole {
        set_up(&netlink, tunnel, link.ifindex).await?;
    }
    configured
}

/// Gives an existing tunnel the keys of `tunnel`. WireGuard forgets its sessions, and the next packet starts a
/// handshake.
pub async fn rekey(userspace: Option<&mut Userspace>, tunnel: &Tunnel) -> Result<(), HostError> {
    alter(userspace, tunnel, &[Part::Key, Part::Peer]).await
}

async fn set_up(netlink: &Netlink, tunnel: &Tunnel, index: u32) -> Result<(), HostError> {
    match netlink.set_up(index).await {
        // The kernel's WireGuard binds its sockets when the device is set up.
        Err(e) if errno_of(&e) == Some(libc::EADDRINUSE) => {
            Err(Conflict::PortInUse { port: tunnel.listen_port, tunnel: tunnel.name.clone() }.into())
        }
        other => other.during(|| format!("setting {} up", tunnel.name)),
    }
}

/// The error for a device that the plan does not name, or that does not exist.
pub fn unplanned(name: &InterfaceName) -> HostError {
    HostError::Step { operation: format!("looking {name} up"), source: io::Error::from_raw_os_error(libc::ENODEV) }
}
