//! Reads and changes a running site through its pins.

use std::time::Duration;

use aya::maps::{Map, MapData, PerCpuArray};
use ecmpvpn_common::layout::{
    Bucket, Health, Load, MAX_TUNNELS_PER_PEER, Order, OrderCounters, Path, Peer, Reason, Settings, State, Tunnel,
    TunnelCounters, TunnelId, maps, peer_flags, settings_flags,
};
use ecmpvpn_common::shared::Whole;

use super::clock::boot_time_ns;
use super::mapped::{self, Mapped};
use super::{DataplaneError, Hook, Pins};
use crate::config::Policy;

/// A site's maps.
pub struct View {
    counters: PerCpuArray<MapData, TunnelCounters>,
    reasons: PerCpuArray<MapData, u64>,
    order_counts: PerCpuArray<MapData, OrderCounters>,
    state: Mapped<State>,
    buckets: Mapped<Bucket>,
    health: Mapped<Health>,
}

/// A remote site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerView {
    pub name: String,
    /// Tunnels that are up, one bit per slot.
    pub live: u32,
    /// Number of tunnel slots, including those whose tunnel was removed.
    pub tunnels: u32,
    /// `None` if this version does not know the policy.
    pub policy: Option<Policy>,
    /// Whether sprayed flows are put back in order, if the site does that.
    pub restore_order: bool,
}

/// A tunnel and its counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelView {
    /// Interface name.
    pub name: String,
    pub id: TunnelId,
    pub ifindex: u32,
    /// Share relative to the peer's other tunnels.
    pub weight: u16,
    /// Bits of [`ecmpvpn_common::layout::tunnel_flags`].
    pub flags: u16,
    /// Whether the tunnel is up.
    pub live: bool,
    /// Number of buckets that use the tunnel.
    pub buckets: u32,
    /// Time since the last handshake that [`View::set_last_handshake`] recorded.
    pub last_handshake: Option<Duration>,
    /// Summed over all CPUs.
    pub counters: TunnelCounters,
    /// Buckets that the daemon moved to the tunnel to even out the load.
    pub rebalance_moves: u64,
}

