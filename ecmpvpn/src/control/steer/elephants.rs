//! Decides which flows use several links at once, and which stay on one link (whole). Pure.
//!
//! Spraying a flow reorders some packets, so it must be worth it. Under `adaptive` a flow is sprayed if it fills its
//! link while others could carry more, and stays sprayed only if that makes it faster. Under `spray`, flows that share
//! busy links evenly stay whole: spraying them gains nothing.

use std::collections::BTreeMap;

/// Factor on the load per link if all links carried the same: a flow with more does not fit on one link.
const TOO_MUCH: f64 = 1.3;
/// The same factor: a flow with less fits on one link.
const FITS: f64 = 1.1;
/// The share of its time in use from which a link counts as full.
const FULL: f64 = 0.8;
/// A sprayed flow with less than this share of a link is not an elephant any more.
const NOT_FULL: f64 = 0.6;
/// Utilisation of all links together from which flows that fit on one link are kept whole, and below which they are
/// sprayed again.
const BUSY: (f64, f64) = (0.4, 0.25);
/// After this many rounds a sprayed flow must be faster by this factor.
const TRIAL: (u32, f64) = (4, 1.2);
/// For how many rounds a flow that did not become faster is left alone.
const BARRED: u32 = 60;

/// Figures of one round that are the same for all flows of a peer.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Mean capacity of a link, bytes a second.
    pub capacity: f64,
    /// Utilisation of all links together: 1 is full.
    pub load: f64,
    /// Whether the policy sprays flows unless they are marked.
    pub sprays: bool,
}

/// The traffic of one bucket.
#[derive(Clone, Copy, Debug)]
pub struct BucketTraffic {
    /// Bytes a second.
    pub rate: f64,
    /// Utilisation of its link by all flows: 1 is full.
    pub link_load: f64,
}

/// How a flow is treated if that differs from the default of its policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    /// Sprayed over several links, although its policy keeps flows whole.
    Sprayed {
        /// For how many rounds already.
        rounds: u32,
        /// What its link carried of it before it was sprayed, bytes a second.
        before: f64,
    },
    /// As its policy says, for this many more rounds: spraying it gained nothing.
    Barred(u32),
    /// Kept whole, although its policy sprays.
    Whole,
}

impl State {
    /// The state of a flow that is sprayed from now on. A full link drops what is beyond its rate, so that spraying is a
    /// gain even if the flow sends no more than before.
    fn sprayed(seen: BucketTraffic) -> Self {
        Self::Sprayed { rounds: 0, before: seen.rate / seen.link_load.max(1.0) }
    }
}

/// The states of a peer's flows, by bucket.
#[derive(Debug, Default)]
pub struct Elephants(BTreeMap<u32, State>);

impl Elephants {
    /// Decides about a flow in this round. `None`: as its policy says.
    pub fn next(&mut self, bucket: u32, seen: BucketTraffic, round: Round) -> Option<State> {
        let next = next(self.0.get(&bucket).copied(), seen, round);
        match next {
            Some(state) => self.0.insert(bucket, state),
            None => self.0.remove(&bucket),
        };
        next
    }

    /// Whether a flow of which nothing was decided yet should be sprayed.
    pub fn should_begin(&self, bucket: u32, seen: BucketTraffic, round: Round) -> bool {
        !self.0.contains_key(&bucket) && matches!(next(None, seen, round), Some(State::Sprayed { .. }))
    }

    /// Begins to spray a flow.
    pub fn begin(&mut self, bucket: u32, seen: BucketTraffic) {
        self.0.insert(bucket, State::sprayed(seen));
    }

    /// Forgets flows that are gone.
    pub fn retain(&mut self, mut is_there: impl FnMut(u32) -> bool) {
        self.0.retain(|bucket, _| is_there(*bucket));
    }
}

