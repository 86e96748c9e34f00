//! Tunnels and the steering device, with either backend.

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

/// The kind of link that a backend makes.
pub fn kind(backend: Backend) -> &'static str {
    match backend {
        Backend::Kernel => "wireguard",
        Backend::Userspace => "tun",
    }
}

/// Makes a tunnel and sets it up. Its index.
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

/// Changes a tunnel that is there in `parts`.
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

/// Makes the steering device and sets it up: a WireGuard device without peers, or a TUN device that nobody reads. With
/// no program attached it drops everything.
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

/// No device was made: what has the name now, if anything, is not ours.
fn retracted(journal: &mut Journal, name: &InterfaceName, source: UserspaceError) -> HostError {
    match journal.retract() {
        Ok(()) => HostError::Userspace { tunnel: name.clone(), source },
        Err(e) => e.into(),
    }
}

/// Starts a tunnel of the kernel's anew, `alias` being that of our links: sets its key and peer again, for a new
/// handshake; with `whole`, while the interface is down, so that it has a new socket as well.
pub async fn restart(tunnel: &Tunnel, alias: &str, whole: bool) -> Result<(), HostError> {
    let name = tunnel.name.as_str();
    let netlink = Netlink::open().during(|| "opening a netlink socket".to_owned())?;
    let link = netlink.link(name).await.during(|| format!("looking {name} up"))?;
    let link = link.filter(|link| link.alias.as_deref() == Some(alias)).ok_or_else(|| unplanned(&tunnel.name))?;
    if whole {
        netlink.set_down(link.ifindex).await.during(|| format!("setting {name} down"))?;
    }
    let configured = kernel::configure(tunnel).during(|| format!("setting key, port and peer of {name}"));
    // Whatever happened before, it must not stay down.
    if whole {
        set_up(&netlink, tunnel, link.ifindex).await?;
    }
    configured
}

/// Gives a tunnel that is there the keys of `tunnel`, and forgets its sessions; the next packet begins a handshake.
pub async fn rekey(userspace: Option<&mut Userspace>, tunnel: &Tunnel) -> Result<(), HostError> {
    alter(userspace, tunnel, &[Part::Key, Part::Peer]).await
}

async fn set_up(netlink: &Netlink, tunnel: &Tunnel, index: u32) -> Result<(), HostError> {
    match netlink.set_up(index).await {
        // The kernel's WireGuard binds its sockets now.
        Err(e) if errno_of(&e) == Some(libc::EADDRINUSE) => {
            Err(Conflict::PortInUse { port: tunnel.listen_port, tunnel: tunnel.name.clone() }.into())
        }
        other => other.during(|| format!("setting {} up", tunnel.name)),
    }
}

/// An error for a device that the plan does not name.
pub fn unplanned(name: &InterfaceName) -> HostError {
    HostError::Step { operation: format!("looking {name} up"), source: io::Error::from_raw_os_error(libc::ENODEV) }
}
