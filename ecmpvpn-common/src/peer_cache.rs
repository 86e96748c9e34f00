//! Cache from recent IPv4 destinations to their peers: reading one word replaces a longest-prefix match.
//!
//! A word holds a range of destinations that no prefix divides ([`Settings::ipv4_mask`]), the version of the prefixes
//! in which it was looked up, and the peer. It is read and written as a whole, so all CPUs share the words without a
//! lock. Only destinations that leave the link are cached.

use crate::layout::{MAX_PEERS, PEER_CACHE_WORDS, Settings};
use crate::shared::Shared;

const PEER_BITS: u32 = 8;
const VERSION_BITS: u32 = 24;
const _: () = assert!(MAX_PEERS <= 1 << PEER_BITS && VERSION_BITS + PEER_BITS == u32::BITS);

/// The peer that `destination` (network byte order) belongs to, if the cache has it.
#[inline(always)]
pub fn peer_of(cache: &[Shared<u64>; PEER_CACHE_WORDS as usize], settings: &Settings, destination: u32) -> Option<u32> {
    let address = destination & settings.ipv4_mask;
    let word = cache[place(address)].get();
    (word >> PEER_BITS == tag(address, settings.prefixes_version)).then_some(word as u32 & ((1 << PEER_BITS) - 1))
}

/// Caches the result of a look-up. `version` was read before the look-up: if the prefixes have changed since, the entry
/// is not used.
#[inline(always)]
pub fn remember(
    cache: &[Shared<u64>; PEER_CACHE_WORDS as usize],
    settings: &Settings,
    destination: u32,
    version: u32,
    peer: u32,
) {
    // The prefixes are being changed.
    if version & 1 == 1 || peer >= MAX_PEERS {
        return;
    }
    let address = destination & settings.ipv4_mask;
    cache[place(address)].set(tag(address, version) << PEER_BITS | u64::from(peer));
}

#[inline(always)]
fn tag(address: u32, version: u32) -> u64 {
    u64::from(version << PEER_BITS) << (u32::BITS - PEER_BITS) | u64::from(address)
}

#[inline(always)]
fn place(address: u32) -> usize {
    (address.wrapping_mul(0x9e37_79b1) >> (u32::BITS - PEER_CACHE_WORDS.ilog2())) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_counts_for_its_range_and_version() {
        let cache = [const { Shared::new(0) }; PEER_CACHE_WORDS as usize];
        let of = |octets: [u8; 4]| u32::from_ne_bytes(octets);
        let mut settings = Settings { prefixes_version: 2, ipv4_mask: of([255, 255, 255, 0]), ..Settings::default() };
        let found = |settings: &Settings, octets| peer_of(&cache, settings, of(octets));
        assert_eq!(found(&settings, [0, 0, 0, 0]), None);
        remember(&cache, &settings, of([10, 20, 30, 40]), 2, 63);
        assert_eq!(found(&settings, [10, 20, 30, 99]), Some(63));
        for other in [[10, 20, 31, 40], [11, 20, 30, 40], [10, 21, 30, 40]] {
            assert_eq!(found(&settings, other), None);
        }
        remember(&cache, &settings, of([10, 20, 31, 40]), 2, 0);
        assert_eq!((found(&settings, [10, 20, 31, 1]), found(&settings, [10, 20, 30, 1])), (Some(0), Some(63)));
        for version in [3, 4, 2 + (1 << 23)] {
            settings.prefixes_version = version;
            assert_eq!(found(&settings, [10, 20, 30, 40]), None, "version {version}");
        }
        // While the prefixes change, nothing is cached.
        settings.prefixes_version = 5;
        remember(&cache, &settings, of([10, 20, 30, 40]), 5, 1);
        assert_eq!(found(&settings, [10, 20, 30, 40]), None);
    }
}
