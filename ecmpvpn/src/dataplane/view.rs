//! What runs, read and steered through its pins.

use std::time::Duration;

use aya::maps::{Map, MapData, PerCpuArray};
use ecmpvpn_common::layout::{
    Bucket, Health, Load, MAX_TUNNELS_PER_PEER, Path, Peer, Reason, Settings, State, Tunnel, TunnelCounters, maps,
    settings_flags, tunnel_id,
};
use ecmpvpn_common::shared::Whole;

use super::mapped::{self, Mapped};
use super::{DataplaneError, Hook, Pins};
use crate::config::Policy;

/// A site's maps.
pub struct View {
    counters: PerCpuArray<MapData, TunnelCounters>,
    reasons: PerCpuArray<MapData, u64>,
    state: Mapped<State>,
    buckets: Mapped<Bucket>,
    health: Mapped<Health>,
}

/// A remote site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerView {
    /// Its name.
    pub name: String,
    /// Slots of its live tunnels, a bit each.
    pub live: u32,
    /// Number of its tunnels.
    pub tunnels: u32,
    /// How its flows are put onto tunnels; `None` if this version does not know it.
    pub policy: Option<Policy>,
}

/// A tunnel and its counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelView {
    /// Interface name.
    pub name: String,
    /// Number of its peer.
    pub peer: u32,
    /// Number among its peer's tunnels.
    pub slot: u32,
    /// Interface index.
    pub ifindex: u32,
    /// Share relative to the peer's other tunnels.
    pub weight: u16,
    /// Bits of [`ecmpvpn_common::layout::tunnel_flags`].
    pub flags: u16,
    /// Whether it carries traffic.
    pub live: bool,
    /// Buckets that use it.
    pub buckets: u32,
    /// Time since the last handshake that [`View::set_last_handshake`] told of.
    pub last_handshake: Option<Duration>,
    /// Summed over all CPUs.
    pub counters: TunnelCounters,
    /// Buckets that the daemon moved to it to even out the load.
    pub rebalance_moves: u64,
}

