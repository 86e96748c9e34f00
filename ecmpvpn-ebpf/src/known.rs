//! Which peers the destinations of late were for: a look at memory in place of a longest-prefix match.

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use ecmpvpn_common::flow::IPV4;
use ecmpvpn_common::layout::{Destination, Settings};

const BITS: u32 = 8;

#[map]
static KNOWN: PerCpuArray<Known> = PerCpuArray::with_max_entries(1 << BITS, 0);

/// A range of destinations that no prefix divides, and its peer.
struct Known {
    /// Its first address.
    address: [u32; 4],
    family: u32,
    /// See [`Settings::prefixes_version`]: what was found in another version counts no more.
    version: u32,
    peer: u32,
}

/// The destination's peer, if it is known.
#[inline(always)]
pub fn peer_of(destination: &Destination, settings: &Settings) -> Option<u32> {
    let (family, address) = range_of(destination, settings);
    let version = settings.prefixes_version;
    // SAFETY: only this CPU writes to its copy, and TC programs do not interrupt one another on a CPU.
    let known = unsafe { KNOWN.get_ptr(place(&address))?.as_ref()? };
    let [first, rest @ ..] = known.address;
    let is_it = version & 1 == 0
        && known.version == version
        && known.family == family
        && first == address[0]
        && (family == u32::from(IPV4) || rest == address[1..]);
    is_it.then_some(known.peer)
}

/// Keeps what the prefixes said in a version, which was looked at before them: if they have changed since, this counts
/// no more.
#[inline(always)]
pub fn remember(destination: &Destination, settings: &Settings, version: u32, peer: u32) {
    let (family, address) = range_of(destination, settings);
    if let Some(known) = KNOWN.get_ptr_mut(place(&address)) {
        // SAFETY: as above.
        unsafe { known.write(Known { address, family, version, peer }) };
    }
}

#[inline(always)]
fn range_of(destination: &Destination, settings: &Settings) -> (u32, [u32; 4]) {
    let Destination { family, address: [a, b, c, d] } = *destination;
    let [mask_a, mask_b, mask_c, mask_d] = settings.ipv6_mask;
    let address = if family == u32::from(IPV4) {
        [a & settings.ipv4_mask, 0, 0, 0]
    } else {
        [a & mask_a, b & mask_b, c & mask_c, d & mask_d]
    };
    (family, address)
}

#[inline(always)]
fn place(address: &[u32; 4]) -> u32 {
    let [a, b, c, d] = *address;
    (a ^ b ^ c ^ d).wrapping_mul(0x9e37_79b1) >> (u32::BITS - BITS)
}
