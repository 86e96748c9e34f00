//! The peers' prefixes in the maps, and what lets the programs remember where destinations belong.

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{MapData, MapError};
use ecmpvpn_common::layout::{Destination, Settings, maps};
use ipnet::IpNet;

use super::DataplaneError;
use super::fill::{destination, prefix_key};
use crate::plan::SteeringTable;

/// Everything zero but what tells of the table's prefixes.
pub(super) fn settings(table: &SteeringTable) -> Settings {
    /// Even: they do not change.
    const FIRST_VERSION: u32 = 2;
    let (ipv4_mask, ipv6_mask) = masks(table);
    Settings { prefixes_version: FIRST_VERSION, ipv4_mask, ipv6_mask, ..Settings::default() }
}

/// As many leading bits of an address as decide about its peer, as the maps have addresses.
fn masks(table: &SteeringTable) -> (u32, [u32; 4]) {
    let longest = |of_family: fn(&IpNet) -> bool| {
        let prefixes = table.peers.iter().flat_map(|peer| &peer.prefixes).filter(|prefix| of_family(prefix));
        prefixes.max_by_key(|prefix| prefix.prefix_len()).map(|prefix| destination(prefix.netmask()).address)
    };
    let ipv4 = longest(|prefix| matches!(prefix, IpNet::V4(_))).unwrap_or_default();
    (ipv4[0], longest(|prefix| matches!(prefix, IpNet::V6(_))).unwrap_or_default())
}

/// Makes the prefixes those of `table` while packets flow. `write` writes the settings.
pub(super) fn change(
    map: &mut LpmTrie<MapData, Destination, u32>,
    table: &SteeringTable,
    mut settings: Settings,
    mut write: impl FnMut(Settings) -> Result<(), DataplaneError>,
) -> Result<(), DataplaneError> {
    let reading = |error| DataplaneError::new(format!("reading map {}", maps::PREFIXES), error);
    let writing = |error| DataplaneError::new(format!("writing to map {}", maps::PREFIXES), error);
    let wanted: Vec<(Key<Destination>, u32)> = (0..)
        .zip(&table.peers)
        .flat_map(|(number, peer)| peer.prefixes.iter().map(move |prefix| (prefix_key(*prefix), number)))
        .collect();
    let there: Result<Vec<(Key<Destination>, u32)>, MapError> = map.iter().collect();
    let there = there.map_err(reading)?;
    let has = |all: &[(Key<Destination>, u32)], (key, number): &(Key<Destination>, u32)| {
        all.iter().any(|(other, peer)| peer == number && parts(other) == parts(key))
    };
    let changing = settings.prefixes_version | 1;
    if settings.prefixes_version != changing
        && wanted.len() == there.len()
        && wanted.iter().all(|entry| has(&there, entry))
    {
        return Ok(());
    }
    // Nothing is remembered while they change, and nothing that was remembered before counts after it.
    settings.prefixes_version = changing;
    write(settings)?;
    for (key, number) in &wanted {
        map.insert(key, *number, 0).map_err(writing)?;
    }
    for (key, _) in there.iter().filter(|(key, _)| !wanted.iter().any(|(other, _)| parts(other) == parts(key))) {
        map.remove(key).map_err(writing)?;
    }
    (settings.ipv4_mask, settings.ipv6_mask) = masks(table);
    write(settings)?;
    settings.prefixes_version = changing.wrapping_add(1);
    write(settings)
}

/// What tells prefixes apart.
fn parts(key: &Key<Destination>) -> (u32, u32, [u32; 4]) {
    let destination = key.data();
    (key.prefix_len(), destination.family, destination.address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Policy;
    use crate::plan::PeerTable;

    #[test]
    fn masks_are_as_long_as_the_longest_prefix() {
        let table = |prefixes: &[&str]| SteeringTable {
            seed: 0,
            flowlet_gap_us: None,
            rules: Vec::new(),
            peers: vec![PeerTable {
                name: "site-b".into(),
                policy: Policy::Hash,
                prefixes: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
                tunnels: Vec::new(),
            }],
        };
        let found = |prefixes: &[&str]| {
            let (ipv4, ipv6) = masks(&table(prefixes));
            (ipv4.to_ne_bytes(), ipv6.map(u32::from_be))
        };
        assert_eq!(found(&["10.0.0.0/8", "10.20.0.0/18"]), ([255, 255, 192, 0], [0; 4]));
        assert_eq!(found(&["0.0.0.0/0", "fd00::/48", "fd00:1::/33"]), ([0; 4], [u32::MAX, 0xffff_0000, 0, 0]));
    }
}