/// Packets that were not put onto a tunnel, by the reason's name; summed over all CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    /// They were none of ours.
    pub not_steered: Vec<(&'static str, u64)>,
    /// They were for a peer and are lost.
    pub dropped: Vec<(&'static str, u64)>,
}

impl View {
    /// Opens a site's maps.
    ///
    /// # Errors
    /// [`DataplaneError::NotRunning`] if there are none.
    pub fn open(pins: &Pins) -> Result<Self, DataplaneError> {
        pins.require()?;
        let data = |name: &str| pins.map(name);
        let typed = |name: &'static str| move |error| DataplaneError::new(format!("looking at map {name}"), error);
        let per_cpu = |name| data(name).map(Map::PerCpuArray);
        Ok(Self {
            counters: per_cpu(maps::COUNTERS)?.try_into().map_err(typed(maps::COUNTERS))?,
            reasons: per_cpu(maps::REASONS)?.try_into().map_err(typed(maps::REASONS))?,
            state: mapped::state(data)?,
            buckets: Mapped::new(maps::BUCKETS, &data(maps::BUCKETS)?)?,
            health: Mapped::new(maps::HEALTH, &data(maps::HEALTH)?)?,
        })
    }

    /// How the programs are attached.
    pub fn hook(&self) -> Hook {
        let clsact = self.settings().flags & settings_flags::CLSACT != 0;
        if clsact { Hook::Clsact } else { Hook::Tcx }
    }

    /// What holds for all peers.
    pub fn settings(&self) -> Settings {
        self.state.state().settings.get()
    }

    /// The remote sites, by number.
    pub fn peers(&self) -> Vec<PeerView> {
        let view = |peer: &Peer| PeerView {
            name: text(&peer.name),
            live: peer.live.get(),
            tunnels: peer.tunnel_count.get(),
            policy: Policy::of(peer.policy.get()),
        };
        self.state.peers().iter().map(view).collect()
    }

    /// All tunnels with their counts.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn tunnels(&self) -> Result<Vec<TunnelView>, DataplaneError> {
        let held = self.held();
        let view = |(id, tunnel): (u32, Tunnel)| {
            let (peer, slot) = (id / MAX_TUNNELS_PER_PEER, id % MAX_TUNNELS_PER_PEER);
            Ok(TunnelView {
                name: text(&tunnel.name),
                peer,
                slot,
                ifindex: tunnel.ifindex,
                weight: tunnel.weight,
                flags: tunnel.flags,
                live: self.state.peers()[peer as usize].live.get() >> slot & 1 == 1,
                buckets: held[id as usize],
                last_handshake: self.last_handshake(id),
                counters: self.counters(id)?,
                rebalance_moves: self.load(id).map_or(0, |load| load.rebalance_moves.get()),
            })
        };
        self.tunnel_records().into_iter().map(view).collect()
    }

    /// Writes a tunnel's record.
    pub(super) fn set_tunnel_record(&self, id: u32, record: Tunnel) {
        self.state.state().tunnels[id as usize].set(record);
    }

    /// The tunnels' records, by id.
    pub(super) fn tunnel_records(&self) -> Vec<(u32, Tunnel)> {
        let slots = |(number, peer): (u32, &Peer)| {
            (0..peer.tunnel_count.get().min(MAX_TUNNELS_PER_PEER)).map(move |slot| tunnel_id(number, slot))
        };
        let ids = (0..).zip(self.state.peers()).flat_map(slots);
        // A slot whose tunnel was taken away has no interface.
        ids.filter_map(|id| Some((id, self.tunnel_record(id)?))).collect()
    }

    fn tunnel_record(&self, id: u32) -> Option<Tunnel> {
        self.state.state().tunnels.get(id as usize).map(Whole::get).filter(|tunnel| tunnel.ifindex != 0)
    }

    fn last_handshake(&self, id: u32) -> Option<Duration> {
        let at = self.health.entries().get(id as usize)?.last_handshake_ns.get();
        (at != 0).then(|| Duration::from_nanos(boot_time_ns().saturating_sub(at)))
    }

    /// Says that a tunnel's last handshake was so long ago.
    pub fn set_last_handshake(&self, peer: u32, slot: u32, age: Duration) {
        let at = boot_time_ns().saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX));
        if let Some(health) = self.health.entries().get(tunnel_id(peer, slot) as usize) {
            // 0 means none.
            health.last_handshake_ns.set(at.max(1));
        }
    }

    /// What probing keeps of a tunnel; `None` if there is no such tunnel.
    pub fn health(&self, peer: u32, slot: u32) -> Option<&Health> {
        self.health.entries().get(tunnel_id(peer, slot) as usize)
    }

    /// A tunnel's counts, summed over all CPUs.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn tunnel_counters(&self, peer: u32, slot: u32) -> Result<TunnelCounters, DataplaneError> {
        self.counters(tunnel_id(peer, slot))
    }

    fn counters(&self, id: u32) -> Result<TunnelCounters, DataplaneError> {
        let cpus = self.counters.get(&id, 0);
        let cpus = cpus.map_err(|error| DataplaneError::new("reading map COUNTERS", error))?;
        let mut sum = TunnelCounters::default();
        cpus.iter().for_each(|cpu| sum += *cpu);
        Ok(sum)
    }

    /// How many buckets use each tunnel, by id.
    fn held(&self) -> Vec<u32> {
        let mut held = vec![0; self.state.peers().len() * MAX_TUNNELS_PER_PEER as usize];
        for number in (0..).take(self.state.peers().len()) {
            for bucket in self.buckets(number) {
                let slot = u32::from(bucket.tunnel.get()) % MAX_TUNNELS_PER_PEER;
                held[tunnel_id(number, slot) as usize] += 1;
            }
        }
        held
    }

    /// Packets that were not put onto a tunnel.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn reasons(&self) -> Result<Reasons, DataplaneError> {
        let mut reasons = Reasons::default();
        for reason in Reason::ALL {
            let cpus = self.reasons.get(&(reason as u32), 0);
            let cpus = cpus.map_err(|error| DataplaneError::new("reading map REASONS", error))?;
            let kind = if reason.is_drop() { &mut reasons.dropped } else { &mut reasons.not_steered };
            kind.push((reason.name(), cpus.iter().sum()));
        }
        Ok(reasons)
    }

    /// Says whether a tunnel carries traffic: one write, which the next packet sees. Returns what it was before;
    /// `None` if there is no such tunnel.
    pub fn set_live(&self, peer: u32, slot: u32, live: bool) -> Option<bool> {
        self.tunnel_record(tunnel_id(peer, slot))?;
        let peer = self.state.peers().get(peer as usize).filter(|peer| slot < peer.tunnel_count.get())?;
        Some(peer.live.set_bits(1 << slot, live) >> slot & 1 == 1)
    }

    /// A remote site's record, by number; its shared words may be set.
    pub fn peer(&self, peer: u32) -> Option<&Peer> {
        self.state.peers().get(peer as usize)
    }

    /// A tunnel's load, by the tunnel's id; its words may be set.
    pub fn load(&self, id: u32) -> Option<&Load> {
        self.state.loads().get(id as usize)
    }

    /// A peer's links, [`Peer::path_count`] of which count; their words may be set.
    pub fn paths(&self, peer: u32) -> &[Path] {
        let first = tunnel_id(peer, 0) as usize;
        self.state.state().paths.get(first..first + MAX_TUNNELS_PER_PEER as usize).unwrap_or_default()
    }

    /// A peer's buckets; their words may be set.
    pub fn buckets(&self, peer: u32) -> &[Bucket] {
        let range = |peer: &Peer| {
            let first = peer.bucket_base as usize;
            self.buckets.entries().get(first..=first + peer.bucket_mask as usize)
        };
        self.peer(peer).and_then(range).unwrap_or_default()
    }

    /// A bucket, by its place among all peers' buckets; its words may be set.
    pub fn bucket_record(&self, index: u32) -> Option<&Bucket> {
        self.buckets.entries().get(index as usize)
    }

    /// A bucket's current tunnel and home, by slot.
    pub fn bucket(&self, index: u32) -> Option<(u8, u8)> {
        self.buckets.entries().get(index as usize).map(|bucket| (bucket.tunnel.get(), bucket.home.get()))
    }
}

/// Nanoseconds since the machine was started, sleep included: the clock of [`Health`].
pub fn boot_time_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec * 1_000_000_000 + now.tv_nsec).unwrap_or_default()
}

/// Text that is filled up with zeros.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
