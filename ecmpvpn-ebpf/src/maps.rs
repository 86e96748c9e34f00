//! The maps. `ecmpvpn_common::layout` describes their contents and names. Sizes are set when the object is loaded.

use core::ptr;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, PerCpuHashMap};
use ecmpvpn_common::arrivals::{Arrival, ArrivalCounters, MAX_FOLLOWED};
use ecmpvpn_common::flow::IPV4;
use ecmpvpn_common::layout;
use ecmpvpn_common::layout::{
    Address, Bucket, Health, Load, Order, OrderCounters, Path, Peer, Rule, RuleSet, Settings, State, Tunnel,
    TunnelCounters, TunnelId, TunnelSet,
};
use ecmpvpn_common::peer_cache;
use ecmpvpn_common::tables::Tables;

use crate::peer_cache_ipv6;

#[map]
static STATE: Array<State> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static PREFIXES: LpmTrie<Address, u32> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
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
#[map]
static RULES: Array<Rule> = Array::with_max_entries(layout::MAX_RULES, BPF_F_MMAPABLE);
#[map]
static RULE_FIELDS: Array<RuleSet> = Array::with_max_entries(layout::rule_fields::COUNT, BPF_F_MMAPABLE);
#[map]
static RULE_SOURCES: LpmTrie<Address, u64> = LpmTrie::with_max_entries(layout::MAX_RULE_PREFIXES, BPF_F_NO_PREALLOC);
#[map]
static RULE_DESTS: LpmTrie<Address, u64> = LpmTrie::with_max_entries(layout::MAX_RULE_PREFIXES, BPF_F_NO_PREALLOC);
#[map]
static RULE_MARKS: HashMap<u32, u64> = HashMap::with_max_entries(layout::MAX_RULES, BPF_F_NO_PREALLOC);
#[map]
static RULE_TUNNELS: Array<TunnelSet> = Array::with_max_entries(layout::MAX_RULES * layout::MAX_PEERS, BPF_F_MMAPABLE);

#[map]
static ARRIVALS: PerCpuHashMap<Arrival, ArrivalCounters> = PerCpuHashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map]
static MEMBERS: HashMap<u32, u32> = HashMap::with_max_entries(MAX_FOLLOWED, BPF_F_NO_PREALLOC);

#[map]
static ORDER_COUNTS: PerCpuArray<OrderCounters> = PerCpuArray::with_max_entries(layout::MAX_PEERS, 0);

/// Applies `change` to this CPU's counters of a peer's packets in order.
#[inline(always)]
pub fn count_order(peer: u32, change: impl FnOnce(&mut OrderCounters)) {
    // SAFETY: only this CPU writes to its copy, and TC programs do not interrupt one another on a CPU.
    if let Some(counters) = ORDER_COUNTS.get_ptr_mut(peer).and_then(|counters| unsafe { counters.as_mut() }) {
        change(counters);
    }
}

/// The maps, as the decision sees them.
pub struct Maps<'a> {
    state: &'a State,
    /// Reading of the clock; 0: ask the kernel.
    pub now: u64,
}

impl Maps<'_> {
    /// How packets that arrive from a peer are put back in order.
    #[inline(always)]
    pub fn order(&self, peer: u32) -> &Order {
        const { assert!(layout::MAX_PEERS.is_power_of_two()) };
        &self.state.orders[(peer & (layout::MAX_PEERS - 1)) as usize]
    }

    /// `now` is the reading of the clock, or 0 to ask the kernel. The state always exists, but the verifier does not
    /// know that.
    #[inline(always)]
    pub fn at(now: u64) -> Option<Self> {
        STATE.get(0).map(|state| Self { state, now })
    }
}

/// The id, masked to the number of possible tunnels. The maps hold no other ids. This is a mask and not a comparison,
/// because after a comparison the compiler may index with a copy that the verifier does not connect with the check. The
/// id goes through memory, because otherwise the compiler would mask its parts before it combines them, and kernels
/// before 6.4 would not see that the parts are bounded.
#[inline(always)]
fn within_tunnels(id: TunnelId) -> usize {
    const { assert!(layout::MAX_TUNNELS.is_power_of_two() && layout::MAX_PEERS.is_power_of_two()) };
    // SAFETY: the reference is valid.
    let id = unsafe { ptr::read_volatile(&raw const id) }.number();
    (id & (layout::MAX_TUNNELS - 1)) as usize
}

/// The key that matches a single address.
#[inline(always)]
fn full_key(address: &Address) -> Key<Address> {
    Key::new(8 * size_of::<Address>() as u32, *address)
}

