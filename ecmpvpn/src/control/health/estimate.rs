//! What the answers to a tunnel's probes say of it: round-trip time and loss. Pure.

use super::nanos::Nanos;

/// Probes that the loss is told of.
const WINDOW: u32 = 256;
/// Half of the time that the least round-trip time is told of.
const MINIMUM_HALF: Nanos = 10_000_000_000;

/// Smoothed round-trip time and its deviation, as RFC 6298 keeps them for TCP, and the least one of late.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundTrip {
    smoothed: Option<Nanos>,
    deviation: Nanos,
    /// The least of this half of the window and of the one before; `Nanos::MAX`: none.
    minimum: [Nanos; 2],
    half_since: Nanos,
}

impl RoundTrip {
    /// As an earlier process left it; zero: not known.
    pub fn restored(smoothed: Nanos, deviation: Nanos) -> Self {
        Self { smoothed: (smoothed != 0).then_some(smoothed), deviation, ..Self::default() }
    }

    /// A probe took `time`.
    pub fn sample(&mut self, now: Nanos, time: Nanos) {
        let time = time.max(1);
        match self.smoothed {
            None => (self.smoothed, self.deviation) = (Some(time), time / 2),
            Some(smoothed) => {
                self.deviation = (3 * self.deviation + smoothed.abs_diff(time)) / 4;
                self.smoothed = Some((7 * smoothed + time) / 8);
            }
        }
        if self.half_since == 0 || now.saturating_sub(self.half_since) >= MINIMUM_HALF {
            self.minimum = [Nanos::MAX, if self.half_since == 0 { Nanos::MAX } else { self.minimum[0] }];
            self.half_since = now.max(1);
        }
        self.minimum[0] = self.minimum[0].min(time);
    }

    /// Forgets the smoothed time: the next sample stands for itself.
    pub fn restart(&mut self) {
        self.smoothed = None;
    }

    /// Smoothed; `None`: not known.
    pub fn smoothed(&self) -> Option<Nanos> {
        self.smoothed
    }

    /// Mean deviation.
    pub fn deviation(&self) -> Nanos {
        self.deviation
    }

    /// The least of late; `None`: not known.
    pub fn minimum(&self) -> Option<Nanos> {
        Some(self.minimum[0].min(self.minimum[1])).filter(|least| self.half_since != 0 && *least != Nanos::MAX)
    }

    /// When a probe without an answer counts as missed. A tunnel whose queue fills up answers ever later, and this
    /// follows.
    pub fn timeout(&self, least: Nanos, unknown: Nanos, most: Nanos) -> Nanos {
        self.smoothed.map_or(unknown, |smoothed| smoothed + 4 * self.deviation).clamp(least, most.max(least))
    }
}

/// The fate of the last [`WINDOW`] probes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loss {
    lost: [u64; WINDOW as usize / 64],
    next: u32,
    known: u32,
}

impl Loss {
    /// One more probe was lost, or was not.
    pub fn push(&mut self, lost: bool) {
        let (word, bit) = (self.next as usize / 64, self.next % 64);
        self.lost[word] = self.lost[word] & !(1 << bit) | u64::from(lost) << bit;
        self.next = (self.next + 1) % WINDOW;
        self.known = (self.known + 1).min(WINDOW);
    }

    /// How many in a row are lost less often than once in `trials`, if each is lost by chance alone and as often as these;
    /// at most `most`.
    pub fn run_of(&self, trials: f64, most: usize) -> usize {
        let share = f64::from(self.lost()) / f64::from(self.known.max(1));
        (1..most).find(|run| (0..*run).fold(trials, |left, _| left * share) < 1.0).unwrap_or(most)
    }

    fn lost(&self) -> u32 {
        self.lost.iter().map(|word| word.count_ones()).sum()
    }

    /// The share that was lost, millionths.
    pub fn ppm(&self) -> u32 {
        (self.lost() * 1_000_000).checked_div(self.known).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    #[test]
    fn the_timeout_follows_the_round_trip_time_within_its_bounds() {
        let mut rtt = RoundTrip::default();
        assert_eq!(rtt.timeout(50 * MS, 250 * MS, 1000 * MS), 250 * MS);
        (0..100).for_each(|i| rtt.sample(i * 100 * MS, MS));
        assert_eq!(rtt.smoothed(), Some(MS));
        assert_eq!(rtt.timeout(50 * MS, 250 * MS, 1000 * MS), 50 * MS);
        // A queue fills up to 300 ms within a second.
        (0..10).for_each(|i| rtt.sample((100 + i) * 100 * MS, 30 * (i + 1) * MS));
        assert!(rtt.timeout(50 * MS, 250 * MS, 1000 * MS) > 300 * MS);
        (0..10).for_each(|i| rtt.sample((110 + i) * 100 * MS, 3000 * MS));
        assert_eq!(rtt.timeout(50 * MS, 250 * MS, 1000 * MS), 1000 * MS);
    }

    #[test]
    fn the_least_time_is_forgotten_after_a_while() {
        let mut rtt = RoundTrip::default();
        assert_eq!(rtt.minimum(), None);
        rtt.sample(5, 2 * MS);
        (0..95).for_each(|i| rtt.sample(i * 100 * MS, 9 * MS));
        assert_eq!(rtt.minimum(), Some(2 * MS));
        (100..195).for_each(|i| rtt.sample(i * 100 * MS, 9 * MS));
        assert_eq!(rtt.minimum(), Some(2 * MS));
        (200..310).for_each(|i| rtt.sample(i * 100 * MS, 9 * MS));
        assert_eq!(rtt.minimum(), Some(9 * MS));
    }

    #[test]
    fn the_more_are_lost_the_more_are_lost_in_a_row() {
        let run = |lost: u32, of: u32| {
            let mut loss = Loss::default();
            (0..of).for_each(|i| loss.push(i < lost));
            loss.run_of(1e6, 12)
        };
        assert_eq!([run(0, 0), run(0, 256), run(2, 256), run(20, 250), run(64, 256)], [1, 1, 3, 6, 10]);
        assert_eq!([run(100, 250), run(256, 256)], [12, 12]);
    }

    #[test]
    fn loss_is_that_of_the_last_probes() {
        let mut loss = Loss::default();
        assert_eq!(loss.ppm(), 0);
        (0..100).for_each(|i| loss.push(i % 10 == 0));
        assert_eq!(loss.ppm(), 100_000);
        (0..WINDOW).for_each(|_| loss.push(true));
        assert_eq!(loss.ppm(), 1_000_000);
        (0..WINDOW).for_each(|_| loss.push(false));
        assert_eq!(loss.ppm(), 0);
    }
}
