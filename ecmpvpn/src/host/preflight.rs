//! Checks everything that can be checked before the first change: privilege, kernel features, names, members, ports,
//! endpoints.

use std::fs::OpenOptions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};

use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::{LinkBond, LinkMessageBuilder};
use rustix::thread::{CapabilitySet, capabilities};

use super::alteration::Part;
use super::bpffs;
use super::change::Change;
use super::error::{Conflict, During as _, HostError, Lacks};
use super::netlink::{Netlink, errno_of};
use super::owned::Owned;
use super::survey::{Place, Survey};
use super::wireguard::kernel;
use crate::config::Bond;
use crate::plan::{Backend, Plan};

/// Name of the bond that [`probe_bonding`] asks for. The kernel does not make it.
const PROBE: &str = "ecmpvpn-probe";

/// Checks that `plan` can be carried out. Changes nothing.
///
/// # Errors
/// The first conflict or lack that was found.
pub async fn preflight(plan: &Plan) -> Result<(), HostError> {
    preflight_since(plan, Owned::default()).await.map(drop)
}

/// As [`preflight`], given what is `made` already. Returns the changes to make.
pub async fn preflight_since(plan: &Plan, made: Owned<'_>) -> Result<Vec<Change>, HostError> {
    require_privilege()?;
    match plan.backend {
        Backend::Kernel if !kernel::is_available() => return Err(Lacks::WireGuard.into()),
        Backend::Userspace => check_tun()?,
        Backend::Kernel => {}
    }
    let netlink = Netlink::open()?;
    let survey = Survey::take(&netlink).await?;
    let changes = survey.changes(plan, made)?;
    if changes.iter().any(|change| matches!(change, Change::CreateBond { .. })) {
        probe_bonding(&netlink).await?;
    }
    check_mtu(plan, &changes, &survey, &netlink).await?;
    for tunnel in &plan.tunnels {
        let place = survey.place_of(plan, tunnel.local_endpoint);
        if place != Place::Stays {
            let peer = plan.table.peers.get(tunnel.peer).map_or_else(String::new, |peer| peer.name.clone());
            let on_member = place == Place::OnMember;
            return Err(Conflict::EndpointNotHere { address: tunnel.local_endpoint, peer, on_member }.into());
        }
        let takes_port = changes.iter().any(|change| match change {
            Change::CreateTunnel { name, .. } => *name == tunnel.name,
            Change::Alter { name, alteration, .. } => *name == tunnel.name && alteration.parts.contains(&Part::Port),
            _ => false,
        });
        if takes_port && is_port_in_use(tunnel.listen_port) {
            return Err(Conflict::PortInUse { port: tunnel.listen_port, tunnel: tunnel.name.clone() }.into());
        }
    }
    Ok(changes)
}

/// Bytes that WireGuard adds to a full packet: its header of 16 and its tag of 16, 8 of UDP, and the IP header. It pads
/// to 16 bytes, but not beyond the tunnel's MTU (drivers/net/wireguard/send.c, `calculate_skb_padding`).
const fn outer_overhead(endpoint: IpAddr) -> u32 {
    match endpoint {
        IpAddr::V4(_) => 60,
        IpAddr::V6(_) => 80,
    }
}

/// The tunnels of `plan` that would be refused by `run` because their largest outer packets do not fit the port that they
/// would leave by, as far as the host's links show that now.
///
/// # Errors
/// The kernel does not list its links.
pub async fn mtu_conflict(plan: &Plan, netlink: &Netlink) -> Result<Option<Conflict>, HostError> {
    let links = netlink.links().await.during(|| "listing the host's links".to_owned())?;
    for tunnel in &plan.tunnels {
        let local = SocketAddr::new(tunnel.local_endpoint, tunnel.listen_port);
        let port = match &plan.bond {
            // A new bond takes the smallest MTU of its members.
            Some(bond) => {
                let members = bond.members.iter().filter_map(|member| links.named(member.as_str()));
                links.named(bond.name.as_str()).or_else(|| members.min_by_key(|link| link.mtu))
            }
            None if tunnel.remote_endpoint.ip().is_unspecified() => None,
            None => {
                let outgoing = netlink.outgoing_interface(local, tunnel.remote_endpoint).await;
                outgoing.and_then(|index| links.index(index)).filter(|link| link.name != "lo")
            }
        };
        let Some(link) = port else { continue };
        let overhead = outer_overhead(tunnel.remote_endpoint.ip());
        if tunnel.mtu + overhead > link.mtu {
            let (mtu, port, largest) = (tunnel.mtu, link.name.clone(), link.mtu);
            return Ok(Some(Conflict::MtuTooLarge { mtu, port, largest, overhead }));
        }
    }
    Ok(None)
}

