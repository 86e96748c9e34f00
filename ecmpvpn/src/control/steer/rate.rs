//! Estimates how fast a link really is, from what it sends while packets wait for it. Pure.
//!
//! The nominal speed of a link says little if a shaper, a virtual port or a radio limits it. While packets wait, the
//! link sends at its rate. While none wait, it sends what is offered: that is only a lower bound.

use std::time::Duration;

use crate::control::health::OwnQueue;
use crate::host::queues::Reading;

/// If this many bytes wait at the start and at the end of an interval, the link is taken to have been busy in between.
const BUSY_BYTES: u32 = 3_000;
/// The rate is the median of this many readings; with more it would follow changes slowly. A reading varies with the
/// shaper's bursts, and is too low if the link idled in between after all: then a mean is wrong by up to 10%, a median
/// by 1%.
const SETTLED: usize = 16;
/// A link that sends more than this factor times its rate without a queue has become faster. A shaper's burst is
/// smaller.
const FASTER: f64 = 1.3;

/// Links whose rates differ by less than this share are taken to be equally fast. The ports of a bond mostly are, and
/// measuring errors then do not make their loads differ.
const ALIKE: f64 = 0.2;

/// The rates that links are assumed to have, bits a second. A link that was never busy is assumed to be as fast as the
/// fastest measured one, if there is one. With its nominal rate it would look far faster than links behind a shaper.
pub fn assumed(rates: &[Rate]) -> Vec<f64> {
    let measured = || rates.iter().filter(|rate| rate.is_measured()).map(Rate::bits_per_second);
    let fastest = measured().reduce(f64::max);
    rates
        .iter()
        .map(|rate| match fastest {
            Some(fastest) if !rate.is_measured() => fastest,
            _ => rate.bits_per_second(),
        })
        .collect()
}

/// Replaces rates that are nearly equal by their mean.
pub fn level_out(rates: &mut [f64]) {
    let mut order: Vec<usize> = (0..rates.len()).collect();
    order.sort_by(|a, b| rates[*a].total_cmp(&rates[*b]));
    let mut from = 0;
    while from < order.len() {
        let slowest = rates[order[from]];
        let count = order[from..].iter().take_while(|at| rates[**at] <= slowest * (1.0 + ALIKE)).count();
        let alike = &order[from..from + count];
        let mean = alike.iter().map(|at| rates[*at]).sum::<f64>() / count as f64;
        for at in alike {
            rates[*at] = mean;
        }
        from += count;
    }
}

/// The estimate for one link.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    bits_per_second: f64,
    /// The latest readings while the link was busy, bits a second: a ring. The next one goes to index `taken %
    /// SETTLED`.
    readings: [f64; SETTLED],
    taken: usize,
    last: Option<Reading>,
    busy: bool,
    /// The most bytes that waited at the last two readings, if packets were dropped in between.
    room: Option<u32>,
    /// Packets dropped since the first reading.
    dropped: u64,
}

impl Rate {
    /// A link with this nominal speed, bits a second, and no readings.
    pub fn nominal(bits_per_second: u64) -> Self {
        Self {
            bits_per_second: bits_per_second as f64,
            readings: [0.0; SETTLED],
            taken: 0,
            last: None,
            busy: false,
            room: None,
            dropped: 0,
        }
    }

    /// Adds a reading, taken `elapsed` after the last one.
    pub fn read(&mut self, reading: Reading, elapsed: Duration) {
        let Some(last) = self.last.replace(reading) else { return };
        let seconds = elapsed.as_secs_f64();
        if seconds <= 0.0 || reading.sent < last.sent {
            return;
        }
        self.dropped += u64::from(reading.dropped.wrapping_sub(last.dropped));
        let rate = 8.0 * (reading.sent - last.sent) as f64 / seconds;
        self.busy = last.waiting >= BUSY_BYTES && reading.waiting >= BUSY_BYTES;
        let drops = self.busy && reading.dropped != last.dropped;
        self.room = drops.then_some(last.waiting.max(reading.waiting));
        if self.busy || self.is_measured() && rate > FASTER * self.bits_per_second {
            self.readings[self.taken % SETTLED] = rate;
            self.taken += 1;
            let mut readings = self.readings;
            let readings = &mut readings[..self.taken.min(SETTLED)];
            let middle = readings.len() / 2;
            self.bits_per_second = *readings.select_nth_unstable_by(middle, f64::total_cmp).1;
        }
    }

    /// The rate in bits a second, with link-layer headers. At least 1,000.
    pub fn bits_per_second(&self) -> f64 {
        self.bits_per_second.max(1_000.0)
    }

    /// Whether the link was ever busy. If not, the rate is the nominal one.
    pub fn is_measured(&self) -> bool {
        self.taken > 0
    }

    /// Whether packets waited for the link all the time between the last two readings.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// The bytes that the link's queue has room for, if it drops packets now.
    pub fn room(&self) -> Option<u32> {
        self.room
    }

    /// What became of packets in the link's queue.
    pub fn queue(&self) -> OwnQueue {
        let overtaken = self.last.filter(|last| last.is_fair).map_or(0, |last| last.packets_waiting);
        OwnQueue { dropped: self.dropped, overtaken }
    }

