//! Compares the plan with the host: finds what must change, and what conflicts. Changes nothing.

use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::InfoKind;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};

use super::bond;
use super::change::Change;
use super::error::{Conflict, During as _, HostError, Lacks};
use super::journal::Journal;
use super::links::{Link, Links};
use super::netlink::Netlink;
use super::owned::Owned;
use super::saved::local_address;
use super::{bpffs, member_routes, route, sysctl, unreachable};
use crate::config::{Bond, InterfaceName};
use crate::plan::{Plan, Route, Sysctl};

#[derive(Debug)]
pub struct Survey {
    pub links: Links,
    pub addresses: Vec<AddressMessage>,
    pub routes: Vec<RouteMessage>,
}

impl Survey {
    /// Reads them in the network namespace of `netlink`.
    pub async fn take(netlink: &Netlink) -> Result<Self, HostError> {
        Ok(Self {
            links: netlink.links().await.during(|| "listing links".to_owned())?,
            addresses: netlink.addresses().await.during(|| "listing addresses".to_owned())?,
            routes: netlink.routes().await.during(|| "listing routes".to_owned())?,
        })
    }

    pub fn link(&self, name: &InterfaceName) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name.as_str())
    }

    /// The addresses of a link with their prefix lengths, without link-local IPv6 addresses.
    fn addresses_of(&self, link: &Link) -> Vec<(IpAddr, u8)> {
        let on_link = self.addresses.iter().filter(|a| a.header.index == link.ifindex);
        let named = on_link.filter_map(|a| Some((local_address(a)?, a.header.prefix_len)));
        named.filter(|(address, _)| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())).collect()
    }

    /// The addresses of a link with their prefix lengths, without link-local IPv6 addresses.
    pub fn nets_of(&self, link: &Link) -> Vec<IpNet> {
        self.addresses_of(link).into_iter().filter_map(|(address, len)| IpNet::new(address, len).ok()).collect()
    }

    /// The changes that `plan` needs, given what is `made` already, in order; and the findings that something is as
    /// planned.
    pub fn changes(&self, plan: &Plan, made: Owned<'_>) -> Result<Vec<Change>, HostError> {
        let mut changes = Vec::new();
        self.check_made(plan, made)?;
        if !bpffs::is_mounted(Path::new(bpffs::BPFFS)) {
            changes.push(Change::MountBpffs);
        }
        if let Some(bond) = &plan.bond {
            self.bond_changes(bond, made, &mut changes)?;
        }
        // They come before all devices of the site, so that undoing removes them after all of these.
        for desired in &plan.routes {
            changes.push(self.unreachable_change(desired.prefix, made)?);
        }
        for tunnel in &plan.tunnels {
            if let Some(link) = self.link(&tunnel.name).filter(|link| made.owns(link)) {
                let alteration = made.tunnel_alteration(tunnel, plan.backend, link, &self.nets_of(link))?;
                let (name, ifindex) = (tunnel.name.clone(), link.ifindex);
                changes.push(if alteration.is_empty() {
                    Change::KeepTunnel { name, ifindex }
                } else {
                    Change::Alter { name, ifindex, alteration }
                });
                continue;
            }
            self.check_name(plan, &tunnel.name, "the tunnel")?;
            changes.push(Change::CreateTunnel {
                name: tunnel.name.clone(),
                backend: plan.backend,
                listen_port: tunnel.listen_port,
                remote_endpoint: tunnel.remote_endpoint,
                address: tunnel.address.into(),
                mtu: tunnel.mtu,
            });
        }
        let steering = self.link(&plan.steering.name).filter(|link| made.owns(link));
        if let Some(link) = steering {
            let alteration = made.steering_alteration(plan, link, &self.nets_of(link))?;
            let (name, ifindex) = (plan.steering.name.clone(), link.ifindex);
            changes.push(Change::KeepSteering { name: name.clone(), ifindex });
            if !alteration.is_empty() {
                changes.push(Change::Alter { name, ifindex, alteration });
            }
        } else {
            self.check_name(plan, &plan.steering.name, "the steering device")?;
            changes.push(Change::CreateSteering {
                name: plan.steering.name.clone(),
                backend: plan.backend,
                addresses: plan.steering.addresses.clone(),
                mtu: plan.steering.mtu,
            });
        }
        for desired in &plan.routes {
            changes.push(self.route_change(plan, desired, steering, made)?);
        }
        for setting in &plan.sysctls {
            self.sysctl_changes(plan, setting, made, &mut changes)?;
        }
        self.removals(plan, made, &mut changes);
        Ok(changes)
    }

    /// Refuses a plan without the bond that an earlier run made: it cannot be removed while the tunnels stay.
    fn check_made(&self, plan: &Plan, made: Owned<'_>) -> Result<(), Conflict> {
        let desired = plan.bond.as_ref().map(|bond| bond.name.as_str());
        let other =
            self.links.iter().find(|link| link.is(&bond::KIND) && made.owns(link) && Some(&*link.name) != desired);
        match other {
            Some(link) => Err(Conflict::MadeOtherwise {
                what: format!("bond {} is not in the configuration any more", link.name),
            }),
            None => Ok(()),
        }
    }

    fn unreachable_change(&self, prefix: IpNet, made: Owned<'_>) -> Result<Change, Conflict> {
        let is_ours = made.journal.into_iter().flat_map(Journal::owned_unreachable).any(|ours| ours == prefix);
        match unreachable::find(&self.routes, prefix) {
            None => Ok(Change::AddUnreachable { prefix }),
            Some(_) if is_ours => Ok(Change::KeepUnreachable { prefix }),
            Some(there) => Err(Conflict::RouteTaken { prefix, device: route::describe(there, &self.links) }),
        }
    }

    fn route_change(
        &self,
        plan: &Plan,
        desired: &Route,
        steering: Option<&Link>,
        made: Owned<'_>,
    ) -> Result<Change, Conflict> {
        let (prefix, device, source) = (desired.prefix, plan.steering.name.clone(), desired.source);
        let Some(there) = route::find(&self.routes, prefix) else {
            return Ok(Change::AddRoute { prefix, device, source });
        };
        let by = route::output_interfaces(there);
        let is_ours = made
            .journal
            .into_iter()
            .flat_map(Journal::owned_routes)
            .any(|(ours, device)| ours == prefix && device.ifindex.is_some_and(|index| by.contains(&index)));
        if !is_ours {
            return Err(Conflict::RouteTaken { prefix, device: route::describe(there, &self.links) });
        }
        let as_planned = route::source(there) == source && steering.is_some_and(|link| by == [link.ifindex]);
        Ok(if as_planned {
            Change::KeepRoute { prefix, device }
        } else {
            Change::ReplaceRoute { prefix, device, source }
        })
    }

    /// Adds the removal of everything that ecmpvpn made and that is no longer planned. Routes come first: they need
    /// their device.
    fn removals(&self, plan: &Plan, made: Owned<'_>, changes: &mut Vec<Change>) {
        let Some(journal) = made.journal else { return };
        for (prefix, device) in journal.owned_routes() {
            if !plan.routes.iter().any(|route| route.prefix == prefix) {
                changes.push(Change::RemoveRoute { prefix, device: device.name.clone() });
            }
        }
        let surplus =
            journal.owned_unreachable().filter(|prefix| !plan.routes.iter().any(|route| route.prefix == *prefix));
        changes.extend(surplus.map(|prefix| Change::RemoveUnreachable { prefix }));
        for link in self.links.iter().filter(|link| made.owns(link) && !link.is(&bond::KIND)) {
            let Ok(name) = InterfaceName::new(&link.name) else { continue };
            // It has a keeper of its own, `control/holding.rs`.
            if link.is(&InfoKind::Ifb) && link.name == plan.holding_name() {
                continue;
            }
            if plan.steering.name != name && !plan.tunnels.iter().any(|tunnel| tunnel.name == name) {
                changes.push(Change::RemoveTunnel { name, ifindex: link.ifindex });
            }
        }
        if let Some(bond) = &plan.bond
            && let Some(link) = self.link(&bond.name)
        {
            let surplus = journal.owned_addresses(link.ifindex).filter(|address| !bond.addresses.contains(address));
            changes.extend(surplus.map(|address| Change::RemoveAddress { device: bond.name.clone(), address }));
        }
    }

    fn bond_changes(&self, bond: &Bond, made: Owned<'_>, changes: &mut Vec<Change>) -> Result<(), HostError> {
        let existing = self.link(&bond.name);
        match existing {
            Some(link) if !link.is(&bond::KIND) => {
                let alias = link.alias.clone();
                return Err(Conflict::NameTaken { name: bond.name.clone(), role: "the bond", alias }.into());
            }
            Some(link) => {
                let checked = bond::check_settings(bond, link).and_then(|()| self.check_members(bond, link));
                checked.map_err(|conflict| {
                    if made.owns(link) { Conflict::MadeOtherwise { what: conflict.to_string() } } else { conflict }
                })?;
                changes.push(Change::ReuseBond { bond: bond.name.clone() });
            }
            None => {
                let mtus = bond.members.iter().filter_map(|member| Some(self.link(member)?.mtu));
                changes.push(Change::CreateBond { bond: bond.clone(), mtu: mtus.min().unwrap_or(1500) });
            }
        }
        for member in &bond.members {
            changes.push(self.member_change(bond, existing, member)?);
        }
        let there = existing.map(|link| self.addresses_of(link)).unwrap_or_default();
        for address in &bond.addresses {
            let device = bond.name.clone();
            changes.push(if there.contains(&(address.addr(), address.prefix_len())) {
                Change::KeepAddress { device, address: *address }
            } else {
                Change::AddAddress { device, address: *address }
            });
        }
        if existing.is_none_or(|link| !link.up) {
            changes.push(Change::SetUp { device: bond.name.clone() });
        }
        let enslaved = |link: &&Link| {
            let member = bond.members.iter().any(|member| member.as_str() == link.name);
            member && existing.is_none_or(|bond| link.master != Some(bond.ifindex))
        };
        let members: Vec<u32> = self.links.iter().filter(enslaved).map(|link| link.ifindex).collect();
        for route in member_routes::movable(&self.routes, &members, bond) {
            changes.push(Change::MoveRoute { route, device: bond.name.clone() });
        }
        Ok(())
    }

    /// Refuses a bond with more members than configured: it would use members that the port plan does not expect.
    fn check_members(&self, bond: &Bond, link: &Link) -> Result<(), Conflict> {
        let members = self.links.iter().filter(|other| other.master == Some(link.ifindex));
        let names: Vec<&str> = members.map(|member| member.name.as_str()).collect();
        if names.iter().all(|name| bond.members.iter().any(|member| member.as_str() == *name)) {
            return Ok(());
        }
        let desired: Vec<&str> = bond.members.iter().map(InterfaceName::as_str).collect();
        let bond = bond.name.clone();
        Err(Conflict::BondDiffers { bond, setting: "members", is: names.join(", "), desired: desired.join(", ") })
    }

    fn member_change(&self, bond: &Bond, existing: Option<&Link>, member: &InterfaceName) -> Result<Change, Conflict> {
        let Some(link) = self.link(member) else {
            let fit = |link: &&Link| link.ethernet && !link.is(&bond::KIND) && link.master.is_none();
            let present = self.links.iter().filter(fit).map(|link| link.name.clone()).collect();
            return Err(Conflict::NoSuchMember { member: member.clone(), present });
        };
        let unfit = |why: String| Err(Conflict::UnfitMember { member: member.clone(), why });
        if let Some(master) = link.master {
            if existing.is_some_and(|bond| bond.ifindex == master) {
                return Ok(Change::KeepMember { member: member.clone(), bond: bond.name.clone() });
            }
            let name = self.links.iter().find(|other| other.ifindex == master).map_or("another device", |m| &m.name);
            return unfit(format!("already belongs to {name}: release it first (`ip link set {member} nomaster`)"));
        }
        if !link.ethernet {
            return unfit("is not an Ethernet interface: choose another one".to_owned());
        }
        if let Some(upper) = self.links.iter().find(|other| other.lower == Some(link.ifindex)) {
            return unfit(format!("carries {0}: move {0} onto the bond or remove it", upper.name));
        }
        let through_member = |r: &&RouteMessage| route::output_interfaces(r).contains(&link.ifindex);
        let by_object = |r: &RouteMessage| {
            r.attributes.iter().find_map(|a| match a {
                RouteAttribute::NhId(id) => Some(*id),
                _ => None,
            })
        };
        if let Some(id) = self.routes.iter().filter(through_member).find_map(by_object) {
            return unfit(format!("is used by nexthop object {id}, which cannot be restored later: remove it first"));
        }
        let addresses = self.addresses_of(link).into_iter().map(|(address, len)| format!("{address}/{len}")).collect();
        Ok(Change::Enslave { member: member.clone(), bond: bond.name.clone(), addresses })
    }

    fn check_name(&self, plan: &Plan, name: &InterfaceName, role: &'static str) -> Result<(), Conflict> {
        match self.link(name) {
            None => Ok(()),
            Some(link) if link.alias.as_deref() == Some(&Plan::link_alias(&plan.site)) => {
                Err(Conflict::Orphan { name: name.clone(), site: plan.site.clone() })
            }
            Some(link) => Err(Conflict::NameTaken { name: name.clone(), role, alias: link.alias.clone() }),
        }
    }

    fn sysctl_changes(
        &self,
        plan: &Plan,
        setting: &Sysctl,
        made: Owned<'_>,
        changes: &mut Vec<Change>,
    ) -> Result<(), HostError> {
        let ipv4 = match setting {
            Sysctl::LooseReversePath(device)
                if self.link(device).is_some_and(|link| made.owns(link)) && sysctl::is_loose(device.as_str()) =>
            {
                return Ok(());
            }
            Sysctl::LooseReversePath(device) => {
                changes.push(Change::LooseReversePath { device: device.clone() });
                return Ok(());
            }
            Sysctl::Ipv4Forwarding => true,
            Sysctl::Ipv6Forwarding => false,
        };
        match sysctl::forwards(ipv4).during(|| "reading the forwarding switch".to_owned())? {
            Some(true) => changes.push(Change::KeepForwarding { ipv4 }),
            Some(false) => {
                if !ipv4 {
                    let devices = sysctl::router_advertisement_devices(&self.routes, &self.links);
                    changes.extend(devices.into_iter().map(|device| Change::AcceptRouterAdvertisements { device }));
                }
                changes.push(Change::EnableForwarding { ipv4 });
            }
            None => {
                let ipv6 = plan.routes.iter().map(|route| route.prefix).find(|prefix| prefix.addr().is_ipv6());
                return Err(ipv6.map_or_else(
                    || HostError::Step {
                        operation: "reading the forwarding switch".to_owned(),
                        source: std::io::ErrorKind::NotFound.into(),
                    },
                    |prefix| Lacks::Ipv6(prefix).into(),
                ));
            }
        }
        Ok(())
    }

    /// Finds where an address is on this host.
    pub fn place_of(&self, plan: &Plan, address: IpAddr) -> Place {
        if plan.bond.as_ref().is_some_and(|bond| bond.addresses.iter().any(|net| net.addr() == address)) {
            return Place::Stays;
        }
        let bond_index = plan.bond.as_ref().and_then(|bond| self.link(&bond.name)).map(|link| link.ifindex);
        let loses = |link: &Link| {
            let is_member = |bond: &Bond| bond.members.iter().any(|member| member.as_str() == link.name);
            plan.bond.as_ref().is_some_and(is_member) && (link.master.is_none() || link.master != bond_index)
        };
        let mut place = Place::Nowhere;
        for link in &self.links {
            let here =
                self.addresses.iter().any(|a| a.header.index == link.ifindex && local_address(a) == Some(address));
            match (here, loses(link)) {
                (true, false) => return Place::Stays,
                (true, true) => place = Place::OnMember,
                (false, _) => {}
            }
        }
        place
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On no interface.
    Nowhere,
    /// On an interface that keeps it.
    Stays,
    /// Only on an interface that will be enslaved, and loses it.
    OnMember,
}
