//! Draws the flows of a repetition from its seed: when they begin and end, and their addresses. Pure.

use std::net::Ipv4Addr;
use std::time::Duration;

use ecmpvpn_common::flow::mix;

/// Number of addresses in each LAN at which flows begin and end.
pub const HOSTS: usize = 6;
/// The time in which all flows begin, seconds: least and greatest. Its logarithm is uniform, so that in some
/// repetitions all flows begin at once, and in some one after another.
const SPREAD: (f64, f64) = (0.001, 0.4);
/// Greatest time before the first flow. The periodic work of the daemons then has another phase in each repetition.
const LEAD: Duration = Duration::from_secs(1);

/// Random numbers from a seed: `SplitMix64` (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    /// `what` distinguishes several draws from one seed.
    pub fn new(seed: u64, what: u64) -> Self {
        Self(mix(mix(seed) ^ what))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from 0 to below 1.
    #[expect(clippy::cast_precision_loss, reason = "53 bits are kept")]
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number from 0 to below `count`.
    fn below(&mut self, count: usize) -> usize {
        usize::try_from(self.next() % count as u64).unwrap_or(0)
    }
}

/// [`HOSTS`] addresses in the LAN `10.NUMBER.0.0/16`. None is an address that the lab itself uses.
pub fn hosts(seed: u64, number: u8) -> Vec<Ipv4Addr> {
    let mut draw = Draw::new(seed, u64::from(number));
    let mut hosts: Vec<Ipv4Addr> = Vec::with_capacity(HOSTS);
    while hosts.len() < HOSTS {
        let mut octet = || u8::try_from(1 + draw.below(254)).unwrap_or(1);
        let host = Ipv4Addr::new(10, number, octet(), octet());
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}

/// A flow: its begin and end, counted from the start, and the indexes of its addresses among the hosts of both sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drawn {
    pub begin: Duration,
    pub end: Duration,
    pub from: usize,
    pub to: usize,
}

/// Long flows that begin nearly together and end together.
pub fn together(seed: u64, count: usize, seconds: f64) -> Vec<Drawn> {
    let mut draw = Draw::new(seed, count as u64);
    let lead = LEAD.mul_f64(draw.uniform());
    let spread = SPREAD.0 * (SPREAD.1 / SPREAD.0).powf(draw.uniform());
    let end = lead + Duration::from_secs_f64(seconds);
    let flow = |_| {
        let begin = lead + Duration::from_secs_f64(spread * draw.uniform());
        Drawn { begin, end, from: draw.below(HOSTS), to: draw.below(HOSTS) }
    };
    (0..count).map(flow).collect()
}

/// Flows that arrive and leave. Each lasts for a third of the time and has its own begin.
pub fn coming_and_going(seed: u64, count: usize, seconds: f64) -> Vec<Drawn> {
    let mut draw = Draw::new(seed, !(count as u64));
    let lead = LEAD.mul_f64(draw.uniform());
    let stay = Duration::from_secs_f64(seconds / 3.0);
    let flow = |_| {
        let begin = lead + Duration::from_secs_f64(draw.uniform() * seconds * 2.0 / 3.0);
        Drawn { begin, end: begin + stay, from: draw.below(HOSTS), to: draw.below(HOSTS) }
    };
    (0..count).map(flow).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_gives_the_same_addresses_again_and_another_one_others() {
        assert_eq!(hosts(7, 10), hosts(7, 10));
        let all: BTreeSet<Vec<Ipv4Addr>> = (1..=20).flat_map(|seed| [hosts(seed, 10), hosts(seed, 20)]).collect();
        assert_eq!(all.len(), 40);
        for host in hosts(7, 20) {
            let [ten, number, third, last] = host.octets();
            assert!(ten == 10 && number == 20 && third != 0 && (1..255).contains(&last), "{host}");
        }
    }

    #[test]
    fn flows_begin_soon_after_one_another_and_end_together() {
        let mut leads = BTreeSet::new();
        for seed in 1..=20 {
            let flows = together(seed, 12, 3.0);
            assert_eq!(flows, together(seed, 12, 3.0));
            let first = flows.iter().map(|flow| flow.begin).min().unwrap();
            let last = flows.iter().map(|flow| flow.begin).max().unwrap();
            assert!(last <= first + Duration::from_secs_f64(SPREAD.1) && first <= LEAD * 2);
            assert!(flows.iter().all(|flow| flow.end == flows[0].end && flow.from < HOSTS && flow.to < HOSTS));
            leads.insert(first);
        }
        assert_eq!(leads.len(), 20);
    }

    #[test]
    fn flows_that_come_and_go_are_spread_over_the_time() {
        let flows = coming_and_going(3, 30, 6.0);
        let lead = flows.iter().map(|flow| flow.begin).min().unwrap();
        assert!(flows.iter().all(|flow| flow.end == flow.begin + Duration::from_secs(2)));
        let at = |second: f64| {
            let moment = lead + Duration::from_secs_f64(second);
            flows.iter().filter(|flow| flow.begin <= moment && moment < flow.end).count()
        };
        assert!(at(2.0) >= 5 && at(3.9) >= 5, "{flows:?}");
    }

    #[test]
    fn numbers_are_spread_evenly() {
        let mut draw = Draw::new(1, 2);
        let mut counts = [0_u32; 10];
        for _ in 0..10_000 {
            counts[draw.below(10)] += 1;
        }
        assert!(counts.iter().all(|count| (850..1_150).contains(count)), "{counts:?}");
        let mean = (0..10_000).map(|_| draw.uniform()).sum::<f64>() / 10_000.0;
        assert!((0.48..0.52).contains(&mean), "{mean}");
    }
}
