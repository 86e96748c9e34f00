//! Changes the pinned maps to match a table while packets flow. The maps and their counters stay.

use std::collections::BTreeMap;

use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use ecmpvpn_common::layout::{
    Address, BUCKETS_PER_PEER, Bucket, Health, MAX_TUNNELS_PER_PEER, Settings, State, Tunnel, TunnelCounters, TunnelId,
    maps, peer_flags, settings_flags, tunnel_flags,
};
use ecmpvpn_common::rendezvous::{Candidate, home, inverse_weight, key_of};

use super::arrivals;
use super::attach::{Attached, attach_again};
use super::error::os_error;
use super::fill::{FIRST_WEIGHT, first_load, gap_ns, padded};
use super::mapped::{self, Mapped};
use super::object::{Programs, replace_programs, tick_ns};
use super::prefixes;
use super::view::text;
use super::{DataplaneError, Device, Hook, Options, Pins};
use crate::config::InterfaceName;
use crate::fault;
use crate::plan::{PeerTable, SteeringTable};

/// Each peer's name, and the names of its tunnels in the order of their slots.
pub type Slots = Vec<(String, Vec<String>)>;

/// The names of the tunnels in the slots of each peer, as pinned, for [`crate::plan::Plan::keep_slots`]. `None` if
/// nothing is pinned, or if a start was interrupted before it attached anything.
///
/// # Errors
/// A map cannot be read.
pub fn slots(pins: &Pins) -> Result<Option<Slots>, DataplaneError> {
    if !pins.exist() || !pins.are_complete() {
        return Ok(None);
    }
    let maps = Maps::open(pins)?;
    let mut peers = Vec::new();
    for (number, peer) in (0..).zip(maps.state.peers()) {
        let count = peer.tunnel_count.get().min(MAX_TUNNELS_PER_PEER);
        let names = (0..count).map(|slot| text(&maps.tunnel(TunnelId::new(number, slot)).name)).collect();
        peers.push((text(&peer.name), names));
    }
    Ok(Some(peers))
}

/// Takes over what an earlier process left pinned: replaces its programs in place by this version's, then does what
/// [`update`] does. No packet bypasses the programs meanwhile, and the counters continue. `former`: the table of that
/// process, if it is known.
///
/// # Errors
/// If loading the programs fails, nothing was changed. If a later step fails, the data plane continues with a part of
/// the changes, and adopting again is safe.
pub fn adopt(
    pins: &Pins,
    former: Option<&SteeringTable>,
    table: &SteeringTable,
    steering: &Device,
    tunnels: &BTreeMap<InterfaceName, u32>,
    options: &Options,
) -> Result<Hook, DataplaneError> {
    let programs = replace_programs(pins, options)?;
    apply(pins, former, table, steering, tunnels, programs, true)
}

/// Makes the maps match `table`, whose slots must be those of [`slots`], and attaches to new tunnels. A tunnel that is
/// gone has weight 0 in `table` and gets no more packets. A new tunnel gets none until [`super::View::set_live`] marks
/// it as up, unless its peer has no other. Values that are the same in `former` and `table` are not written: they may
/// have been changed in the maps since, and such a change stays.
///
/// # Errors
/// As [`adopt`].
pub fn update(
    pins: &Pins,
    former: &SteeringTable,
    table: &SteeringTable,
    steering: &Device,
    tunnels: &BTreeMap<InterfaceName, u32>,
) -> Result<(), DataplaneError> {
    let programs = Programs::pinned(pins)?;
    apply(pins, Some(former), table, steering, tunnels, programs, false).map(drop)
}

