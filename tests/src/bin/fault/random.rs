//! Random numbers that follow only from a seed. Not for secrets.

use std::time::Duration;

/// `SplitMix64`. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of `seed` for one purpose. For another purpose, the same seed gives other numbers.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let mut random = Self(seed);
        for byte in purpose.bytes() {
            random.0 = random.next() ^ u64::from(byte);
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `count`, which must not be 0. Uniform, as far as 64 bits allow.
    pub fn below(&mut self, count: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(count);
        u64::try_from(wide >> 64).expect("it is below count")
    }

    /// True with a probability of `percent` percent.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Picks one of several, each with the same probability.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let at = self.below(u64::try_from(of.len()).expect("few"));
        &of[usize::try_from(at).expect("an index")]
    }

    /// A number of members, sites or tunnels below `count`.
    pub fn index(&mut self, count: u8) -> u8 {
        u8::try_from(self.below(u64::from(count))).expect("it is below count")
    }

    /// Picks one of several, with a probability in proportion to its weight.
    pub fn weighed<T: Copy>(&mut self, of: &[(u64, T)]) -> T {
        let mut at = self.below(of.iter().map(|(weight, _)| weight).sum());
        for (weight, thing) in of {
            if at < *weight {
                return *thing;
            }
            at -= weight;
        }
        of[of.len() - 1].1
    }

    /// A time in whole milliseconds, at least `least` and below `most`. Uniform.
    pub fn between(&mut self, least: Duration, most: Duration) -> Duration {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let span = ms(most).saturating_sub(ms(least)).max(1);
        least + Duration::from_millis(self.below(span))
    }

    /// As [`Random::between`], but each octave above `least` has the same probability. Most timers are short, so short
    /// times matter most.
    pub fn between_octaves(&mut self, least: Duration, most: Duration) -> Duration {
        let octaves = (0..31).take_while(|octave| least * (1 << octave) < most).count();
        let octave = self.below(u64::try_from(octaves.max(1)).expect("few"));
        let from = least * (1 << octave);
        self.between(from, (from * 2).min(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_numbers_are_those_of_splitmix64() {
        // From the reference implementation with seed 1234567: Vigna, https://prng.di.unimi.it/splitmix64.c.
        let mut random = Random(1_234_567);
        let found = [random.next(), random.next(), random.next()];
        assert_eq!(found, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn a_seed_and_a_purpose_give_the_same_numbers_again_and_others_give_others() {
        let drawn = |seed, purpose| {
            let mut random = Random::new(seed, purpose);
            [random.next(), random.next()]
        };
        assert_eq!(drawn(7, "faults"), drawn(7, "faults"));
        assert_ne!(drawn(7, "faults"), drawn(8, "faults"));
        assert_ne!(drawn(7, "faults"), drawn(7, "ports"));
    }

    #[test]
    fn what_is_drawn_stays_within_its_bounds_and_reaches_them() {
        let mut random = Random::new(1, "test");
        let (mut low, mut high) = (0, 0);
        for _ in 0..1_000 {
            let time = random.between(10 * MS, 20 * MS);
            assert!((10 * MS..20 * MS).contains(&time));
            let time = random.between_octaves(100 * MS, 1_000 * MS);
            assert!((100 * MS..1_000 * MS).contains(&time));
            low += u32::from(time < 200 * MS);
            high += u32::from(time >= 800 * MS);
            assert!(random.index(3) < 3);
        }
        assert!(low > 150 && high > 150, "{low} short and {high} long of 1,000");
        assert_eq!(random.between(5 * MS, 5 * MS), 5 * MS);
    }

    #[test]
    fn weights_are_kept() {
        let mut random = Random::new(1, "test");
        let drawn: Vec<u8> = (0..1_000).map(|_| random.weighed(&[(1, 0), (3, 1), (0, 2)])).collect();
        let count = |which| drawn.iter().map(|thing| usize::from(*thing == which)).sum::<usize>();
        assert!(count(0).abs_diff(250) < 60 && count(2) == 0, "{} and {}", count(0), count(2));
    }
}
