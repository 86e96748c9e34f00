//! Writes a steering table into the maps.

use aya::maps::HashMap;
use aya::maps::lpm_trie::LpmTrie;
use ecmpvpn_common::layout::{
    Address, BUCKETS_PER_PEER, Bucket, Load, Path, Peer, Settings, State, Tunnel, TunnelId, maps, peer_flags,
    settings_flags, tunnel_flags,
};
use ecmpvpn_common::load::cost_of_rate;
use ecmpvpn_common::rendezvous::{Candidate, home, inverse_weight, key_of};
use ecmpvpn_common::shared::Shared;
use std::collections::BTreeMap;

use super::keys::prefix_key;
use super::mapped::Mapped;
use super::object::{Loaded, Options, tick_ns};
use super::{DataplaneError, RuleMaps, enomem, prefixes};
use crate::config::InterfaceName;
use crate::plan::rules::{self, RuleTables, TunnelNames};
use crate::plan::{PeerTable, SteeringTable};

/// Automatic flowlet gap until the tunnels' round-trip times are known, microseconds. It is longer than the difference
/// between most paths.
const FIRST_GAP_US: u32 = 50_000;
/// Bytes that a new flow is expected to send soon.
const EXPECTED_BYTES: u32 = 64 << 10;
/// Assumed rate of a link until its rate is known, bits per second.
const FIRST_RATE: u64 = 1_000_000_000;

/// A tunnel's weight until it is learned.
pub(super) const FIRST_WEIGHT: u16 = 1;

impl Loaded {
    /// Loads the object, fills its maps by `table`, and loads the programs. `tunnels` has the interface index of each
    /// tunnel that the table names.
    ///
    /// # Errors
    /// The table is too large, it names a tunnel that `tunnels` lacks, or the kernel refuses.
    pub fn new(
        table: &SteeringTable,
        steering_ifindex: u32,
        tunnels: &BTreeMap<InterfaceName, u32>,
        options: &Options,
    ) -> Result<Self, DataplaneError> {
        let mut loaded = Self::maps(table, tunnels.len(), options)?;
        let settings = Settings {
            seed: table.seed,
            hash_fields: options.hash_fields,
            flags: if options.symmetric { settings_flags::SYMMETRIC } else { 0 }
                | if table.mss_clamp { 0 } else { settings_flags::MSS_KEPT },
            steering_ifindex,
            tick_ns: tick_ns(),
            ..prefixes::settings(table)
        };
        fill(&mut loaded, &settings, table, tunnels)?;
        loaded.load_programs()?;
        Ok(loaded)
    }
}

/// Fills all maps. At first all tunnels are up, and each tunnel is assumed to have a link of its own.
fn fill(
    loaded: &mut Loaded,
    settings: &Settings,
    table: &SteeringTable,
    tunnels: &BTreeMap<InterfaceName, u32>,
) -> Result<(), DataplaneError> {
    let mut state = Mapped::<State>::new(maps::STATE, loaded.array_data(maps::STATE)?)?;
    let state = &mut state.entries_mut()[0];
    state.settings.set(*settings);
    state.peer_count.set(u32::try_from(table.peers.len()).unwrap_or(u32::MAX));
    let mut buckets = Mapped::<Bucket>::new(maps::BUCKETS, loaded.array_data(maps::BUCKETS)?)?;
    for (number, peer) in (0..).zip(&table.peers) {
        let base = number * BUCKETS_PER_PEER;
        state.peers[number as usize] = peer_record(peer, base, table.flowlet_gap_us);
        let rows = tunnel_records(peer, tunnels)?;
        let candidates: Vec<Candidate> = rows.iter().map(Tunnel::candidate).collect();
        set_homes(&mut buckets.entries_mut()[base as usize..][..BUCKETS_PER_PEER as usize], &candidates);

        for (slot, row) in (0..).zip(&rows) {
            let id = TunnelId::new(number, slot);
            state.tunnels[id.index()].set(*row);
            state.loads[id.index()] = first_load(id);
            state.paths[id.index()] = Path { link: Shared::new(id.number()), tunnels: Shared::new(1 << slot) };
        }
        let mut map: HashMap<_, u32, u32> = typed(loaded.map_mut(maps::TUNNEL_IDS)?.try_into(), maps::TUNNEL_IDS)?;
        for (slot, row) in (0..).zip(&rows) {
            written(map.insert(row.ifindex, TunnelId::new(number, slot).number(), 0), maps::TUNNEL_IDS)?;
        }
        let mut map: LpmTrie<_, Address, u32> = typed(loaded.map_mut(maps::PREFIXES)?.try_into(), maps::PREFIXES)?;
        for prefix in &peer.prefixes {
            written(enomem::retried(|| map.insert(&prefix_key(*prefix), number, 0)), maps::PREFIXES)?;
        }
    }
    let names: TunnelNames =
        table.peers.iter().map(|peer| peer.tunnels.iter().map(|(name, _)| Some(name.clone())).collect()).collect();
    let placed = rules::place(&table.rules).map_err(|error| DataplaneError::Mismatch(error.to_string()))?;
    let tables = RuleTables::of(&placed, &names);
    RuleMaps::new(|name| loaded.duplicate(name))?.write(&tables)?;
    for (rules, record) in tables.peers.iter().zip(&state.peers) {
        record.rules.set(*rules);
    }
    Ok(())
}