impl Tables for Maps<'_> {
    #[inline(always)]
    fn now(&self) -> u64 {
        if self.now != 0 {
            return self.now;
        }
        // SAFETY: the helpers take no arguments. The exact clock is read first, so that a tick that begins in between
        // makes no time too early.
        let (now, ticks) = unsafe { (bpf_ktime_get_ns(), bpf_jiffies64()) };
        if let Some(settings) = self.settings() {
            self.state.clock.record(ticks, settings.tick_ns, now);
        }
        now
    }

    #[inline(always)]
    fn coarse_now(&self, tick_ns: u32) -> Option<u64> {
        if self.now == 0 {
            // SAFETY: the helper takes no arguments. The verifier replaces it by a read of memory (`do_misc_fixups()`,
            // kernel/bpf/verifier.c).
            return self.state.clock.at(unsafe { bpf_jiffies64() }, tick_ns);
        }
        Some(self.now - self.now % u64::from(tick_ns))
    }

    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        // SAFETY: a word may change at any time. The decision is then right for the former or for the present settings.
        Some(unsafe { self.state.settings.look() })
    }

    #[inline(always)]
    fn peer_of(&self, destination: &Address) -> Option<u32> {
        let settings = self.settings()?;
        self.cached_peer_of(destination, settings).or_else(|| {
            // SAFETY: the reference is valid. The read is volatile, so that it stands before the look-up and
            // not again later. A CPU that reads in another order does no harm: whoever changes the prefixes waits for
            // all runs before it writes the next version.
            let version = unsafe { ptr::read_volatile(&raw const settings.prefixes_version) };
            let peer = PREFIXES.get(full_key(destination)).copied()?;
            if destination.family == u32::from(IPV4) {
                peer_cache::remember(&self.state.peer_cache, settings, destination.address[0], version, peer);
            } else {
                peer_cache_ipv6::remember(&destination.address, settings, version, peer);
            }
            Some(peer)
        })
    }

    #[inline(always)]
    fn cached_peer_of(&self, destination: &Address, settings: &Settings) -> Option<u32> {
        if destination.family == u32::from(IPV4) {
            peer_cache::peer_of(&self.state.peer_cache, settings, destination.address[0])
        } else {
            peer_cache_ipv6::peer_of(&destination.address, settings)
        }
    }

    #[inline(always)]
    fn peer(&self, peer: u32) -> Option<&Peer> {
        Some(&self.state.peers[(peer & (layout::MAX_PEERS - 1)) as usize])
    }

    #[inline(always)]
    fn tunnel(&self, id: TunnelId) -> Option<&Tunnel> {
        // SAFETY: as in `settings`.
        Some(unsafe { self.state.tunnels[within_tunnels(id)].look() })
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        BUCKETS.get(index)
    }

    #[inline(always)]
    fn load(&self, id: TunnelId) -> Option<&Load> {
        Some(&self.state.loads[within_tunnels(id)])
    }

    #[inline(always)]
    fn update_counters<R>(&self, id: TunnelId, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R> {
        count(id, change)
    }

    #[inline(always)]
    fn path(&self, peer: u32, place: u32) -> Option<&Path> {
        Some(&self.state.paths[within_tunnels(TunnelId::new(peer, place))])
    }

    #[inline(always)]
    fn rule(&self, rule: u32) -> Option<&Rule> {
        RULES.get(rule)
    }

    #[inline(always)]
    fn rule_field(&self, at: u32) -> Option<&RuleSet> {
        RULE_FIELDS.get(at)
    }

    #[inline(always)]
    fn rules_of_mark(&self, mark: u32) -> Option<u64> {
        // SAFETY: the value is one word and is copied at once.
        unsafe { RULE_MARKS.get(mark) }.copied()
    }

    #[inline(always)]
    fn rules_of_source(&self, source: &Address) -> u64 {
        RULE_SOURCES.get(full_key(source)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn rules_of_destination(&self, destination: &Address) -> u64 {
        RULE_DESTS.get(full_key(destination)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn rule_tunnels(&self, rule: u32, peer: u32) -> u32 {
        RULE_TUNNELS.get(rule * layout::MAX_PEERS + peer).map_or(0, |set| set.tunnels.get())
    }
}

/// The id of the tunnel whose device has this index.
#[inline(always)]
pub fn tunnel_id(ifindex: u32) -> Option<TunnelId> {
    // SAFETY: the value is one word, which is written as a whole, and is copied at once.
    unsafe { TUNNEL_IDS.get(ifindex) }.copied().map(TunnelId::from_number)
}

/// Applies `change` to this CPU's counters of a tunnel.
#[inline(always)]
pub fn count<R>(tunnel: TunnelId, change: impl FnOnce(&mut TunnelCounters) -> R) -> Option<R> {
    // SAFETY: only this CPU writes to its copy, and TC programs do not interrupt one another on a CPU.
    COUNTERS.get_ptr_mut(tunnel.number()).map(|counters| change(unsafe { &mut *counters }))
}

/// Counts a packet that was not put onto a tunnel; `reason` is the number of the reason.
#[inline(always)]
pub fn count_reason(reason: u32) {
    if let Some(counter) = REASONS.get_ptr_mut(reason) {
        // SAFETY: as in `count`.
        unsafe { *counter += 1 };
    }
}

/// This CPU's counters of a tunnel on a member; `None` if the packet belongs to no tunnel.
#[inline(always)]
pub fn arrivals<'a>(arrival: &Arrival) -> Option<&'a mut ArrivalCounters> {
    // SAFETY: as in `count`. The kernel keeps the memory while the program runs, even if the entry is deleted.
    ARRIVALS.get_ptr_mut(arrival).map(|counters| unsafe { &mut *counters })
}
