//! Follows bond members: counts on each member what arrives of each tunnel. Everything works through pins, from any
//! process.
//!
//! A member is recorded in map MEMBERS before anything is attached to it, and removed from the map after everything is
//! detached. So a later process knows what to detach.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues};
use aya::programs::{SchedClassifier, TcAttachType};
use ecmpvpn_common::arrivals::{Arrival, ArrivalCounters, MAX_FOLLOWED, member_flags};
use ecmpvpn_common::layout::{TunnelId, maps, programs, settings_flags};

use super::attach::{
    add_clsact, attach_clsact, attach_tcx, detach_from, has_clsact, name_of, replace_clsact, replace_tcx,
};
use super::clock::monotonic_ns;
use super::error::os_error;
use super::{DataplaneError, Device, Hook, Pins};
use super::{enomem, mapped};
use crate::error::chain;
use crate::fault;

/// How often attaching is tried, and the pause between two tries, while the kernel is still removing an earlier link of
/// ecmpvpn.
const RELEASE_LOOKS: u32 = 20;
const RELEASE_LOOK_EVERY: Duration = Duration::from_millis(5);

/// What identifies a tunnel's outer packets when they arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OuterTunnel {
    pub id: TunnelId,
    /// The peer's address and listen port.
    pub remote: SocketAddr,
    pub listen_port: u16,
}

impl OuterTunnel {
    fn arrival_key(&self, ifindex: u32) -> Arrival {
        Arrival::new(self.remote.ip(), self.remote.port(), self.listen_port, ifindex)
    }
}

/// Counters of one tunnel on one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArrivalView {
    pub id: TunnelId,
    /// Interface index of the member.
    pub ifindex: u32,
    /// The peer's port and this site's.
    pub ports: (u16, u16),
    /// Outer packets.
    pub packets: u64,
    /// Their bytes from the network header on.
    pub bytes: u64,
    /// Time since the last packet; `None` if none arrived.
    pub age: Option<Duration>,
}

/// A site's followed members and their counters.
pub struct Arrivals {
    pins: Pins,
    hook: Hook,
    members: HashMap<MapData, u32, u32>,
    counters: PerCpuHashMap<MapData, Arrival, ArrivalCounters>,
}

impl Arrivals {
    /// Opens a site's maps.
    ///
    /// # Errors
    /// [`DataplaneError::NotRunning`] if there are none.
    pub fn open(pins: &Pins) -> Result<Self, DataplaneError> {
        pins.require()?;
        let data = |name: &str| pins.map(name);
        let typed = |name: &'static str| move |error| DataplaneError::new(format!("looking at map {name}"), error);
        let flags = mapped::state(data)?.state().settings.get().flags;
        Ok(Self {
            pins: pins.clone(),
            hook: if flags & settings_flags::CLSACT == 0 { Hook::Tcx } else { Hook::Clsact },
            members: Map::HashMap(data(maps::MEMBERS)?).try_into().map_err(typed(maps::MEMBERS))?,
            counters: Map::PerCpuHashMap(data(maps::ARRIVALS)?).try_into().map_err(typed(maps::ARRIVALS))?,
        })
    }

    /// Follows exactly `members`, which carry `tunnels`. Returns those that were not followed before.
    ///
    /// # Errors
    /// Attaching to a member or detaching from it failed. What was attached before stays attached and recorded. The
    /// failed member is left as it was.
    pub fn follow(&mut self, tunnels: &[OuterTunnel], members: &[Device]) -> Result<Vec<Device>, DataplaneError> {
        let followed = self.followed()?;
        for ifindex in followed.iter().filter(|ifindex| members.iter().all(|member| member.ifindex != **ifindex)) {
            self.stop_following(*ifindex)?;
        }
        for ifindex in followed.iter().filter(|ifindex| members.iter().any(|member| member.ifindex == **ifindex)) {
            self.forget_others(tunnels, *ifindex)?;
            self.add_missing(tunnels, *ifindex)?;
        }
        let mut new = Vec::new();
        for member in members.iter().take(MAX_FOLLOWED as usize) {
            if followed.contains(&member.ifindex) {
                // A reload may have added tunnels.
                self.add_missing(tunnels, member.ifindex)?;
                let attached = match self.hook {
                    Hook::Tcx => self.pins.member_link(member.ifindex).exists(),
                    Hook::Clsact => self.flags(member.ifindex) & member_flags::ATTACHED != 0,
                };
                if !attached {
                    // A process that was killed had recorded it, and not attached to it yet.
                    self.attach(member)?;
                }
            } else {
                self.join(tunnels, member)?;
                new.push(member.clone());
            }
        }
        Ok(new)
    }

