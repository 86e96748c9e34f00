//! Finds what on the host ecmpvpn has made, by the journal and by the tunnels of this process.

use ipnet::IpNet;

use super::alteration::{Alteration, Part};
use super::error::{Conflict, During as _, HostError};
use super::journal::Journal;
use super::links::Link;
use super::tunnel::kind;
use super::wireguard::kernel;
use super::wireguard::userspace::Userspace;
use crate::plan::{Backend, Plan, Tunnel};

/// What this run or an earlier one has made.
#[derive(Clone, Copy, Default)]
pub struct Owned<'a> {
    /// The records of what was made; `None`: nothing was made.
    pub journal: Option<&'a Journal>,
    /// Tunnels of this process.
    pub userspace: Option<&'a Userspace>,
    /// The former plan, if known. If an endpoint is the same in it, a different endpoint on the device has roamed.
    pub previous: Option<&'a Plan>,
}

impl Owned<'_> {
    /// Whether ecmpvpn made this link for the site, and it is still the same one.
    pub fn owns(&self, link: &Link) -> bool {
        self.journal.is_some_and(|journal| journal.owns_link(link))
    }

    /// How an existing tunnel differs from `tunnel`. `addresses`: those that it has now.
    pub fn tunnel_alteration(
        &self,
        tunnel: &Tunnel,
        backend: Backend,
        link: &Link,
        addresses: &[IpNet],
    ) -> Result<Alteration, HostError> {
        check_kind(link, backend)?;
        let previous = self.previous.and_then(|plan| plan.tunnel(&tunnel.name));
        let parts = match backend {
            Backend::Kernel => kernel::differences(tunnel, previous)
                .during(|| format!("reading key, port and peer of {}", tunnel.name))?,
            Backend::Userspace => {
                let running = self.userspace.and_then(|userspace| userspace.differences(tunnel));
                running.ok_or_else(|| held_by_another(link))?
            }
        };
        Ok(link_alteration(parts, link, tunnel.mtu, &[IpNet::V4(tunnel.address)], addresses))
    }

    /// How the existing steering device differs from the plan.
    pub fn steering_alteration(&self, plan: &Plan, link: &Link, addresses: &[IpNet]) -> Result<Alteration, HostError> {
        check_kind(link, plan.backend)?;
        if plan.backend == Backend::Userspace && self.userspace.is_none() {
            return Err(held_by_another(link));
        }
        Ok(link_alteration(Vec::new(), link, plan.steering.mtu, &plan.steering.addresses, addresses))
    }
}

fn check_kind(link: &Link, backend: Backend) -> Result<(), HostError> {
    let desired = kind(backend);
    match link.kind.as_deref() {
        Some(kind) if kind == desired => Ok(()),
        other => {
            let is = other.unwrap_or("an interface of another kind");
            let what = format!("{} is {is}, but the {backend} backend needs {desired}", link.name);
            Err(Conflict::MadeOtherwise { what }.into())
        }
    }
}

/// A TUN device outlives the process that made it only if another process holds its descriptor.
fn held_by_another(link: &Link) -> HostError {
    Conflict::MadeOtherwise { what: format!("{} is held by another process", link.name) }.into()
}

fn link_alteration(mut parts: Vec<Part>, link: &Link, mtu: u32, desired: &[IpNet], there: &[IpNet]) -> Alteration {
    parts.extend((link.mtu != mtu).then_some(Part::Mtu));
    parts.extend((!link.up).then_some(Part::Down));
    Alteration {
        parts,
        add: desired.iter().filter(|address| !there.contains(address)).copied().collect(),
        remove: there.iter().filter(|address| !desired.contains(address)).copied().collect(),
    }
}
