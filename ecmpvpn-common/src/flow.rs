//! The key that identifies a flow, and the keyed hash that maps flows to buckets.

/// Value of [`FlowKey::family`] for IPv4.
pub const IPV4: u8 = 4;
/// Value of [`FlowKey::family`] for IPv6.
pub const IPV6: u8 = 6;

/// Bits of `hash_fields`: those of the kernel's `net.ipv4.fib_multipath_hash_fields`.
/// Source: `FIB_MULTIPATH_HASH_FIELD_*`, `include/net/ip_fib.h`.
pub mod fields {
    pub const SRC_IP: u32 = 1 << 0;
    pub const DST_IP: u32 = 1 << 1;
    pub const IP_PROTO: u32 = 1 << 2;
    pub const FLOW_LABEL: u32 = 1 << 3;
    /// Source port. An SPI, GRE key or ICMP id counts if either port does.
    pub const SRC_PORT: u32 = 1 << 4;
    pub const DST_PORT: u32 = 1 << 5;
    /// Addresses, protocol and ports.
    pub const FIVE_TUPLE: u32 = SRC_IP | DST_IP | IP_PROTO | SRC_PORT | DST_PORT;
    /// All fields that ecmpvpn supports.
    pub const ALL: u32 = FIVE_TUPLE | FLOW_LABEL;
}

/// Identifies a packet's flow. Addresses, ports and ids are as in the packet (network byte order).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Source address; an IPv4 address is the first word, the others are 0.
    pub src: [u32; 4],
    /// Destination address, likewise.
    pub dst: [u32; 4],
    /// Source port of TCP, UDP, SCTP, DCCP and UDP-Lite; else 0.
    pub sport: u16,
    /// Destination port; else 0.
    pub dport: u16,
    /// SPI of ESP and AH, key of GRE, identifier of an ICMP echo; else 0.
    pub id: u32,
    /// IPv6 flow label; counts only where `hash_fields` asks for it.
    pub flow_label: u32,
    /// IP protocol number; 0 if the chain of headers is longer than the parser walks.
    pub protocol: u8,
    /// [`IPV4`] or [`IPV6`].
    pub family: u8,
    /// Zero.
    pub padding: [u8; 2],
}

const _: () = assert!(size_of::<FlowKey>() == 48);

impl FlowKey {
    /// The key of the other direction.
    #[must_use]
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, ..*self }
    }

    /// The key with only the fields in `mask`; see [`fields`]. The flow label goes into `id`, which is part of the
    /// hash.
    #[must_use]
    #[inline(always)]
    pub fn masked(&self, mask: u32) -> Self {
        let has = |bits: u32| mask & bits != 0;
        let mut key = Self { family: self.family, ..Self::default() };
        if has(fields::SRC_IP) {
            key.src = self.src;
        }
        if has(fields::DST_IP) {
            key.dst = self.dst;
        }
        if has(fields::IP_PROTO) {
            key.protocol = self.protocol;
        }
        if has(fields::SRC_PORT) {
            key.sport = self.sport;
        }
        if has(fields::DST_PORT) {
            key.dport = self.dport;
        }
        if has(fields::SRC_PORT | fields::DST_PORT) {
            key.id = self.id;
        }
        if has(fields::FLOW_LABEL) {
            key.id ^= self.flow_label;
        }
        key
    }

    /// A key that is the same for both directions of a flow.
    #[must_use]
    #[inline(always)]
    pub fn ordered(&self) -> Self {
        let mut swap = self.sport > self.dport;
        // Starts with the least significant word, so that the most significant word that differs decides. The ports
        // decide only if no word differs.
        for word in (0..4).rev() {
            if self.src[word] != self.dst[word] {
                swap = self.src[word] > self.dst[word];
            }
        }
        if swap { self.reversed() } else { *self }
    }

    /// A 64-bit hash of the fields in `mask`, keyed by `seed`. With `symmetric` both directions have the same hash.
    ///
    /// No two keys have the same hash with every seed. IPv4 takes two rounds: a round is a multiplication and a shift.
    /// The first loses nothing, and no difference of the addresses leaves it, with every seed, in the bits of the
    /// ports alone. IPv6 addresses are more than one word. Rounds one after the other would let a difference of one
    /// word cancel that of the word before, with every seed. So they are summed by [`sum`] instead.
    #[must_use]
    #[inline(always)]
    pub fn hash(&self, seed: u64, mask: u32, symmetric: bool) -> u64 {
        let mut key = *self;
        if mask != fields::FIVE_TUPLE {
            key = key.masked(mask);
        }
        if symmetric {
            key = key.ordered();
        }
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let ports = u32::from(key.sport) << 16 | u32::from(key.dport);
        // A key never has both ports and an id.
        let tail = pair(ports ^ key.id, u32::from(key.protocol) << 8 | u32::from(key.family));
        let hash = if key.family == IPV6 {
            sum(seed, &key.src, &key.dst)
        } else {
            round(seed, pair(key.src[0], key.dst[0]), MULTIPLIERS[0])
        };
        mix(round(hash, tail, MULTIPLIERS[1]))
    }
}