fn apply(
    pins: &Pins,
    former: Option<&SteeringTable>,
    table: &SteeringTable,
    steering: &Device,
    tunnels: &BTreeMap<InterfaceName, u32>,
    mut programs: Programs,
    replaced: bool,
) -> Result<Hook, DataplaneError> {
    let mut maps = Maps::open(pins)?;
    maps.ensure_fits(table)?;
    let settings = maps.settings();
    let hook = if settings.flags & settings_flags::CLSACT != 0 { Hook::Clsact } else { Hook::Tcx };
    for (number, peer) in (0..).zip(&table.peers) {
        let before = former.and_then(|table| table.peers.get(number as usize));
        let rows = maps.rows(number, before, peer, tunnels)?;
        fault::point("map write: dropping tunnels");
        maps.drop_tunnels(number, &rows, pins)?;
        for row in &rows {
            if hook == Hook::Tcx && !row.same_device {
                // The slot had another device. If this process is killed, its link must not pass for the new one's.
                Pins::forget(&pins.tunnel_link(TunnelId::new(number, row.slot)))?;
            }
            fault::point("map write: a tunnel");
            maps.write_row(number, row)?;
        }
        for row in rows.iter().filter(|row| row.record.ifindex != 0) {
            let pin = pins.tunnel_link(TunnelId::new(number, row.slot));
            // A process that was killed may have written the record and not attached yet. With clsact nothing shows
            // that: attaching again replaces the program by itself.
            let is_attached = row.same_device && hook == Hook::Tcx && pin.exists();
            if is_attached && !replaced {
                continue;
            }
            let device = &peer.tunnels[row.slot as usize].0;
            let attached = attach_again(hook, &mut programs.ingress, device, false, &pin, row.same_device)?;
            maps.note_qdisc(TunnelId::new(number, row.slot), attached);
        }
        fault::point("map write: homes");
        maps.set_homes(number, &rows, replaced);
        fault::point("map write: peer");
        maps.state.peers()[number as usize].tunnel_count.set(u32::try_from(rows.len()).unwrap_or(u32::MAX));
        maps.set_policy(number, before, peer);
        if former.is_none_or(|former| former.flowlet_gap_us != table.flowlet_gap_us) {
            maps.state.peers()[number as usize].gap_ns.set(gap_ns(table.flowlet_gap_us));
        }
        fault::point("map write: paths");
        maps.set_paths(number, &rows, replaced);
        fault::point("map write: reviving");
        maps.revive_peer(number, &rows);
    }
    fault::point("map write: prefixes");
    maps.set_prefixes(table)?;
    let same_device = settings.steering_ifindex == steering.ifindex;
    let attached = if replaced || !same_device {
        attach_again(hook, &mut programs.egress, &steering.name, true, &pins.steering_link(), same_device)?
    } else {
        Attached { qdisc_added: false }
    };
    fault::point("map write: settings");
    maps.set_settings(table, steering.ifindex, attached);
    if replaced {
        arrivals::replace(pins, &mut programs.arrival)?;
        Programs::keep(pins)?;
    }
    Ok(hook)
}

/// The change of one slot.
struct Row {
    slot: u32,
    /// The desired record. Its interface index is 0 if the slot's tunnel is gone.
    record: Tunnel,
    /// The present record.
    former: Tunnel,
    /// The tunnel is the former one, on the former device.
    same_device: bool,
    /// The slot had another tunnel before, or none.
    is_new: bool,
}

/// The maps that are written to.
struct Maps {
    tunnel_ids: HashMap<MapData, u32, u32>,
    prefixes: LpmTrie<MapData, Address, u32>,
    counters: PerCpuArray<MapData, TunnelCounters>,
    state: Mapped<State>,
    buckets: Mapped<Bucket>,
    health: Mapped<Health>,
}

fn reading(name: &'static str) -> impl Fn(MapError) -> DataplaneError {
    move |error| DataplaneError::new(format!("reading map {name}"), error)
}

fn write_error(name: &'static str) -> impl Fn(MapError) -> DataplaneError {
    move |error| DataplaneError::new(format!("writing to map {name}"), error)
}

impl Maps {
    fn open(pins: &Pins) -> Result<Self, DataplaneError> {
        let data = |name: &str| pins.map(name);
        Ok(Self {
            tunnel_ids: Map::HashMap(data(maps::TUNNEL_IDS)?).try_into().map_err(reading(maps::TUNNEL_IDS))?,
            prefixes: Map::LpmTrie(data(maps::PREFIXES)?).try_into().map_err(reading(maps::PREFIXES))?,
            counters: Map::PerCpuArray(data(maps::COUNTERS)?).try_into().map_err(reading(maps::COUNTERS))?,
            state: mapped::state(data)?,
            buckets: Mapped::new(maps::BUCKETS, &data(maps::BUCKETS)?)?,
            health: Mapped::new(maps::HEALTH, &data(maps::HEALTH)?)?,
        })
    }

    fn ensure_fits(&self, table: &SteeringTable) -> Result<(), DataplaneError> {
        let names = self.state.peers().iter().map(|peer| text(&peer.name));
        if !names.eq(table.peers.iter().map(|peer| peer.name.clone())) {
            let text =
                "the peers are not those that the maps were made for: `ecmpvpn down` and `ecmpvpn run` make new ones";
            return Err(DataplaneError::Mismatch(text.to_owned()));
        }
        Ok(())
    }

    fn settings(&self) -> Settings {
        self.state.state().settings.get()
    }

    fn tunnel(&self, id: TunnelId) -> Tunnel {
        self.state.state().tunnels[id.index()].get()
    }