    /// Interface indices of the members that are followed.
    fn followed(&self) -> Result<BTreeSet<u32>, DataplaneError> {
        let keys: Result<_, MapError> = self.members.keys().collect();
        keys.map_err(|error| DataplaneError::new("reading map MEMBERS", error))
    }

    fn join(&mut self, tunnels: &[OuterTunnel], member: &Device) -> Result<(), DataplaneError> {
        self.write_down(member.ifindex, 0)?;
        let joined = self.add_missing(tunnels, member.ifindex).and_then(|()| self.attach(member));
        if joined.is_err()
            && let Err(error) = self.stop_following(member.ifindex)
        {
            tracing::warn!("{}", chain(&error));
        }
        joined
    }

    /// Removes the entries of tunnels that no longer exist, for example after a reload.
    fn forget_others(&mut self, tunnels: &[OuterTunnel], ifindex: u32) -> Result<(), DataplaneError> {
        let entries = self.counters.iter().filter_map(Result::ok);
        let entries: Vec<(Arrival, u32)> =
            entries.map(|(key, cpus)| (key, cpus.first().map_or(0, |counters| counters.tunnel))).collect();
        for (key, id) in entries.iter().filter(|(key, _)| key.ifindex == ifindex) {
            if tunnels.iter().all(|tunnel| (tunnel.arrival_key(ifindex), tunnel.id.number()) != (*key, *id)) {
                fault::point("map write: arrivals");
                let removed = self.counters.remove(key);
                removed.map_err(|error| DataplaneError::new("writing to map ARRIVALS", error))?;
            }
        }
        Ok(())
    }

    /// Creates an entry for each tunnel that has none: the program only counts into entries that exist.
    fn add_missing(&mut self, tunnels: &[OuterTunnel], ifindex: u32) -> Result<(), DataplaneError> {
        let failed = |error| DataplaneError::new("writing to map ARRIVALS", error);
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| DataplaneError::new("counting the processors", error))?;
        for tunnel in tunnels {
            match self.counters.get(&tunnel.arrival_key(ifindex), 0) {
                Err(MapError::KeyNotFound) => {}
                Ok(_) => continue,
                Err(error) => return Err(DataplaneError::new("reading map ARRIVALS", error)),
            }
            let counters = ArrivalCounters { tunnel: tunnel.id.number(), ..ArrivalCounters::default() };
            let values = || PerCpuValues::try_from(vec![counters; cpus]).map_err(MapError::from);
            let insert = || self.counters.insert(tunnel.arrival_key(ifindex), values()?, 0);
            enomem::retried(insert).map_err(failed)?;
        }
        Ok(())
    }

    fn attach(&mut self, member: &Device) -> Result<(), DataplaneError> {
        let mut program = self.pins.program(programs::ARRIVAL)?;
        match self.hook {
            Hook::Tcx => {
                let pin = self.pins.member_link(member.ifindex);
                let mut attach = || attach_tcx(&mut program, &member.name, TcAttachType::Ingress, &pin);
                for _ in 0..RELEASE_LOOKS {
                    match attach() {
                        // The link was removed a moment ago. The kernel detaches the program only after that.
                        Err(error) if os_error(&error) == Some(libc::EEXIST) => sleep(RELEASE_LOOK_EVERY),
                        done => return done,
                    }
                }
                attach()
            }
            Hook::Clsact => {
                if !has_clsact(member)? {
                    // First, so that it is removed even if this process is killed as soon as it is there.
                    self.write_down(member.ifindex, member_flags::CLSACT_ADDED)?;
                    add_clsact(&member.name)?;
                }
                match attach_clsact(&mut program, &member.name, TcAttachType::Ingress) {
                    // A process that was killed had attached it, and not recorded that yet.
                    Err(error) if os_error(&error) == Some(libc::EEXIST) => {}
                    attached => attached?,
                }
                self.write_down(member.ifindex, self.flags(member.ifindex) | member_flags::ATTACHED)
            }
        }
    }

    fn flags(&self, ifindex: u32) -> u32 {
        self.members.get(&ifindex, 0).unwrap_or(0)
    }

    fn write_down(&mut self, ifindex: u32, flags: u32) -> Result<(), DataplaneError> {
        let written = enomem::retried(|| self.members.insert(ifindex, flags, 0));
        written.map_err(|error| DataplaneError::new("writing to map MEMBERS", error))
    }

    /// Detaches everything from a member, which may no longer exist.
    fn stop_following(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        match self.hook {
            Hook::Tcx => {
                Pins::forget(&self.pins.member_link(ifindex))?;
            }
            Hook::Clsact => {
                let added = self.flags(ifindex) & member_flags::CLSACT_ADDED;
                self.write_down(ifindex, added)?;
                let added = added != 0;
                detach_from(ifindex, TcAttachType::Ingress, programs::ARRIVAL, added)?;
            }
        }
        let keys: Vec<Arrival> = self.counters.keys().filter_map(Result::ok).collect();
        for key in keys.iter().filter(|key| key.ifindex == ifindex) {
            fault::point("map write: arrivals");
            let removed = self.counters.remove(key);
            removed.map_err(|error| DataplaneError::new("writing to map ARRIVALS", error))?;
        }
        fault::point("map write: members");
        self.members.remove(&ifindex).map_err(|error| DataplaneError::new("writing to map MEMBERS", error))
    }

    /// Counters of each tunnel on each followed member, summed over all CPUs.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn counts(&self) -> Result<Vec<ArrivalView>, DataplaneError> {
        let now = monotonic_ns();
        let mut views = Vec::new();
        for entry in &self.counters {
            let (key, cpus) = entry.map_err(|error| DataplaneError::new("reading map ARRIVALS", error))?;
            let tunnel = cpus.first().map_or(0, |counters| counters.tunnel);
            let last = cpus.iter().map(|counters| counters.last_ns).max().filter(|at| *at != 0);
            views.push(ArrivalView {
                id: TunnelId::from_number(tunnel),
                ifindex: key.ifindex,
                ports: (
                    u16::from_be_bytes([key.ports[0], key.ports[1]]),
                    u16::from_be_bytes([key.ports[2], key.ports[3]]),
                ),
                packets: cpus.iter().map(|counters| counters.packets).sum(),
                bytes: cpus.iter().map(|counters| counters.bytes).sum(),
                age: last.map(|at| Duration::from_nanos(now.saturating_sub(at))),
            });
        }
        views.sort_by_key(|view| (view.id, view.ifindex));
        Ok(views)
    }
}

