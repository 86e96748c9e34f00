//! The maps; their contents and names are described in `ecmpvpn_common::layout`. Sizes are set at load.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray};
use ecmpvpn_common::decide::{self, Tables};
use ecmpvpn_common::layout;
use ecmpvpn_common::layout::{Bucket, Destination, Health, Peer, Reason, Settings, Tunnel, TunnelCounters};

#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map]
static PREFIXES: LpmTrie<Destination, u32> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map]
static PEERS: Array<Peer> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static TUNNELS: Array<Tunnel> = Array::with_max_entries(1, 0);
#[map]
static TUNNEL_IDS: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);
#[map]
static BUCKETS: Array<Bucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static COUNTERS: PerCpuArray<TunnelCounters> = PerCpuArray::with_max_entries(1, 0);
#[map]
static HEALTH: Array<Health> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(layout::REASONS, 0);

/// The maps, as the decision sees them.
pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        SETTINGS.get(0)
    }

    #[inline(always)]
    fn peer_of(&self, destination: &Destination) -> Option<u32> {
        PREFIXES.get(Key::new(8 * size_of::<Destination>() as u32, *destination)).copied()
    }

    #[inline(always)]
    fn peer(&self, peer: u32) -> Option<&Peer> {
        PEERS.get(peer)
    }

    #[inline(always)]
    fn tunnel(&self, id: u32) -> Option<&Tunnel> {
        TUNNELS.get(id)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        BUCKETS.get(index)
    }

    #[inline(always)]
    fn best(&self, peer: u32, within: u32, live: u32) -> u32 {
        ecmpvpn_best(peer, within, live)
    }
}

/// Global, so that the verifier looks at its loop once and not on every path that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_best(peer: u32, within: u32, live: u32) -> u32 {
    decide::best(&Maps, peer, within, live)
}

/// The id of the tunnel whose device has this index.
#[inline(always)]
pub fn tunnel_id(ifindex: u32) -> Option<u32> {
    // SAFETY: the value is one word and is copied at once; the map is not written while programs are attached.
    unsafe { TUNNEL_IDS.get(ifindex) }.copied()
}

/// Applies `change` to this CPU's counters of a tunnel.
#[inline(always)]
pub fn count(tunnel: u32, change: impl FnOnce(&mut TunnelCounters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(tunnel) {
        // SAFETY: only this CPU writes to its copy, and TC programs do not interrupt one another on a CPU.
        change(unsafe { &mut *counters });
    }
}

/// Counts a packet that was not put onto a tunnel.
#[inline(always)]
pub fn count_reason(reason: Reason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: as in `count`.
        unsafe { *counter += 1 };
    }
}