    fn rows(
        &self,
        number: u32,
        before: Option<&PeerTable>,
        peer: &PeerTable,
        tunnels: &BTreeMap<InterfaceName, u32>,
    ) -> Result<Vec<Row>, DataplaneError> {
        if peer.tunnels.len() > MAX_TUNNELS_PER_PEER as usize {
            return Err(DataplaneError::Mismatch(format!(
                "peer {} has had {} tunnels since `run`, and {MAX_TUNNELS_PER_PEER} fit: `ecmpvpn down` and `ecmpvpn run` \
                 free their places",
                peer.name,
                peer.tunnels.len()
            )));
        }
        let row = |(slot, (name, weight)): (u32, &(InterfaceName, Option<u16>))| {
            let former = self.tunnel(TunnelId::new(number, slot));
            let ifindex = match (tunnels.get(name), weight) {
                (_, Some(0)) => 0,
                (Some(ifindex), _) => *ifindex,
                (None, _) => {
                    let text = format!("tunnel {name} of peer {} has no interface", peer.name);
                    return Err(DataplaneError::Mismatch(text));
                }
            };
            let same_name = text(&former.name) == name.as_str();
            let same_device = same_name && ifindex != 0 && former.ifindex == ifindex;
            // A weight that was set at run time stays until the configuration's weight changes.
            let stays = same_name && before.is_some_and(|before| before.tunnels.contains(&(name.clone(), *weight)));
            let (weight, learnt) = match weight {
                _ if stays => (former.weight, former.flags & tunnel_flags::AUTO_WEIGHT),
                Some(weight) => (*weight, 0),
                // Learning continues with the weight that was learned before.
                None if same_name => (former.weight, tunnel_flags::AUTO_WEIGHT),
                None => (FIRST_WEIGHT, tunnel_flags::AUTO_WEIGHT),
            };
            let attached = if same_device { former.flags & !tunnel_flags::AUTO_WEIGHT } else { 0 };
            let record = Tunnel {
                key: key_of(name.as_str().as_bytes()),
                ifindex,
                inverse_weight: inverse_weight(weight),
                weight,
                flags: attached | learnt,
                padding: 0,
                name: padded(name.as_str()),
            };
            Ok(Row { slot, record, former, same_device, is_new: ifindex != 0 && !(same_name && former.ifindex != 0) })
        };
        (0..).zip(&peer.tunnels).map(row).collect()
    }

    /// Marks the slots whose tunnel is gone or new as down, and those whose tunnel is gone as closed to new flows. Then
    /// forgets the devices that are no longer used.
    ///
    /// A new tunnel is opened here and not last: if this process is killed before the end, the next one finds the tunnel's
    /// record, takes it for one that it knows, and could not tell a closed one from one that was drained.
    fn drop_tunnels(&mut self, number: u32, rows: &[Row], pins: &Pins) -> Result<(), DataplaneError> {
        let bits = |of: fn(&&Row) -> bool| rows.iter().filter(of).fold(0, |bits, row| bits | 1 << row.slot);
        let peer = &self.state.peers()[number as usize];
        // Whatever is down carries nothing, open or not.
        peer.live.set_bits(bits(|row| row.record.ifindex == 0 || row.is_new), false);
        peer.open.set_bits(bits(|row| row.record.ifindex == 0), false);
        peer.open.set_bits(bits(|row| row.is_new), true);
        for row in rows.iter().filter(|row| !row.same_device) {
            if row.former.ifindex != 0 {
                match self.tunnel_ids.remove(&row.former.ifindex) {
                    // A process that was killed here has removed it. The kernel says so in its own words.
                    Err(MapError::KeyNotFound) => {}
                    Err(error) if os_error(&error) == Some(libc::ENOENT) => {}
                    removed => removed.map_err(write_error(maps::TUNNEL_IDS))?,
                }
            }
            if row.record.ifindex == 0 {
                Pins::forget(&pins.tunnel_link(TunnelId::new(number, row.slot)))?;
            }
        }
        Ok(())
    }

    fn write_row(&mut self, number: u32, row: &Row) -> Result<(), DataplaneError> {
        let id = TunnelId::new(number, row.slot);
        if row.is_new {
            let cpus = nr_cpus().map_err(|(_, error)| DataplaneError::new("counting the CPUs", error))?;
            let zeros = PerCpuValues::try_from(vec![TunnelCounters::default(); cpus])
                .map_err(|error| DataplaneError::new("counting the CPUs", error))?;
            self.counters.set(id.number(), zeros, 0).map_err(write_error(maps::COUNTERS))?;
            self.health.entries()[id.index()].clear();
            let (load, first) = (&self.state.loads()[id.index()], first_load(id));
            load.cost.set(first.cost.get());
            load.weighted_cost.set(first.weighted_cost.get());
            for word in [&load.free_ns, &load.level_ns, &load.stamp_ns, &load.rebalance_moves] {
                word.set(0);
            }
            load.delay_ns.set(0);
            load.link.set(first.link.get());
        }
        if row.record != row.former {
            self.state.state().tunnels[id.index()].set(row.record);
        }
        let ifindex = row.record.ifindex;
        if ifindex != 0 && self.tunnel_ids.get(&ifindex, 0).ok() != Some(id.number()) {
            fault::point("map write: tunnel id");
            self.tunnel_ids.insert(row.record.ifindex, id.number(), 0).map_err(write_error(maps::TUNNEL_IDS))?;
        }
        Ok(())
    }