/// Replaces the program that is attached to each followed member by `program`. A member for which this fails keeps its
/// former program, which continues to count.
pub(super) fn replace(pins: &Pins, program: &mut SchedClassifier) -> Result<(), DataplaneError> {
    let arrivals = Arrivals::open(pins)?;
    for ifindex in arrivals.followed()? {
        let replaced = match arrivals.hook {
            Hook::Tcx => replace_tcx(program, &pins.member_link(ifindex)),
            Hook::Clsact => match name_of(ifindex) {
                Some(name) => replace_clsact(program, &name, TcAttachType::Ingress),
                None => Ok(()),
            },
        };
        if let Err(error) = replaced {
            tracing::debug!("the program of the member with index {ifindex} stays as it is: {}", chain(&error));
        }
    }
    Ok(())
}

/// Detaches everything from all members.
///
/// # Errors
/// The first failure. The rest is detached nevertheless.
pub fn detach_all(pins: &Pins) -> Result<(), DataplaneError> {
    // A start that was interrupted has not attached anything yet.
    let Ok(mut arrivals) = Arrivals::open(pins) else { return Ok(()) };
    let mut first = Ok(());
    for ifindex in arrivals.followed()? {
        first = first.and(arrivals.stop_following(ifindex));
    }
    first
}

/// Detaches from the members what another version, whose pins are in `dir`, attached by clsact. What it attached by tcx
/// is removed with its pins. Its programs on other devices are removed with those devices. The map of members is the
/// same in all versions that have it: interface indexes and [`member_flags`].
///
/// # Errors
/// The first failure. The rest is detached nevertheless.
pub(super) fn detach_other_version(dir: &Path) -> Result<(), DataplaneError> {
    let Ok(data) = MapData::from_pin(dir.join(maps::MEMBERS)) else { return Ok(()) };
    let Ok(members) = HashMap::<_, u32, u32>::try_from(Map::HashMap(data)) else { return Ok(()) };
    let mut first = Ok(());
    for (ifindex, flags) in members.iter().filter_map(Result::ok) {
        let added = flags & member_flags::CLSACT_ADDED != 0;
        first = first.and(detach_from(ifindex, TcAttachType::Ingress, programs::ARRIVAL, added));
    }
    first
}
