//! Weighted rendezvous hashing: every bucket ranks the tunnels. Each tunnel's share follows its weight. Adding or
//! removing a tunnel moves only the buckets of that tunnel.
//!
//! A tunnel's score in a bucket is `-log2(u) / weight`, where `u` is a hash of both in (0, 1]. The lowest score wins.
//! Source: Schindelhauer, Schomaker, "Weighted distributed hash tables", SPAA 2005. All arithmetic uses integers,
//! because the BPF program ranks the tunnels by the same rule.
//!
//! Error: the logarithm is interpolated between 129 points. It is off by less than 1.1e-5, and exact at `u = 1`. The
//! inverse weight has 24 fractional bits. It is off by less than 3.0e-5 of its value for weights up to 1,000. A
//! tunnel's share is off by less than 0.3% of itself.

use crate::flow::mix;

/// What a tunnel is ranked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Distinguishes the tunnel from the others, whatever its slot; see [`key_of`].
    pub key: u64,
    /// See [`inverse_weight`].
    pub inverse_weight: u32,
}

/// A tunnel's key, from its name. So the tunnel ranks the same after other tunnels were added or removed.
#[must_use]
pub fn key_of(name: &[u8]) -> u64 {
    mix(name.iter().fold(0, |hash, byte| mix(hash ^ u64::from(*byte)).wrapping_add(1)))
}

/// 2^24 divided by `weight` and rounded; 0 stands for weight 0. A tunnel of weight 0 is chosen only if all others have
/// weight 0 too.
#[must_use]
pub const fn inverse_weight(weight: u16) -> u32 {
    match weight {
        0 => 0,
        _ => ((1 << 24) + weight as u32 / 2) / weight as u32,
    }
}

/// A tunnel's score in a bucket. The lowest score wins.
#[must_use]
#[inline(always)]
pub fn score(bucket: u32, candidate: Candidate) -> u64 {
    let distance = negative_log2(mix(mix(u64::from(bucket)) ^ candidate.key));
    match candidate.inverse_weight {
        0 => 1 << 63 | distance,
        inverse => distance * u64::from(inverse),
    }
}

/// [`pick`] found no tunnel.
pub const NONE: u32 = u32::MAX;

/// The slot of the first-ranked tunnel among those whose bits are set in `candidates`, or [`NONE`]. It is a plain
/// number, because BPF functions can return one.
#[inline(always)]
pub fn pick(bucket: u32, candidates: u32, candidate: impl Fn(u32) -> Option<Candidate>) -> u32 {
    let mut best = u64::MAX;
    let mut chosen = NONE;
    for slot in 0..u32::BITS {
        if candidates >> slot & 1 == 0 {
            continue;
        }
        let Some(candidate) = candidate(slot) else { continue };
        let score = score(bucket, candidate);
        if score < best {
            best = score;
            chosen = slot;
        }
    }
    chosen
}

/// A bucket's home: the slot of the first-ranked tunnel of all `candidates`, or [`NONE`] if there are none.
#[must_use]
#[cfg(not(target_arch = "bpf"))]
pub fn home(bucket: u32, candidates: &[Candidate]) -> u32 {
    pick(bucket, u32::MAX, |slot| candidates.get(slot as usize).copied())
}

/// About -log2((x + 1) / 2^64), with 31 fractional bits: 0 to 2^37.
#[inline(always)]
fn negative_log2(x: u64) -> u64 {
    let x = x | 1;
    let zeros = x.leading_zeros();
    // The mantissa's fraction: 7 bits choose the segment, the next 32 the place within it.
    let fraction = x << zeros << 1;
    let segment = (fraction >> 57) as usize & (SEGMENTS - 1);
    let remainder = fraction >> 25 & 0xffff_ffff;
    let (from, to) = (u64::from(LOG2[segment]), u64::from(LOG2[segment + 1]));
    let log2 = from + (((to - from) * remainder) >> 32);
    (u64::from(zeros + 1) << 31) - log2
}

const SEGMENTS: usize = 128;

/// log2(1 + i/128) with 31 fractional bits.
static LOG2: [u32; SEGMENTS + 1] = {
    let mut table = [0; SEGMENTS + 1];
    let mut i = 0;
    while i <= SEGMENTS {
        table[i] = log2_of_segment(i as u32);
        i += 1;
    }
    table
};