/// Refuses new tunnels whose largest outer packets do not fit their port. The kernel would send them as fragments. Only
/// a first fragment has ports, and the bond's hash reads the ports of none, so those of all tunnels share one member.
async fn check_mtu(plan: &Plan, changes: &[Change], survey: &Survey, netlink: &Netlink) -> Result<(), HostError> {
    let new_bond = changes.iter().find_map(|change| match change {
        Change::CreateBond { bond, mtu } => Some((bond, *mtu)),
        _ => None,
    });
    for tunnel in &plan.tunnels {
        let is_set = changes.iter().any(|change| match change {
            Change::CreateTunnel { name, .. } => *name == tunnel.name,
            Change::Alter { name, alteration, .. } => *name == tunnel.name && alteration.parts.contains(&Part::Mtu),
            _ => false,
        });
        if !is_set {
            continue;
        }
        let local = SocketAddr::new(tunnel.local_endpoint, tunnel.listen_port);
        let outgoing = netlink.outgoing_interface(local, tunnel.remote_endpoint).await;
        let link = outgoing.and_then(|index| survey.links.index(index));
        // The bond takes over its own addresses, and what its members carry now.
        let takes_over = |bond: &Bond| {
            let is_own = bond.addresses.iter().any(|net| net.addr() == tunnel.local_endpoint);
            is_own || link.is_some_and(|link| bond.members.iter().any(|member| member.as_str() == link.name))
        };
        let (port, largest) = match (new_bond.filter(|(bond, _)| takes_over(bond)), link) {
            (Some((bond, mtu)), _) => (bond.name.to_string(), mtu),
            (None, Some(link)) => (link.name.clone(), link.mtu),
            (None, None) => continue,
        };
        let overhead = outer_overhead(tunnel.remote_endpoint.ip());
        if tunnel.mtu + overhead > largest {
            return Err(Conflict::MtuTooLarge { mtu: tunnel.mtu, port, largest, overhead }.into());
        }
    }
    Ok(())
}

/// Checks that this process has the privileges that a run needs.
///
/// # Errors
/// The first capability that is missing.
pub fn require_privilege() -> Result<(), HostError> {
    Ok(check_privilege()?)
}

/// Checks that this process may read and change the maps of a running site.
///
/// # Errors
/// The capability that is missing.
pub fn require_maps() -> Result<(), HostError> {
    if has(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN) {
        return Ok(());
    }
    Err(Lacks::Capability { capability: "CAP_BPF", why: "to open the steering program's maps" }.into())
}

/// Whether this process has one of these capabilities.
fn has(any: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.intersects(any))
}

fn check_privilege() -> Result<(), Lacks> {
    if !has(CapabilitySet::NET_ADMIN) {
        return Err(Lacks::Capability { capability: "CAP_NET_ADMIN", why: "to make links, addresses and routes" });
    }
    if !has(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN) {
        return Err(Lacks::Capability { capability: "CAP_BPF", why: "to load the steering program" });
    }
    if !has(CapabilitySet::PERFMON | CapabilitySet::SYS_ADMIN) {
        return Err(Lacks::Capability { capability: "CAP_PERFMON", why: "for the verifier to accept the program" });
    }
    if !bpffs::is_mounted(Path::new(bpffs::BPFFS)) && !has(CapabilitySet::SYS_ADMIN) {
        return Err(Lacks::Capability { capability: "CAP_SYS_ADMIN", why: "to mount the BPF file system" });
    }
    Ok(())
}

fn check_tun() -> Result<(), Lacks> {
    OpenOptions::new().read(true).write(true).open("/dev/net/tun").map(drop).map_err(Lacks::Tun)
}

/// Loads the bonding driver. If the kernel itself loaded it, it would also make a bond0. [`preflight`] finds out whether
/// a bond can be made.
pub fn load_bonding() {
    load_driver("bonding", "max_bonds=0");
}

/// Loads a driver with an option. Ignores failures: the driver may be built in, there may be no modprobe, and `run`
/// gives up `CAP_SYS_MODULE` early.
pub(super) fn load_driver(name: &str, option: &str) {
    if !Path::new("/sys/module").join(name).exists() {
        let mut modprobe = Command::new("modprobe");
        modprobe.args([name, option]);
        let _ = modprobe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// Asks the kernel for a bond that it cannot make, to find out whether it knows bonds.
async fn probe_bonding(netlink: &Netlink) -> Result<(), HostError> {
    load_bonding();
    // No device may have this address, a group's. The driver says so before the kernel makes a device: bond_validate(),
    // drivers/net/bonding/bond_netlink.c. So a process that is killed here leaves nothing.
    let nobody = vec![1, 0, 0, 0, 0, 0];
    let message = RouteNetlinkMessage::NewLink(LinkMessageBuilder::<LinkBond>::new(PROBE).address(nobody).build());
    match netlink.request(message, NLM_F_CREATE | NLM_F_EXCL).await {
        Ok(()) => {}
        Err(e) if errno_of(&e) == Some(libc::EADDRNOTAVAIL) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) => return Err(Lacks::Bonding(e).into()),
    }
    let remove = async {
        match netlink.link(PROBE).await? {
            Some(link) => netlink.delete_link(link.ifindex).await,
            None => Ok(()),
        }
    };
    remove.await.during(|| format!("removing {PROBE}"))
}

/// Whether the port is taken in either family: WireGuard binds it for both families on every address.
fn is_port_in_use(port: u16) -> bool {
    let taken = |bound: io::Result<UdpSocket>| bound.is_err_and(|e| e.kind() == io::ErrorKind::AddrInUse);
    taken(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))) || taken(UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)))
}
