//! Where tunnels truly arrive, told by counters. Pure: the counts come from elsewhere.

use std::time::Duration;

/// A member that had packets no longer than this before the tunnel's latest one still carries it.
const RECENT: Duration = Duration::from_secs(10);

/// Which members a tunnel arrives on now, of those with these times since the last packet; `None`: none ever came.
/// Where it is idle, those that it arrived on last.
pub fn current(ages: impl Iterator<Item = Option<Duration>> + Clone) -> Vec<bool> {
    let latest = ages.clone().flatten().min();
    ages.map(|age| age.zip(latest).is_some_and(|(age, latest)| age <= latest + RECENT)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_was_left_is_not_current() {
        let current = |ages: &[Option<u64>]| super::current(ages.iter().map(|age| age.map(Duration::from_secs)));
        assert_eq!(current(&[]), [false; 0]);
        assert_eq!(current(&[None, None]), [false, false]);
        assert_eq!(current(&[Some(0), None, Some(11)]), [true, false, false]);
        assert_eq!(current(&[Some(3), Some(9)]), [true, true]);
        assert_eq!(current(&[Some(5000), Some(4000)]), [false, true], "idle: the last one counts");
    }
}