    /// Bytes sent in total at the last reading.
    pub fn sent(&self) -> Option<u64> {
        self.last.map(|last| last.sent)
    }

    /// Bytes that waited at the last reading.
    pub fn waiting(&self) -> u32 {
        self.last.map_or(0, |last| last.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(50);

    /// Readings of a link that sends `bytes` a tick while `waiting` bytes wait.
    fn feed(rate: &mut Rate, from: u64, bytes: u64, waiting: u32, ticks: u64) -> u64 {
        for tick in 0..=ticks {
            rate.read(Reading { sent: from + bytes * tick, waiting, ..Reading::default() }, TICK);
        }
        from + bytes * ticks
    }

    #[test]
    fn a_busy_link_shows_its_rate() {
        let mut rate = Rate::nominal(10_000_000_000);
        let sent = feed(&mut rate, 0, 62_500, 0, 10);
        assert!(!rate.is_measured() && rate.bits_per_second() > 9e9, "an idle link shows nothing");
        let sent = feed(&mut rate, sent, 62_500, 20_000, 2);
        assert!((rate.bits_per_second() - 1e7).abs() < 1.0, "{rate:?}");
        // Half the rate from now on.
        let sent = feed(&mut rate, sent, 31_250, 20_000, 80);
        assert!((rate.bits_per_second() / 5e6 - 1.0).abs() < 0.02, "{rate:?}");
        // No queue and less traffic: the rate stays.
        let sent = feed(&mut rate, sent, 1_000, 0, 20);
        assert!((rate.bits_per_second() / 5e6 - 1.0).abs() < 0.02, "{rate:?}");
        // No queue and more traffic: the link is faster than it was.
        feed(&mut rate, sent, 125_000, 0, 100);
        assert!((rate.bits_per_second() / 2e7 - 1.0).abs() < 0.02, "{rate:?}");
    }

    #[test]
    fn a_link_that_idled_unseen_now_and_then_shows_its_rate_all_the_same() {
        let (mut rate, mut sent) = (Rate::nominal(10_000_000_000), 0);
        for tick in 0..1_000_u64 {
            // Idle for half of every fourth interval, then a burst.
            sent += [62_500, 62_500, 31_250, 70_000][tick as usize % 4];
            rate.read(Reading { sent, waiting: 20_000, ..Reading::default() }, TICK);
            assert!(tick < 8 || (rate.bits_per_second() / 1e7 - 1.0).abs() < 0.01, "{tick}: {rate:?}");
        }
    }

    #[test]
    fn a_link_that_was_never_busy_is_taken_for_as_fast_as_one_that_was() {
        let mut rates = [Rate::nominal(1_000_000_000); 3];
        assert_eq!(assumed(&rates), [1e9; 3]);
        feed(&mut rates[1], 0, 62_500, 20_000, 10);
        feed(&mut rates[2], 0, 31_250, 20_000, 10);
        assert!(assumed(&rates).iter().zip([1e7, 1e7, 5e6]).all(|(a, b): (&f64, f64)| (a - b).abs() < 1.0));
    }

    #[test]
    fn rates_that_are_alike_become_equal() {
        let mut rates = [10.2, 5.0, 9.9, 20.0, 10.5];
        level_out(&mut rates);
        assert!(
            rates.iter().zip([10.2, 5.0, 10.2, 20.0, 10.2]).all(|(a, b): (&f64, f64)| (a - b).abs() < 1e-9),
            "{rates:?}"
        );
        level_out(&mut []);
    }

    #[test]
    fn counters_that_start_again_are_no_rate() {
        let mut rate = Rate::nominal(1_000_000);
        feed(&mut rate, 1_000_000, 62_500, 20_000, 3);
        rate.read(Reading { waiting: 20_000, ..Reading::default() }, TICK);
        assert!((rate.bits_per_second() - 1e7).abs() < 1.0);
    }

    #[test]
    fn a_queue_has_the_room_that_it_had_when_it_dropped_packets() {
        let mut rate = Rate::nominal(1_000_000);
        let mut room = |sent, waiting, dropped| {
            rate.read(Reading { sent, waiting, dropped, ..Reading::default() }, TICK);
            rate.room()
        };
        assert_eq!(room(0, 0, 5), None);
        assert_eq!(room(60_000, 50_000, 6), None, "it was empty meanwhile");
        assert_eq!(room(120_000, 48_000, 6), None);
        assert_eq!(room(180_000, 47_000, 7), Some(48_000));
        assert_eq!(room(240_000, 52_000, u32::MAX), Some(52_000));
        assert_eq!(room(300_000, 52_000, u32::MAX), None);
        assert_eq!(rate.queue(), OwnQueue { dropped: u64::from(u32::MAX) - 5, overtaken: 0 });
        rate.read(Reading { sent: 360_000, packets_waiting: 9, dropped: 1, is_fair: true, ..Reading::default() }, TICK);
        assert_eq!(rate.queue(), OwnQueue { dropped: u64::from(u32::MAX) - 3, overtaken: 9 });
    }
}