/// Computes the logarithm bit by bit: squares the number and takes the carry.
const fn log2_of_segment(i: u32) -> u32 {
    if i == SEGMENTS as u32 {
        return 1 << 31;
    }
    let mut x = ((SEGMENTS as u32 + i) as u128) << 56;
    let mut log2 = 0;
    let mut bit = 31;
    while bit > 0 {
        bit -= 1;
        x = (x * x) >> 63;
        if x >> 64 != 0 {
            x >>= 1;
            log2 |= 1 << bit;
        }
    }
    log2
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::format;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    const BUCKETS: u32 = crate::layout::BUCKETS_PER_PEER;

    fn tunnels(weights: &[u16]) -> Vec<Candidate> {
        let candidate = |(i, weight): (usize, &u16)| Candidate {
            key: key_of(format!("wg{i}").as_bytes()),
            inverse_weight: inverse_weight(*weight),
        };
        weights.iter().enumerate().map(candidate).collect()
    }

    fn homes(tunnels: &[Candidate], candidates: u32) -> Vec<u32> {
        (0..BUCKETS).map(|bucket| pick(bucket, candidates, |slot| Some(tunnels[slot as usize]))).collect()
    }

    fn all(count: usize) -> u32 {
        (((1u64 << count) - 1) & 0xffff_ffff) as u32
    }

    fn counts(homes: &[u32]) -> BTreeMap<u32, f64> {
        let mut counts = BTreeMap::new();
        for home in homes {
            *counts.entry(*home).or_insert(0.0) += 1.0;
        }
        counts
    }

    #[test]
    fn the_logarithm_is_as_near_as_documented() {
        for i in 0..200_000u64 {
            let x = mix(i) >> (i % 60);
            let exact = 64.0 - ((x | 1) as f64).log2();
            let found = negative_log2(x) as f64 / f64::from(1u32 << 31);
            assert!((found - exact).abs() < 1.1e-5, "{x}: {found} {exact}");
        }
        assert!(negative_log2(u64::MAX) <= 1);
        assert_eq!(negative_log2(0), 64 << 31);
    }

    #[test]
    fn shares_follow_weights() {
        for weights in [&[1, 1, 1][..], &[1, 2, 3, 10], &[1000, 1, 500], &[7; 32]] {
            let tunnels = tunnels(weights);
            let counts = counts(&homes(&tunnels, all(weights.len())));
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for (slot, weight) in weights.iter().enumerate() {
                let share = f64::from(*weight) / total;
                let expected = share * f64::from(BUCKETS);
                let deviation = (expected * (1.0 - share)).sqrt();
                let found = counts.get(&(slot as u32)).copied().unwrap_or(0.0);
                assert!((found - expected).abs() < 4.5 * deviation + 0.003 * expected, "{weights:?} {slot}: {found}");
            }
        }
    }

    #[test]
    fn weight_zero_is_a_last_resort() {
        let tunnels = tunnels(&[0, 1, 0]);
        assert!(homes(&tunnels, 0b111).iter().all(|home| *home == 1));
        let drained = counts(&homes(&tunnels, 0b101));
        assert!(drained[&0] > 15_000.0 && drained[&2] > 15_000.0);
        assert_eq!(pick(0, 0, |slot| Some(tunnels[slot as usize])), NONE);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn only_the_buckets_of_a_lost_tunnel_move(weights in prop::collection::vec(1u16..=1000, 2..=32), lost in 0usize..32) {
            let lost = (lost % weights.len()) as u32;
            let tunnels = tunnels(&weights);
            let before = homes(&tunnels, all(weights.len()));
            let after = homes(&tunnels, all(weights.len()) & !(1 << lost));
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(before == after || *before == lost);
                prop_assert!(*after != lost);
            }
        }

        #[test]
        fn a_heavier_tunnel_only_gains(weights in prop::collection::vec(1u16..=500, 2..=8), which in 0usize..8, more in 1u16..=500) {
            let which = which % weights.len();
            let mut heavier = weights.clone();
            heavier[which] += more;
            let before = homes(&tunnels(&weights), all(weights.len()));
            let after = homes(&tunnels(&heavier), all(weights.len()));
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(before == after || *after == which as u32);
            }
        }
    }
}
