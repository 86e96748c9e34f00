//! Compares the programs' estimate of each link's queue with the real queue. Pure.

use ecmpvpn_common::layout::TunnelId;
use std::collections::BTreeMap;

/// The fewest readings that can distinguish an error from chance.
const FEWEST: f64 = 4.0;
/// When there are this many readings, their weight is halved.
const MOST: f64 = 64.0;
/// An error is certain if its mean is more than this many times the standard error of the mean.
const CERTAIN: f64 = 3.0;

/// A link's queue, nanoseconds until it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// The programs' estimate: from the bytes sent to the link and its assumed rate.
    pub reckoned: u64,
    /// From the bytes that wait.
    pub real: u64,
    /// By how much `real` may be off: the time that a shaper's burst and packets that are still being encrypted take.
    pub swing: u64,
}

impl Queue {
    fn error(&self) -> f64 {
        self.reckoned as f64 - self.real as f64
    }
}

/// The error of a link's estimate beyond that of the other links, since the last correction. A single reading is not
/// reliable: it varies with a shaper's bursts, and packets sent a moment ago are still being encrypted and are not in
/// the queue yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Drift {
    readings: f64,
    sum: f64,
    squares: f64,
}

impl Drift {
    /// Adds a reading of the error. Returns the mean error once it is certain, and starts again; 0 before.
    fn add_reading(&mut self, error: f64) -> f64 {
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

/// How much to change the estimate of each link that a peer's flows choose from, nanoseconds. The error that all links
/// share is corrected at once, so that a rate that is wrong for all does not add up. The error of one link against the
/// others is corrected once it is certain, or at once if it is beyond what readings vary by. If a single link jumped with
/// each reading, sprayed flows would rush to it, and their packets would overtake each other.
pub fn corrections(queues: &BTreeMap<TunnelId, Queue>, drifts: &mut BTreeMap<TunnelId, Drift>) -> Vec<(TunnelId, i64)> {
    let middle = median(queues.values().map(Queue::error).collect());
    let is_alike = |queue: &&Queue| (queue.error() - middle).abs() <= 2.0 * queue.swing as f64;
    let alike: Vec<f64> = queues.values().filter(is_alike).map(Queue::error).collect();
    let common = alike.iter().sum::<f64>() / alike.len().max(1) as f64;
    let correction = |(link, queue): (&TunnelId, &Queue)| {
        let drift = drifts.entry(*link).or_default();
        let error = if is_alike(&queue) {
            common + drift.add_reading(queue.error() - common)
        } else {
            // The link dropped packets, or its rate is wrong.
            *drift = Drift::default();
            queue.error()
        };
        (*link, -(error.min(queue.reckoned as f64) as i64))
    };
    queues.iter().map(correction).collect()
}

/// The middle value, or the mean of the two in the middle; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.len() % 2, values.get(middle)) {
        (1, Some(value)) => *value,
        (_, Some(value)) => values[middle - 1].midpoint(*value),
        (_, None) => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn queues(pairs: &[(u64, u64)]) -> BTreeMap<TunnelId, Queue> {
        let queue = |(reckoned, real): &(u64, u64)| Queue { reckoned: reckoned * MS, real: real * MS, swing: 26 * MS };
        (0..).map(TunnelId::from_number).zip(pairs.iter().map(queue)).collect()
    }

    /// The estimates after the correction.
    fn correct(queues: &mut BTreeMap<TunnelId, Queue>, drifts: &mut BTreeMap<TunnelId, Drift>) -> Vec<u64> {
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
        // The same after a long time without an error.
        for _ in 0..1_000 {
            correct(&mut now, &mut drifts);
        }
        now.get_mut(&TunnelId::from_number(0)).unwrap().real = 50 * MS;
        for _ in 0..12 {
            correct(&mut now, &mut drifts);
        }
        assert!(now.values().all(|queue| queue.reckoned.abs_diff(queue.real) < MS), "{now:?}");
    }

    #[test]
    fn what_is_beyond_all_swings_goes_at_once() {
        let mut drifts = BTreeMap::new();
        assert_eq!(correct(&mut queues(&[(120, 50), (0, 0), (0, 0)]), &mut drifts), [50 * MS, 0, 0]);
        assert_eq!(correct(&mut queues(&[(180, 50), (0, 0)]), &mut drifts), [50 * MS, 0]);
        assert_eq!(correct(&mut queues(&[(180, 50)]), &mut drifts), [50 * MS]);
    }

    /// Queues of 50 ms whose readings vary by up to 13 ms, a burst of 16 kB at 10 Mbit/s. One is really 10 ms longer.
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