/// Packets that were not put onto a tunnel, by the reason's name; summed over all CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    /// They were not for a peer.
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
            order_counts: per_cpu(maps::ORDER_COUNTS)?.try_into().map_err(typed(maps::ORDER_COUNTS))?,
            state: mapped::state(data)?,
            buckets: Mapped::new(maps::BUCKETS, &data(maps::BUCKETS)?)?,
            health: Mapped::new(maps::HEALTH, &data(maps::HEALTH)?)?,
        })
    }

    pub fn hook(&self) -> Hook {
        let clsact = self.settings().flags & settings_flags::CLSACT != 0;
        if clsact { Hook::Clsact } else { Hook::Tcx }
    }

    pub fn settings(&self) -> Settings {
        self.state.state().settings.get()
    }

    /// The remote sites, in the order of their numbers.
    pub fn peers(&self) -> Vec<PeerView> {
        let view = |peer: &Peer| PeerView {
            name: text(&peer.name),
            live: peer.live.get(),
            tunnels: peer.tunnel_count.get(),
            policy: Policy::of(peer.policy.get()),
            restore_order: peer.flags.get() & peer_flags::UNRESTORED == 0,
        };
        self.state.peers().iter().map(view).collect()
    }

    /// All tunnels with their counters.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn tunnels(&self) -> Result<Vec<TunnelView>, DataplaneError> {
        let held = self.bucket_counts();
        let view = |(id, tunnel): (TunnelId, Tunnel)| {
            Ok(TunnelView {
                name: text(&tunnel.name),
                id,
                ifindex: tunnel.ifindex,
                weight: tunnel.weight,
                flags: tunnel.flags,
                live: self.state.peers()[id.peer() as usize].live.get() >> id.slot() & 1 == 1,
                buckets: held[id.index()],
                last_handshake: self.last_handshake(id),
                counters: self.counters(id)?,
                rebalance_moves: self.load(id).map_or(0, |load| load.rebalance_moves.get()),
            })
        };
        self.tunnel_records().into_iter().map(view).collect()
    }

    pub(super) fn set_tunnel_record(&self, id: TunnelId, record: Tunnel) {
        self.state.state().tunnels[id.index()].set(record);
    }

    /// Records of the tunnels that exist, in the order of their ids.
    pub(super) fn tunnel_records(&self) -> Vec<(TunnelId, Tunnel)> {
        let slots = |(number, peer): (u32, &Peer)| {
            (0..peer.tunnel_count.get().min(MAX_TUNNELS_PER_PEER)).map(move |slot| TunnelId::new(number, slot))
        };
        let ids = (0..).zip(self.state.peers()).flat_map(slots);
        // A slot whose tunnel was removed has no interface.
        ids.filter_map(|id| Some((id, self.tunnel_record(id)?))).collect()
    }

    fn tunnel_record(&self, id: TunnelId) -> Option<Tunnel> {
        self.state.state().tunnels.get(id.index()).map(Whole::get).filter(|tunnel| tunnel.ifindex != 0)
    }

    fn last_handshake(&self, id: TunnelId) -> Option<Duration> {
        let at = self.health.entries().get(id.index())?.last_handshake_ns.get();
        (at != 0).then(|| Duration::from_nanos(boot_time_ns().saturating_sub(at)))
    }

    /// Records the age of a tunnel's last handshake.
    pub fn set_last_handshake(&self, id: TunnelId, age: Duration) {
        let at = boot_time_ns().saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX));
        if let Some(health) = self.health.entries().get(id.index()) {
            // 0 means none.
            health.last_handshake_ns.set(at.max(1));
        }
    }

    /// What probing records about a tunnel; `None` if there is no such tunnel.
    pub fn health(&self, id: TunnelId) -> Option<&Health> {
        self.health.entries().get(id.index())
    }

    /// A tunnel's counters, summed over all CPUs.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn tunnel_counters(&self, id: TunnelId) -> Result<TunnelCounters, DataplaneError> {
        self.counters(id)
    }

    fn counters(&self, id: TunnelId) -> Result<TunnelCounters, DataplaneError> {
        let cpus = self.counters.get(&id.number(), 0);
        let cpus = cpus.map_err(|error| DataplaneError::new("reading map COUNTERS", error))?;
        let mut sum = TunnelCounters::default();
        cpus.iter().for_each(|cpu| sum += *cpu);
        Ok(sum)
    }

    /// How many buckets use each tunnel, by id.
    fn bucket_counts(&self) -> Vec<u32> {
        let mut held = vec![0; self.state.peers().len() * MAX_TUNNELS_PER_PEER as usize];
        for number in (0..).take(self.state.peers().len()) {
            for bucket in self.buckets(number) {
                let slot = u32::from(bucket.tunnel.get()) % MAX_TUNNELS_PER_PEER;
                held[TunnelId::new(number, slot).index()] += 1;
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

    /// Whether a tunnel carries traffic. `false` if there is no such tunnel.
    pub fn is_live(&self, id: TunnelId) -> bool {
        self.peer(id.peer()).is_some_and(|peer| peer.live.get() >> id.slot() & 1 == 1)
    }

    /// Whether a tunnel takes new flows. `false` if there is no such tunnel.
    pub fn is_open(&self, id: TunnelId) -> bool {
        self.peer(id.peer()).is_some_and(|peer| peer.open.get() >> id.slot() & 1 == 1)
    }

    /// Sets whether a tunnel is up: one write, which the next packet sees. Returns the former value; `None` if there is
    /// no such tunnel.
    pub fn set_live(&self, id: TunnelId, live: bool) -> Option<bool> {
        self.tunnel_record(id)?;
        let slot = id.slot();
        let peer = self.peer(id.peer()).filter(|peer| slot < peer.tunnel_count.get())?;
        Some(peer.live.set_bits(1 << slot, live) >> slot & 1 == 1)
    }

    /// A remote site's record, by number; its shared words may be set.
    pub fn peer(&self, peer: u32) -> Option<&Peer> {
        self.state.peers().get(peer as usize)
    }

    /// How packets that arrive from a peer are put back in order; its words may be set.
    pub fn order(&self, peer: u32) -> Option<&Order> {
        self.peer(peer)?;
        self.state.state().orders.get(peer as usize)
    }

    /// Counters of a peer's packets in order, summed over all CPUs.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn order_counters(&self, peer: u32) -> Result<OrderCounters, DataplaneError> {
        let cpus = self.order_counts.get(&peer, 0);
        let cpus = cpus.map_err(|error| DataplaneError::new("reading map ORDER_COUNTS", error))?;
        let mut sum = OrderCounters::default();
        cpus.iter().for_each(|cpu| sum += *cpu);
        Ok(sum)
    }

    /// A tunnel's load; its words may be set.
    pub fn load(&self, id: TunnelId) -> Option<&Load> {
        self.state.loads().get(id.index())
    }

    /// A peer's links; the first [`Peer::path_count`] are in use. Their words may be set.
    pub fn paths(&self, peer: u32) -> &[Path] {
        let first = TunnelId::new(peer, 0).index();
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

    /// A bucket by its index among all peers' buckets; its words may be set.
    pub fn bucket_record(&self, index: u32) -> Option<&Bucket> {
        self.buckets.entries().get(index as usize)
    }

    /// Slots of a bucket's current tunnel and of its home.
    pub fn bucket(&self, index: u32) -> Option<(u8, u8)> {
        self.buckets.entries().get(index as usize).map(|bucket| (bucket.tunnel.get(), bucket.home.get()))
    }
}

/// Text from bytes that are padded with zeros.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
