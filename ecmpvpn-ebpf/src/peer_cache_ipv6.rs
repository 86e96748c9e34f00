//! Cache from recent IPv6 destinations to their peers; for IPv4 see `ecmpvpn_common::peer_cache`. An address does not
//! fit into one word, so each CPU has a cache of its own.

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use ecmpvpn_common::layout::Settings;

const BITS: u32 = 8;

#[map]
static KNOWN_IPV6: PerCpuArray<Entry> = PerCpuArray::with_max_entries(1 << BITS, 0);

/// A range of destinations that no prefix divides, and its peer.
struct Entry {
    /// First address of the range.
    address: [u32; 4],
    /// See [`Settings::prefixes_version`]. An entry of another version is not used.
    version: u32,
    peer: u32,
}

/// The destination's peer, if the cache has it.
#[inline(always)]
pub fn peer_of(destination: &[u32; 4], settings: &Settings) -> Option<u32> {
    let address = range_of(destination, settings);
    let version = settings.prefixes_version;
    // SAFETY: only this CPU writes to its copy, and TC programs do not interrupt one another on a CPU.
    let entry = unsafe { KNOWN_IPV6.get_ptr(place(&address))?.as_ref()? };
    (version & 1 == 0 && entry.version == version && entry.address == address).then_some(entry.peer)
}

/// Caches the result of a look-up. `version` was read before the look-up: if the prefixes have changed since, the entry
/// is not used.
#[inline(always)]
pub fn remember(destination: &[u32; 4], settings: &Settings, version: u32, peer: u32) {
    let address = range_of(destination, settings);
    if let Some(entry) = KNOWN_IPV6.get_ptr_mut(place(&address)) {
        // SAFETY: as above.
        unsafe { entry.write(Entry { address, version, peer }) };
    }
}

#[inline(always)]
fn range_of(destination: &[u32; 4], settings: &Settings) -> [u32; 4] {
    let [a, b, c, d] = *destination;
    let [mask_a, mask_b, mask_c, mask_d] = settings.ipv6_mask;
    [a & mask_a, b & mask_b, c & mask_c, d & mask_d]
}

#[inline(always)]
fn place(address: &[u32; 4]) -> u32 {
    let [a, b, c, d] = *address;
    (a ^ b ^ c ^ d).wrapping_mul(0x9e37_79b1) >> (u32::BITS - BITS)
}
