//! The schedule: which faults happen, where, when and for how long. A pure function of the seed.
//!
//! Faults that stop something follow one another. Each gets the time that recovery from it may take, so that every
//! breakage has one cause. Loss and delays overlap them, and a link may be cut while a `run` is not running.

use std::time::Duration;

use crate::bounds;
use crate::defect::Defect;
use crate::draw::Faults;
use crate::event::Event;
use crate::random::Random;

/// How long traffic flows before the first fault.
pub const LEAD: Duration = Duration::from_secs(3);
/// How long traffic flows at least after the last fault is over.
const TAIL: Duration = Duration::from_secs(2);
const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// Everything that follows from a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    pub seed: u64,
    /// Number of tunnels between the sites.
    pub tunnels: u8,
    /// UDP port of the first tunnel. The other ports follow from it.
    pub first_port: u16,
    /// The first source port of the traffic, for each direction.
    pub source_ports: [u16; 2],
    /// How much later B's `run` is started than A's.
    pub stagger: Duration,
    /// Ordered by time.
    pub events: Vec<Event>,
    /// How long traffic flows.
    pub length: Duration,
    /// Whether each site is taken down at the end by SIGKILL and `down`, and not by SIGTERM.
    pub ends_killed: [bool; 2],
}

impl Schedule {
    /// The schedule of `seed` for about `length`. A defect, if there is one, comes first.
    pub fn new(seed: u64, length: Duration, defect: Option<Defect>) -> Self {
        let mut setting = Random::new(seed, "setting");
        let tunnels = 3 + setting.index(2);
        let port =
            |random: &mut Random, from: u16, count: u64| from + u16::try_from(random.below(count)).expect("small");
        let mut schedule = Self {
            seed,
            tunnels,
            first_port: port(&mut setting, 20_000, 10_000),
            source_ports: [port(&mut setting, 40_000, 5_000), port(&mut setting, 50_000, 5_000)],
            stagger: setting.between(300 * MS, 1_500 * MS),
            events: Vec::new(),
            length,
            ends_killed: [setting.chance(50), setting.chance(50)],
        };
        let mut faults = Faults::new(Random::new(seed, "faults"), tunnels);
        let mut at = LEAD + faults.random.between(Duration::ZERO, 2 * S);
        if let Some(defect) = defect {
            let events = faults.of_defect(defect, at);
            at = events.iter().map(Event::end).max().unwrap_or(at) + 5 * S;
            schedule.events.extend(events);
        }
        loop {
            let events = faults.next(at);
            let over = events.iter().map(|event| event.end() + bounds::recovery(event)).max().unwrap_or(at);
            if over + TAIL > length {
                break;
            }
            schedule.events.extend(events);
            at = over + faults.random.between(2 * S, 5 * S);
        }
        schedule.events.sort_by_key(|event| event.at);
        schedule
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::event::Fault;

    const FIVE_MINUTES: Duration = Duration::from_secs(300);

    fn is_over_others(event: &Event) -> bool {
        event.fault.is_hostile() || matches!(event.fault, Fault::Loss { .. } | Fault::Delay { .. })
    }

    #[test]
    fn a_schedule_follows_from_its_seed_alone() {
        let schedule = |seed| Schedule::new(seed, FIVE_MINUTES, None);
        assert_eq!(schedule(7), schedule(7));
        assert_ne!(schedule(7).events, schedule(8).events);
        // A longer schedule of the same seed begins with the shorter one.
        let long = Schedule::new(7, 24 * FIVE_MINUTES, None);
        let short = schedule(7);
        assert_eq!(long.events[..short.events.len()], short.events);
        assert!(long.events.len() > 20 * short.events.len());
    }

    #[test]
    fn every_kind_of_fault_comes_and_none_too_late() {
        let mut kinds = BTreeSet::new();
        for seed in 0..50 {
            let schedule = Schedule::new(seed, FIVE_MINUTES, None);
            assert!(schedule.events.len() >= 8, "{:?}", schedule.events);
            assert!(schedule.events.is_sorted_by_key(|event| event.at));
            for event in &schedule.events {
                kinds.insert(event.fault.kind());
                assert!(event.at >= S && event.end() + bounds::recovery(event) <= FIVE_MINUTES, "{event:?}");
            }
        }
        assert_eq!(kinds.len(), 16, "{kinds:?}");
    }

    #[test]
    fn what_stops_something_has_its_time_to_recover() {
        for seed in 0..50 {
            let events = Schedule::new(seed, FIVE_MINUTES, None).events;
            let (mut ends, mut recovers) = (Duration::ZERO, Duration::ZERO);
            for event in events.iter().filter(|event| !is_over_others(event)) {
                // A fault that begins during another one belongs to it.
                assert!(event.at < ends || event.at > recovers, "seed {seed}: {event:?}");
                ends = ends.max(event.end());
                recovers = recovers.max(event.end() + bounds::recovery(event));
            }
        }
    }

    #[test]
    fn a_defect_comes_first() {
        for defect in [Defect::Clear, Defect::Reorder, Defect::Recovery, Defect::Restore] {
            let schedule = Schedule::new(1, FIVE_MINUTES, Some(defect));
            assert!(matches!(schedule.events[0].fault, Fault::Sabotage { defect: found, .. } if found == defect));
            assert!(schedule.events[0].at < 6 * S);
        }
    }
}