fn typed<T>(map: Result<T, aya::maps::MapError>, name: &str) -> Result<T, DataplaneError> {
    map.map_err(|error| DataplaneError::new(format!("looking at map {name}"), error))
}

fn written(result: Result<(), aya::maps::MapError>, name: &str) -> Result<(), DataplaneError> {
    result.map_err(|error| DataplaneError::new(format!("writing to map {name}"), error))
}

fn peer_record(peer: &PeerTable, bucket_base: u32, gap_us: Option<u32>) -> Peer {
    let count = u32::try_from(peer.tunnels.len()).unwrap_or(u32::MAX);
    let all = u32::MAX.checked_shr(u32::BITS.saturating_sub(count)).unwrap_or(0);
    Peer {
        live: Shared::new(all),
        open: Shared::new(all),
        bucket_base,
        bucket_mask: BUCKETS_PER_PEER - 1,
        policy: Shared::new(peer.policy.number()),
        tunnel_count: Shared::new(count),
        gap_ns: Shared::new(gap_ns(gap_us)),
        path_count: Shared::new(count),
        flags: Shared::new(if peer.restore_order { 0 } else { peer_flags::UNRESTORED }),
        expected_bytes: Shared::new(EXPECTED_BYTES),
        name: padded(&peer.name),
        ..Peer::default()
    }
}

/// A flowlet gap in nanoseconds, as the maps hold it. `None`: automatic, which starts with [`FIRST_GAP_US`].
pub(super) fn gap_ns(gap_us: Option<u32>) -> u32 {
    gap_us.unwrap_or(FIRST_GAP_US).saturating_mul(1000)
}

/// A tunnel's load before anything was sent, with a link of its own.
pub(super) fn first_load(id: TunnelId) -> Load {
    let cost = cost_of_rate(FIRST_RATE);
    Load {
        link: Shared::new(id.number()),
        cost: Shared::new(cost),
        weighted_cost: Shared::new(cost),
        ..Load::default()
    }
}

fn tunnel_records(peer: &PeerTable, tunnels: &BTreeMap<InterfaceName, u32>) -> Result<Vec<Tunnel>, DataplaneError> {
    let record = |(name, weight): &(InterfaceName, Option<u16>)| {
        let ifindex = tunnels
            .get(name)
            .copied()
            .ok_or_else(|| DataplaneError::Mismatch(format!("tunnel {name} of peer {} has no interface", peer.name)))?;
        Ok(Tunnel {
            key: key_of(name.as_str().as_bytes()),
            ifindex,
            inverse_weight: inverse_weight(weight.unwrap_or(FIRST_WEIGHT)),
            weight: weight.unwrap_or(FIRST_WEIGHT),
            flags: if weight.is_none() { tunnel_flags::AUTO_WEIGHT } else { 0 },
            padding: 0,
            name: padded(name.as_str()),
        })
    };
    peer.tunnels.iter().map(record).collect()
}

/// Sets each bucket's home: the tunnel that ranks first in it.
fn set_homes(buckets: &mut [Bucket], candidates: &[Candidate]) {
    for (number, bucket) in (0..).zip(buckets) {
        // A peer without tunnels has no homes. None of its tunnels is up either.
        let home = u8::try_from(home(number, candidates)).unwrap_or(0);
        *bucket = Bucket { tunnel: Shared::new(home), home: Shared::new(home), ..Bucket::default() };
    }
}

/// `text` padded with zeros. The part that does not fit is cut off.
pub(super) fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let length = text.len().min(N);
    bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Policy;

    #[test]
    fn all_tunnels_live_at_first() {
        let peer = |count: usize| PeerTable {
            name: "site-b".into(),
            policy: Policy::Hash,
            restore_order: true,
            prefixes: vec![],
            tunnels: (0..count).map(|i| (InterfaceName::new(&format!("wg{i}")).unwrap(), Some(1))).collect(),
        };
        for (count, live) in [(0, 0), (1, 1), (3, 0b111), (31, u32::MAX >> 1), (32, u32::MAX)] {
            let record = peer_record(&peer(count), 0, None);
            assert_eq!((record.live.get(), record.open.get()), (live, live));
        }
    }
}