    fn note_qdisc(&self, id: TunnelId, attached: Attached) {
        if attached.qdisc_added {
            let record = self.tunnel(id);
            let flags = record.flags | tunnel_flags::CLSACT_ADDED;
            self.state.state().tunnels[id.index()].set(Tunnel { flags, ..record });
        }
    }

    /// Sets each bucket's home to the tunnel that now ranks first in it. Nothing changes if weights and tunnels are as
    /// before, unless an earlier process may have been killed half-way (`all`).
    fn set_homes(&self, number: u32, rows: &[Row], all: bool) {
        let now: Vec<Candidate> = rows.iter().map(|row| row.record.candidate()).collect();
        if !all && rows.iter().all(|row| row.record.candidate() == row.former.candidate()) {
            return;
        }
        let first = self.state.peers()[number as usize].bucket_base as usize;
        let buckets = self.buckets.entries()[first..].iter().take(BUCKETS_PER_PEER as usize);
        for (number, bucket) in (0..).zip(buckets) {
            let home = u8::try_from(home(number, &now)).unwrap_or(0);
            if bucket.home.get() != home {
                bucket.home.set(home);
            }
        }
    }

    fn set_policy(&self, number: u32, before: Option<&PeerTable>, peer: &PeerTable) {
        if before.is_none_or(|before| before.policy != peer.policy) {
            self.state.peers()[number as usize].policy.set(peer.policy.number());
        }
        if before.is_none_or(|before| before.restore_order != peer.restore_order) {
            self.state.peers()[number as usize].flags.set_bits(peer_flags::UNRESTORED, !peer.restore_order);
        }
    }

    /// Lists the links again. Tunnels that shared a link still share it. A new tunnel has its own link until more is
    /// known.
    fn set_paths(&self, number: u32, rows: &[Row], all: bool) {
        if !all && rows.iter().all(|row| !row.is_new && (row.record.ifindex != 0) == (row.former.ifindex != 0)) {
            return;
        }
        let mut links: Vec<(TunnelId, u32)> = Vec::new();
        for row in rows.iter().filter(|row| row.record.ifindex != 0) {
            let link = self.state.loads()[TunnelId::new(number, row.slot).index()].link();
            match links.iter_mut().find(|(other, _)| *other == link) {
                Some((_, tunnels)) => *tunnels |= 1 << row.slot,
                None => links.push((link, 1 << row.slot)),
            }
        }
        let first = TunnelId::new(number, 0).index();
        for (path, (link, tunnels)) in self.state.state().paths[first..].iter().zip(&links) {
            path.link.set(link.number());
            path.tunnels.set(*tunnels);
        }
        let count = u32::try_from(links.len()).unwrap_or(0);
        self.state.peers()[number as usize].path_count.set(count);
    }

    /// If all tunnels of the peer are new, marks them as up. Otherwise probing must first find that they are up.
    fn revive_peer(&self, number: u32, rows: &[Row]) {
        let new = rows.iter().filter(|row| row.is_new).fold(0, |bits, row| bits | 1 << row.slot);
        let peer = &self.state.peers()[number as usize];
        if !rows.iter().any(|row| row.record.ifindex != 0 && !row.is_new) {
            peer.live.set_bits(new, true);
        }
    }

    fn set_prefixes(&mut self, table: &SteeringTable) -> Result<(), DataplaneError> {
        prefixes::change(&mut self.prefixes, table, &self.state.state().settings)
    }

    fn set_settings(&self, table: &SteeringTable, steering_ifindex: u32, attached: Attached) {
        let added = if attached.qdisc_added { settings_flags::CLSACT_ADDED } else { 0 };
        let kept = if table.mss_clamp { 0 } else { settings_flags::MSS_KEPT };
        let former = self.settings();
        let flags = former.flags & !settings_flags::MSS_KEPT | added | kept;
        let settings = Settings { seed: table.seed, steering_ifindex, flags, tick_ns: tick_ns(), ..former };
        self.state.state().settings.set(settings);
    }
}
