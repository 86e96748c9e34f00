//! What waits on links: as the programs reckon it, and as it is. Pure.

use std::collections::BTreeMap;

/// Readings that it takes at the least to tell an error from chance.
const FEWEST: f64 = 4.0;
/// With so many, those that there are count half from then on.
const MOST: f64 = 64.0;
/// An error is certain where its mean is over so many times what chance makes of it, the mean's standard error.
const CERTAIN: f64 = 3.0;

/// A link's queue, nanoseconds until it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// By the bytes put onto the link and its assumed rate.
    pub reckoned: u64,
    /// By the bytes that wait.
    pub real: u64,
}

impl Queue {
    fn error(&self) -> f64 {
        self.reckoned as f64 - self.real as f64
    }
}

/// What a link's reckoning was off by beyond the others', since it was last corrected. A single reading is worth little:
/// it swings with a shaper's bursts, and what was sent a moment ago is still being encrypted and waits nowhere yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Drift {
    readings: f64,
    sum: f64,
    squares: f64,
}

impl Drift {
    /// Takes an error; what it is by all that is known, once that is certain, else 0.
    fn take(&mut self, error: f64) -> f64 {
        if self.readings >= MOST {
            *self = Self { readings: self.readings / 2.0, sum: self.sum / 2.0, squares: self.squares / 2.0 };
        }
        self.readings += 1.0;
        self.sum += error;
        self.squares += error * error;
        let mean = self.sum / self.readings;
        let variance = (self.squares / self.readings - mean * mean).max(0.0);
        if self.readings < FEWEST || mean * mean * (self.readings - 1.0) <= CERTAIN * CERTAIN * variance {
            return 0.0;
        }
        *self = Self::default();
        mean
    }
}

/// By how much to change what is reckoned, of links that flows choose among, nanoseconds: what all are off by goes at
/// once, so that an assumed rate that is wrong for all does not add up; what one is off by against the others once that is
/// certain. Where one link alone jumped with each reading, sprayed flows would rush to it and overtake themselves.
pub fn corrections(queues: &BTreeMap<u32, Queue>, drifts: &mut BTreeMap<u32, Drift>) -> Vec<(u32, i64)> {
    let common = queues.values().map(Queue::error).sum::<f64>() / queues.len().max(1) as f64;
    let correction = |(link, queue): (&u32, &Queue)| {
        let own = drifts.entry(*link).or_default().take(queue.error() - common);
        (*link, -((common + own).min(queue.reckoned as f64) as i64))
    };
    queues.iter().map(correction).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn queues(pairs: &[(u64, u64)]) -> BTreeMap<u32, Queue> {
        let queue = |(reckoned, real): &(u64, u64)| Queue { reckoned: reckoned * MS, real: real * MS };
        (0..).zip(pairs.iter().map(queue)).collect()
    }

    /// What is reckoned from then on.
    fn correct(queues: &mut BTreeMap<u32, Queue>, drifts: &mut BTreeMap<u32, Drift>) -> Vec<u64> {
        for (link, by) in corrections(queues, drifts) {
            let queue = queues.get_mut(&link).unwrap();
            queue.reckoned = queue.reckoned.checked_add_signed(by).expect("no queue is shorter than none");
        }
        queues.values().map(|queue| queue.reckoned).collect()
    }

    #[test]
    fn what_all_are_off_by_goes_at_once_and_their_order_stays() {
        let mut drifts = BTreeMap::new();
        assert_eq!(correct(&mut queues(&[(40, 30), (42, 32), (41, 31)]), &mut drifts), [30 * MS, 32 * MS, 31 * MS]);
        assert_eq!(correct(&mut queues(&[(4, 0), (0, 0)]), &mut drifts), [2 * MS, 0]);
        assert!(corrections(&BTreeMap::new(), &mut drifts).is_empty());
    }

    #[test]
    fn what_one_is_off_by_goes_once_it_is_certain() {
        let (mut now, mut drifts) = (queues(&[(20, 20), (20, 20), (20, 50)]), BTreeMap::new());
        for _ in 0..3 {
            assert_eq!(correct(&mut now, &mut drifts), [30 * MS; 3]);
        }
        assert_eq!(correct(&mut now, &mut drifts), [20 * MS, 20 * MS, 50 * MS]);
        // Also after a long time without an error.
        for _ in 0..1_000 {
            correct(&mut now, &mut drifts);
        }
        now.get_mut(&0).unwrap().real = 50 * MS;
        for _ in 0..12 {
            correct(&mut now, &mut drifts);
        }
        assert!(now.values().all(|queue| queue.reckoned.abs_diff(queue.real) < MS), "{now:?}");
    }

    /// Queues of 50 ms whose readings swing by up to 13 ms, a burst of 16 kB at 10 Mbit/s; one truly is 10 ms longer.
    #[test]
    fn swings_are_no_errors_and_hide_none_for_long() {
        let (mut now, mut drifts, mut state) = (queues(&[(50, 50), (50, 50), (50, 60)]), BTreeMap::new(), 1_u32);
        let mut worst = 0;
        for reading in 0..2_000 {
            for (truly, queue) in [50, 50, 60].into_iter().zip(now.values_mut()) {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                queue.real = truly * MS + u64::from(state >> 8) * 26 * MS / (1 << 24) - 13 * MS;
            }
            let reckoned = correct(&mut now, &mut drifts);
            if reading >= 64 {
                worst = worst.max((reckoned[0] + 10 * MS).abs_diff(reckoned[2])).max(reckoned[0].abs_diff(reckoned[1]));
            }
        }
        assert!(worst < 8 * MS, "{worst}");
    }
}