fn next(state: Option<State>, seen: BucketTraffic, round: Round) -> Option<State> {
    let share = seen.rate / (round.capacity * round.load).max(1.0);
    match state {
        Some(State::Sprayed { rounds, before }) if !round.sprays => {
            // In its first round its mean rate is still that of the time before.
            if rounds > 0 && (share < FITS || seen.rate < NOT_FULL * round.capacity) {
                None
            } else if rounds + 1 == TRIAL.0 && seen.rate < TRIAL.1 * before {
                Some(State::Barred(BARRED))
            } else {
                Some(State::Sprayed { rounds: rounds.saturating_add(1), before })
            }
        }
        Some(State::Barred(rounds)) if !round.sprays && rounds > 0 => Some(State::Barred(rounds - 1)),
        Some(State::Whole) if round.sprays => (share <= TOO_MUCH && round.load >= BUSY.1).then_some(State::Whole),
        _ if round.sprays => (share < FITS && round.load >= BUSY.0).then_some(State::Whole),
        _ => (share > TOO_MUCH && seen.link_load >= FULL).then_some(State::sprayed(seen)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three links of 1,000,000 bytes a second.
    fn round(bytes: f64, sprays: bool) -> Round {
        Round { capacity: 1e6, load: bytes / 3e6, sprays }
    }

    fn traffic_of(rate: f64) -> BucketTraffic {
        BucketTraffic { rate, link_load: rate / 1e6 }
    }

    #[test]
    fn a_lone_elephant_is_sprayed_while_it_gains() {
        let mut elephants = Elephants::default();
        assert_eq!(elephants.next(1, traffic_of(0.5e6), round(0.5e6, false)), None, "its link is not full");
        assert!(matches!(elephants.next(1, traffic_of(0.95e6), round(1e6, false)), Some(State::Sprayed { .. })));
        for _ in 0..100 {
            assert!(matches!(elephants.next(1, traffic_of(2.7e6), round(2.8e6, false)), Some(State::Sprayed { .. })));
        }
        assert_eq!(elephants.next(1, traffic_of(0.9e6), round(2.8e6, false)), None, "others have come");
    }

    #[test]
    fn what_gains_nothing_is_left_alone_for_a_while() {
        let mut elephants = Elephants::default();
        let mut sprayed = 0;
        for _ in 0..=(BARRED + TRIAL.0) {
            let state = elephants.next(1, traffic_of(0.95e6), round(1e6, false));
            sprayed += u32::from(matches!(state, Some(State::Sprayed { .. })));
        }
        assert_eq!(sprayed, TRIAL.0);
        elephants.next(1, traffic_of(0.95e6), round(1e6, false));
        let state = elephants.next(1, traffic_of(0.95e6), round(1e6, false));
        assert!(matches!(state, Some(State::Sprayed { .. })), "another trial, {state:?}");
    }

    #[test]
    fn what_a_full_link_dropped_is_a_gain() {
        // A flow that sends 2.5 times what a link carries, whatever arrives.
        let mut elephants = Elephants::default();
        for at in 0..3 * BARRED {
            let state = elephants.next(1, traffic_of(2.5e6), round(2.5e6, false));
            assert!(matches!(state, Some(State::Sprayed { .. })), "round {at}: {state:?}");
        }
    }

    #[test]
    fn flows_that_fill_a_link_each_go_whole() {
        let mut elephants = Elephants::default();
        for rate in [0.9e6, 1.0e6, 0.8e6] {
            assert_eq!(elephants.next(1, traffic_of(rate), round(2.8e6, false)), None);
            assert_eq!(elephants.next(2, traffic_of(rate), round(2.8e6, true)), Some(State::Whole));
        }
        assert_eq!(elephants.next(2, traffic_of(1.1e6), round(2.8e6, true)), Some(State::Whole), "no swinging");
        assert_eq!(elephants.next(2, traffic_of(1.4e6), round(2.8e6, true)), None, "another has left");
        assert_eq!(elephants.next(3, traffic_of(0.1e6), round(0.3e6, true)), None, "links are not busy");
        assert_eq!(elephants.next(3, traffic_of(2.8e6), round(2.8e6, true)), None, "one for all links");
    }

    #[test]
    fn a_changed_policy_starts_again() {
        let mut elephants = Elephants::default();
        elephants.next(1, traffic_of(0.95e6), round(1e6, false));
        assert_eq!(elephants.next(1, traffic_of(2.8e6), round(2.8e6, true)), None);
        elephants.next(1, traffic_of(0.9e6), round(2.8e6, true));
        assert_eq!(elephants.next(1, traffic_of(0.9e6), round(2.8e6, false)), None);
        elephants.next(1, traffic_of(0.95e6), round(1e6, false));
        elephants.retain(|_| false);
        assert!(elephants.0.is_empty());
    }
}
