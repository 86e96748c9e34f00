//! Estimates round-trip time and loss of a tunnel from its probes. Pure.

use super::nanos::Nanos;

/// Number of latest probes that the loss is computed over.
const WINDOW: u32 = 256;
/// Half of the window that the minimum round-trip time is taken over: 10 s.
const MINIMUM_HALF: Nanos = 10_000_000_000;

/// Smoothed round-trip time and its deviation, computed as in RFC 6298, and the minimum of the last 10 to 20 s.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundTrip {
    smoothed: Option<Nanos>,
    deviation: Nanos,
    /// The minimum of the current half of the window, and of the half before; `Nanos::MAX`: none.
    minimum: [Nanos; 2],
    half_since: Nanos,
}

impl RoundTrip {
    /// Continues with the values of an earlier process. `smoothed` 0: not known.
    pub fn restored(smoothed: Nanos, deviation: Nanos) -> Self {
        Self { smoothed: (smoothed != 0).then_some(smoothed), deviation, ..Self::default() }
    }

    /// Takes the round-trip time of one probe, answered at `now`.
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

    /// Forgets the smoothed time: the next sample becomes the smoothed time.
    pub fn restart(&mut self) {
        self.smoothed = None;
    }

    /// The smoothed round-trip time; `None`: not known.
    pub fn smoothed(&self) -> Option<Nanos> {
        self.smoothed
    }

    /// The mean deviation of the round-trip time.
    pub fn deviation(&self) -> Nanos {
        self.deviation
    }

    /// The minimum of the last 10 to 20 s; `None`: not known.
    pub fn minimum(&self) -> Option<Nanos> {
        Some(self.minimum[0].min(self.minimum[1])).filter(|least| self.half_since != 0 && *least != Nanos::MAX)
    }

    /// The age from which a probe without an answer counts as missed, from `least` to `most`; `unknown` if no round
    /// trip is known. It grows with the round trips of a tunnel whose queue fills up.
    pub fn timeout(&self, least: Nanos, unknown: Nanos, most: Nanos) -> Nanos {
        self.smoothed.map_or(unknown, |smoothed| smoothed + 4 * self.deviation).clamp(least, most.max(least))
    }
}

/// Which of the last [`WINDOW`] probes were lost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loss {
    lost: [u64; WINDOW as usize / 64],
    next: u32,
    known: u32,
}

impl Loss {
    /// Adds one probe.
    pub fn push(&mut self, lost: bool) {
        let (message, bit) = (self.next as usize / 64, self.next % 64);
        self.lost[message] = self.lost[message] & !(1 << bit) | u64::from(lost) << bit;
        self.next = (self.next + 1) % WINDOW;
        self.known = (self.known + 1).min(WINDOW);
    }

    /// The number of losses in a row that occurs less than once in `trials`, if each probe is lost independently with
    /// the measured loss. At most `most`.
    pub fn run_of(&self, trials: f64, most: usize) -> usize {
        let share = f64::from(self.lost()) / f64::from(self.known.max(1));
        (1..most).find(|run| (0..*run).fold(trials, |left, _| left * share) < 1.0).unwrap_or(most)
    }

    fn lost(&self) -> u32 {
        self.lost.iter().map(|message| message.count_ones()).sum()
    }

    /// Lost probes per million.
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
