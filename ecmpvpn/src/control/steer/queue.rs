//! What waits on links: as the programs reckon it, and as it is. Pure.

/// Of the error that a link has beyond the others, what is corrected at a time. What was sent a moment ago is still being
/// encrypted and waits nowhere yet, so a single reading is worth little; and where one link alone jumps, sprayed flows
/// rush to it and overtake themselves.
const SHARE: f64 = 0.125;

/// A link's queue, nanoseconds until it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// By the bytes put onto the link and its assumed rate.
    pub reckoned: u64,
    /// By the bytes that wait.
    pub real: u64,
}

/// What to reckon on from now on, of links that flows choose among: right on average at once, so that an assumed rate that
/// is wrong for all of them does not add up; each against the others by and by.
pub fn corrected(queues: &[Queue]) -> Vec<u64> {
    let error = |queue: &Queue| queue.reckoned as f64 - queue.real as f64;
    let common = queues.iter().map(error).sum::<f64>() / queues.len().max(1) as f64;
    let corrected = |queue: &Queue| queue.reckoned as f64 - common - SHARE * (error(queue) - common);
    queues.iter().map(|queue| corrected(queue).max(0.0) as u64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn queues(pairs: &[(u64, u64)]) -> Vec<Queue> {
        pairs.iter().map(|(reckoned, real)| Queue { reckoned: reckoned * MS, real: real * MS }).collect()
    }

    #[test]
    fn what_all_are_off_by_goes_at_once_and_their_order_stays() {
        assert_eq!(corrected(&queues(&[(40, 30), (42, 32), (41, 31)])), [30 * MS, 32 * MS, 31 * MS]);
        assert_eq!(corrected(&[]), Vec::<u64>::new());
    }

    #[test]
    fn what_one_is_off_by_goes_by_and_by() {
        let mut now = queues(&[(20, 20), (20, 20), (20, 50)]);
        assert!(corrected(&now)[2] < 40 * MS);
        for _ in 0..40 {
            let next = corrected(&now);
            now.iter_mut().zip(next).for_each(|(queue, reckoned)| queue.reckoned = reckoned);
        }
        assert!(now.iter().all(|queue| queue.reckoned.abs_diff(queue.real) < MS), "{now:?}");
    }
}
