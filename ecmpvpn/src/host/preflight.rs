//! Checks everything that can be checked before the first change: privilege, kernel features, names, members, ports,
//! endpoints.

use std::fs::OpenOptions;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
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
use super::netlink::Netlink;
use super::owned::Owned;
use super::survey::{Place, Survey};
use super::wireguard::kernel;
use crate::plan::{Backend, Plan};

/// Name of the bond that [`probe_bonding`] makes and removes at once.
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

/// Checks that this process has the privileges that a run needs.
///
/// # Errors
/// The first capability that is missing.
pub fn require_privilege() -> Result<(), HostError> {
    Ok(check_privilege()?)
}

fn check_privilege() -> Result<(), Lacks> {
    let has = |any: CapabilitySet| capabilities(None).is_ok_and(|sets| sets.effective.intersects(any));
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

/// Makes a bond and removes it: the only way to find out whether the kernel can make one.
async fn probe_bonding(netlink: &Netlink) -> Result<(), HostError> {
    if !Path::new("/sys/module/bonding").exists() {
        // If the kernel itself loaded the module, it would also make a bond0. Ignore failures: the driver may be built
        // in, and there may be no modprobe. The probe below decides.
        let mut modprobe = Command::new("modprobe");
        modprobe.args(["bonding", "max_bonds=0"]);
        let _ = modprobe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
    let message = RouteNetlinkMessage::NewLink(LinkMessageBuilder::<LinkBond>::new(PROBE).build());
    match netlink.request(message, NLM_F_CREATE | NLM_F_EXCL).await {
        Ok(()) => {}
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