/// Odd, with evenly spread bits: the multipliers of splitmix64, and the golden ratio.
const MULTIPLIERS: [u64; 3] = [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

/// Sum of products of the words of two addresses, each word with a key added. How far a word's difference changes the
/// sum depends on the key of the word that it is multiplied with, so no difference cancels another one with every seed.
/// Source: the function NH of Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: fast and secure message
/// authentication", CRYPTO 1999.
#[inline(always)]
fn sum(seed: u64, src: &[u32; 4], dst: &[u32; 4]) -> u64 {
    let mut sum = 0_u64;
    for word in 0..4 {
        let key = round(seed.wrapping_add(KEYS[word]), 0, MULTIPLIERS[2]);
        let (low, high) = (key as u32, (key >> 32) as u32);
        let product = u64::from(src[word].wrapping_add(low)) * u64::from(dst[word].wrapping_add(high));
        sum = sum.wrapping_add(product);
    }
    sum
}

/// Added to the seed for the keys of the four words: fractional digits of pi, so nothing that is related to
/// [`MULTIPLIERS`].
const KEYS: [u64; 4] = [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89];

#[inline(always)]
fn round(hash: u64, word: u64, multiplier: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(multiplier);
    hash ^ hash >> 32
}

/// Spreads every bit of `x` over all 64: the last step of splitmix64. Source: Steele, Lea, Flood, "Fast splittable
/// pseudorandom number generators", OOPSLA 2014.
#[must_use]
#[inline(always)]
pub fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(MULTIPLIERS[1]);
    let x = (x ^ x >> 27).wrapping_mul(MULTIPLIERS[2]);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    const SEED: u64 = 0x1f2e_3d4c;

    fn ipv4(src: u32, dst: u32, sport: u16, dport: u16) -> FlowKey {
        let mut key = FlowKey { family: IPV4, protocol: 6, ..FlowKey::default() };
        (key.src[0], key.dst[0]) = (src.to_be(), dst.to_be());
        (key.sport, key.dport) = (sport.to_be(), dport.to_be());
        key
    }

    fn ipv6(word: u32) -> FlowKey {
        let mut key = ipv4(0xfd00_0020, 0xfd00_0010, 40_000, 443);
        key.family = IPV6;
        key.src[3] = word.to_be();
        key.dst[3] = (word ^ 1).to_be();
        key
    }

    /// Flips bit number `bit` of everything that is hashed.
    fn flipped(key: &FlowKey, bit: usize) -> FlowKey {
        let mut key = *key;
        let words = if key.family == IPV6 { 4 } else { 1 };
        let (word, in_word) = (bit / 32, 1 << (bit % 32));
        match word {
            w if w < words => key.src[w] ^= in_word,
            w if w < 2 * words => key.dst[w - words] ^= in_word,
            _ if bit % 32 < 16 => key.sport ^= in_word as u16,
            _ => key.dport ^= (in_word >> 16) as u16,
        }
        key
    }

    #[test]
    fn one_bit_of_input_flips_half_of_the_bucket_bits() {
        for (family, bits) in [(IPV4, 96), (IPV6, 288)] {
            for bit in 0..bits {
                let mut flips = [0u32; 16];
                for i in 0..2048u32 {
                    let i = i.wrapping_mul(2_654_435_761);
                    let key = if family == IPV4 { ipv4(i, !i, i as u16, 443) } else { ipv6(i) };
                    let hash = |key: &FlowKey| key.hash(SEED, fields::FIVE_TUPLE, false);
                    let difference = hash(&key) ^ hash(&flipped(&key, bit));
                    for (out, count) in flips.iter_mut().enumerate() {
                        *count += (difference >> out & 1) as u32;
                    }
                }
                // 2,048 coin tosses have a standard deviation of 22.6. The test looks at 6,144 pairs of bits.
                let worst = flips.iter().map(|count| count.abs_diff(1024)).max().unwrap();
                assert!(worst < 130, "family {family}, bit {bit}: {flips:?}");
            }
        }
    }

    /// Chi-square of `keys` over 1,024 buckets.
    fn chi_square(keys: impl Iterator<Item = FlowKey>, seed: u64) -> f64 {
        let mut counts = vec![0u32; 1024];
        let mut total = 0u32;
        for key in keys {
            counts[(key.hash(seed, fields::FIVE_TUPLE, false) & 1023) as usize] += 1;
            total += 1;
        }
        let mean = f64::from(total) / 1024.0;
        counts.iter().map(|count| (f64::from(*count) - mean).powi(2) / mean).sum()
    }

    #[test]
    fn flows_spread_evenly_over_buckets() {
        for seed in [0, 1, SEED, u64::MAX] {
            let structured: [(&str, Vec<FlowKey>); 4] = [
                ("source ports", (0..60_000u16).map(|i| ipv4(0x0a01_0203, 0x0a14_0507, i, 443)).collect()),
                ("hosts", (0..60_000).map(|i| ipv4(0x0a01_0000 + i, 0x0a14_0507, 5_000, 443)).collect()),
                (
                    "both ends",
                    (0..65_536).map(|i| ipv4(0x0a01_0000 + (i >> 8), 0x0a14_0000 + (i & 255), 7, 7)).collect(),
                ),
                ("IPv6 hosts", (0..60_000).map(ipv6).collect()),
            ];
            for (what, keys) in structured {
                // 1,023 degrees of freedom have mean 1,023 and standard deviation 45.2. Six deviations are allowed.
                let chi = chi_square(keys.into_iter(), seed);
                assert!((750.0..1_295.0).contains(&chi), "{what}, seed {seed}: {chi}");
            }
        }
    }

    /// Flips bit number `bit`, as they are in the packet, of addresses, ports and protocol. IPv6 has 296 of them, IPv4
    /// has 104.
    fn flip_in_packet(key: &mut FlowKey, bit: usize) {
        let words = if key.family == IPV6 { 4 } else { 1 };
        match bit / 32 {
            word if word < words => key.src[word] ^= 1 << (bit % 32),
            word if word < 2 * words => key.dst[word - words] ^= 1 << (bit % 32),
            word if word > 2 * words => key.protocol ^= 1 << (bit % 8),
            _ if bit % 32 < 16 => key.sport ^= 1 << (bit % 16),
            _ => key.dport ^= 1 << (bit % 16),
        }
    }

    /// Whether flipping `bits` in keys with several seeds ever changes nothing.
    fn collides(family: u8, bits: &[usize]) -> bool {
        (0..4_u64).all(|i| {
            let seed = mix(i + 1);
            let mut key = FlowKey { family, protocol: 6, sport: 0x1234, dport: 443, ..FlowKey::default() };
            let words = if family == IPV6 { 4 } else { 1 };
            for word in 0..words {
                (key.src[word], key.dst[word]) = (mix(seed + word as u64) as u32, mix(!seed + word as u64) as u32);
            }
            let before = key.hash(seed, fields::FIVE_TUPLE, false);
            for bit in bits {
                flip_in_packet(&mut key, *bit);
            }
            key.hash(seed, fields::FIVE_TUPLE, false) == before
        })
    }

    #[test]
    fn no_difference_of_few_bits_collides_with_every_seed() {
        for (family, bits) in [(IPV4, 104), (IPV6, 296)] {
            for a in 0..bits {
                assert!(!collides(family, &[a]), "family {family}: {a}");
                for b in 0..a {
                    assert!(!collides(family, &[a, b]), "family {family}: {a} {b}");
                    for c in 0..b {
                        assert!(!collides(family, &[a, b, c]), "family {family}: {a} {b} {c}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_top_bits_of_neighbouring_words_do_not_cancel() {
        // Bit 7 of bytes 11 and 15 of the source, and of byte 15 of the destination.
        let flip = |address: &mut [u32; 4], byte: usize| address[byte / 4] ^= 0x80_u32 << (byte % 4 * 8);
        for seed in [0, 1, SEED, u64::MAX] {
            let key = ipv6(77);
            let mut other = key;
            flip(&mut other.src, 11);
            flip(&mut other.src, 15);
            flip(&mut other.dst, 15);
            let hash = |key: &FlowKey| key.hash(seed, fields::FIVE_TUPLE, false);
            assert_ne!(hash(&key), hash(&other), "seed {seed}");
        }
    }

    #[test]
    fn the_seed_keys_the_hash() {
        for key in [ipv4(1, 2, 3, 4), ipv6(7)] {
            let hash = |seed| key.hash(seed, fields::FIVE_TUPLE, false);
            assert!((0..64).all(|bit| hash(SEED) != hash(SEED ^ 1 << bit)));
        }
    }

    #[test]
    fn masked_fields_do_not_count() {
        let key = ipv4(0x0a01_0203, 0x0a14_0507, 1000, 2000);
        let hash = |key: &FlowKey, mask| key.hash(SEED, mask, false);
        for (field, other) in [
            (fields::SRC_IP, ipv4(0x0a01_0204, 0x0a14_0507, 1000, 2000)),
            (fields::DST_IP, ipv4(0x0a01_0203, 0x0a14_0508, 1000, 2000)),
            (fields::SRC_PORT, ipv4(0x0a01_0203, 0x0a14_0507, 1001, 2000)),
            (fields::DST_PORT, ipv4(0x0a01_0203, 0x0a14_0507, 1000, 2001)),
            (fields::IP_PROTO, FlowKey { protocol: 17, ..key }),
            (fields::FLOW_LABEL, FlowKey { flow_label: 5, ..key }),
        ] {
            assert_ne!(hash(&key, fields::ALL), hash(&other, fields::ALL), "{field}");
            assert_eq!(hash(&key, fields::ALL & !field), hash(&other, fields::ALL & !field), "{field}");
        }
        let labelled = FlowKey { flow_label: 5, ..key };
        assert_eq!(hash(&key, fields::FIVE_TUPLE), hash(&labelled, fields::FIVE_TUPLE));
    }

    #[test]
    fn a_symmetric_hash_is_one_for_both_directions() {
        for key in [ipv4(1, 2, 3, 4), ipv4(2, 1, 3, 4), ipv4(9, 9, 3, 4), ipv4(9, 9, 4, 3), ipv6(77), ipv6(78)] {
            let hash = |key: &FlowKey, symmetric| key.hash(SEED, fields::FIVE_TUPLE, symmetric);
            assert_eq!(hash(&key, true), hash(&key.reversed(), true));
            assert_ne!(hash(&key, false), hash(&key.reversed(), false));
        }
    }
}
