//! Names, sizes and records of the BPF maps. Integers are in host byte order unless a field says otherwise.
//!
//! Records that the programs and the host write at any time consist of [`Shared`](crate::shared::Shared) words. The
//! host reads and writes them through mapped memory.

mod counters;
mod names;
mod records;
mod rules;

pub use counters::{OrderCounters, REASONS, Reason, TunnelCounters, how};
pub use names::{
    BUCKETS_PER_PEER, LAYOUT_VERSION, MAX_PEERS, MAX_RULE_PREFIXES, MAX_RULES, MAX_TUNNELS, MAX_TUNNELS_PER_PEER,
    PEER_CACHE_WORDS, globals, maps, programs, test_run,
};
pub use records::{
    Address, Bucket, Health, Load, Order, Path, Peer, Policy, Settings, State, Tunnel, TunnelId, bucket_flags,
    bucket_seen, peer_flags, settings_flags, tunnel_flags,
};
pub use rules::{PEERS_OWN, Rule, RuleSet, TunnelSet, rule_fields, rule_flags};

const _: () = {
    assert!(size_of::<Settings>() == 48);
    assert!(size_of::<Address>() == 20);
    assert!(size_of::<Peer>() == 112);
    assert!(size_of::<Load>() == 56);
    assert!(size_of::<Path>() == 8);
    assert!(size_of::<Rule>() == 8);
    assert!(size_of::<RuleSet>() == 8);
    assert!(size_of::<TunnelSet>() == 8);
    assert!(size_of::<Tunnel>() == 40);
    assert!(size_of::<Bucket>() == 16);
    assert!(size_of::<Health>() == 40);
    assert!(size_of::<TunnelCounters>() == 64);
    assert!(size_of::<Order>() == 64);
    assert!(size_of::<OrderCounters>() == 32);
    assert!(size_of::<State>() == 48 + 16 + 8 + 256 * 8 + 64 * (112 + 64) + 2048 * (40 + 56 + 8));
    assert!(Policy::ALL.len() == 4, "`Policy::of_bits` looks at two bits");
    assert!(PEER_CACHE_WORDS.is_power_of_two());
    assert!(BUCKETS_PER_PEER.is_power_of_two());
    assert!(Reason::ALL.len() <= REASONS as usize);
};

/// Every record is `repr(C)`, has no implicit padding (see the sizes above), and is valid for any bytes.
#[cfg(feature = "aya")]
mod pod {
    #![allow(clippy::undocumented_unsafe_blocks, reason = "the module says it once for all")]
    unsafe impl aya::Pod for super::Address {}
    unsafe impl aya::Pod for super::TunnelCounters {}
    unsafe impl aya::Pod for super::OrderCounters {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_numbered_as_listed() {
        for (number, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, number);
        }
    }

    #[test]
    fn policies_are_numbered_as_listed() {
        for (number, policy) in (0..).zip(Policy::ALL) {
            assert_eq!((policy.number(), Policy::of(number), Policy::of_bits(number)), (number, Some(policy), policy));
        }
        assert_eq!(Policy::of(4), None);
    }

    #[test]
    fn map_names_fit_the_kernel() {
        assert!(maps::ALL.iter().all(|name| name.len() <= 15));
    }
}
