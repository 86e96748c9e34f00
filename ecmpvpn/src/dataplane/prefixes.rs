//! The peers' prefixes in the maps, and the version and masks that the programs' peer caches need.

use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{MapData, MapError};
use ecmpvpn_common::layout::{Address, Settings, maps};
use ecmpvpn_common::shared::Whole;
use ipnet::IpNet;
use rustix::thread::{MembarrierCommand, membarrier};

use super::keys::{destination, prefix_key};
use super::{DataplaneError, enomem};
use crate::plan::SteeringTable;

/// Settings that depend on the table's prefixes. All other fields are zero.
pub(super) fn settings(table: &SteeringTable) -> Settings {
    /// Even: no change is in progress.
    const FIRST_VERSION: u32 = 2;
    let (ipv4_mask, ipv6_mask) = masks(table);
    Settings { prefixes_version: FIRST_VERSION, ipv4_mask, ipv6_mask, ..Settings::default() }
}

/// Masks of the leading bits of an address that decide its peer and whether it leaves the link; network byte order.
fn masks(table: &SteeringTable) -> (u32, [u32; 4]) {
    let longest = |of_family: fn(&IpNet) -> bool| {
        let prefixes = table.peers.iter().flat_map(|peer| &peer.prefixes).filter(|prefix| of_family(prefix));
        prefixes.max_by_key(|prefix| prefix.prefix_len()).map(|prefix| destination(prefix.netmask()).address)
    };
    let least = |octets: [u8; 4]| u32::from_ne_bytes(octets);
    let ipv4 = longest(|prefix| matches!(prefix, IpNet::V4(_))).unwrap_or_default();
    let mut ipv6 = longest(|prefix| matches!(prefix, IpNet::V6(_))).unwrap_or_default();
    // The link-local prefixes are 169.254.0.0/16 and fe80::/10. The multicast prefixes are shorter.
    ipv6[0] |= least([255, 0xc0, 0, 0]);
    (ipv4[0] | least([255, 255, 0, 0]), ipv6)
}

/// Changes the prefixes to those of `table` while packets flow.
pub(super) fn change(
    map: &mut LpmTrie<MapData, Address, u32>,
    table: &SteeringTable,
    record: &Whole<Settings>,
) -> Result<(), DataplaneError> {
    let mut settings = record.get();
    let reading = |error| DataplaneError::new(format!("reading map {}", maps::PREFIXES), error);
    let writing = |error| DataplaneError::new(format!("writing to map {}", maps::PREFIXES), error);
    let desired: Vec<(Key<Address>, u32)> = (0..)
        .zip(&table.peers)
        .flat_map(|(number, peer)| peer.prefixes.iter().map(move |prefix| (prefix_key(*prefix), number)))
        .collect();
    let there: Result<Vec<(Key<Address>, u32)>, MapError> = map.iter().collect();
    let there = there.map_err(reading)?;
    let has = |all: &[(Key<Address>, u32)], (key, number): &(Key<Address>, u32)| {
        all.iter().any(|(other, peer)| peer == number && parts(other) == parts(key))
    };
    let changing = settings.prefixes_version | 1;
    if settings.prefixes_version != changing
        && desired.len() == there.len()
        && desired.iter().all(|entry| has(&there, entry))
    {
        return Ok(());
    }
    // Nothing is cached while the version is odd. Entries from before the change are not used after it.
    settings.prefixes_version = changing;
    record.set(settings);
    for (key, number) in &desired {
        enomem::retried(|| map.insert(key, *number, 0)).map_err(writing)?;
    }
    for (key, _) in there.iter().filter(|(key, _)| !desired.iter().any(|(other, _)| parts(other) == parts(key))) {
        map.remove(key).map_err(writing)?;
    }
    (settings.ipv4_mask, settings.ipv6_mask) = masks(table);
    record.set(settings);
    wait_for_programs();
    settings.prefixes_version = changing.wrapping_add(1);
    record.set(settings);
    Ok(())
}

/// Waits until every run of a program that began before has ended, so that no run sees both the former prefixes and the
/// version that is written next. A program reads the version before the prefixes, but a CPU may carry out the two reads
/// in the other order (arm64), and BPF has no load with acquire before Linux 6.15. A barrier in the program would cost
/// each packet something, for a change that is rare.
///
/// TC programs run in an RCU read-side critical section (`sch_handle_egress()`, net/core/dev.c), and this command waits
/// for a grace period (`synchronize_rcu()`, kernel/sched/membarrier.c).
fn wait_for_programs() {
    /// Much longer than a program takes for a packet.
    const AT_MOST: Duration = Duration::from_millis(100);
    // Refused if some CPUs have no timer tick (nohz_full), and by some system call filters.
    if membarrier(MembarrierCommand::Global).is_err() {
        std::thread::sleep(AT_MOST);
    }
}

/// The parts in which prefixes differ.
fn parts(key: &Key<Address>) -> (u32, u32, [u32; 4]) {
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
            mss_clamp: true,
            rules: Vec::new(),
            peers: vec![PeerTable {
                name: "site-b".into(),
                policy: Policy::Hash,
                restore_order: true,
                prefixes: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
                tunnels: Vec::new(),
            }],
        };
        let found = |prefixes: &[&str]| {
            let (ipv4, ipv6) = masks(&table(prefixes));
            (ipv4.to_ne_bytes(), ipv6.map(u32::from_be))
        };
        assert_eq!(found(&["10.0.0.0/8", "10.20.0.0/18"]), ([255, 255, 192, 0], [0xffc0_0000, 0, 0, 0]));
        assert_eq!(found(&["0.0.0.0/0", "fd00::/48"]), ([255, 255, 0, 0], [u32::MAX, 0xffff_0000, 0, 0]));
        // The shortest masks still distinguish addresses that never leave the link.
        assert_eq!(found(&["::/0"]), ([255, 255, 0, 0], [0xffc0_0000, 0, 0, 0]));
    }
}
