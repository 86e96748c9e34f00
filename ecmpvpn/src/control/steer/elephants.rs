//! Which flows use several links at once, and which go whole. Pure.
//!
//! Spraying a flow costs some order, so it has to be worth it. Under `adaptive` a flow is sprayed if it fills its link
//! while others could carry more, and stays so only if that makes it faster. Under `spray`, flows that share busy links
//! evenly go whole: spraying them gains nothing.

use std::collections::BTreeMap;

/// Of what each link would carry were all even: a flow that carries more does not fit one link.
const TOO_MUCH: f64 = 1.3;
/// A flow that carries less fits one.
const FITS: f64 = 1.1;
/// Share of a link's time from which it counts as full.
const FULL: f64 = 0.8;
/// A sprayed flow that carries less than this share of a link is no elephant any more.
const NOT_FULL: f64 = 0.6;
/// Share of all links' time from which flows that fit a link each are worth keeping whole, and below which no longer.
const BUSY: (f64, f64) = (0.4, 0.25);
/// After so many rounds a sprayed flow must have become faster, by this factor.
const TRIAL: (u32, f64) = (4, 1.2);
/// For so many rounds a flow that did not is left alone.
const BARRED: u32 = 60;

/// What all flows of a peer see, in one round.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Bytes a second that a link can carry, on average.
    pub capacity: f64,
    /// Share of all links' time that is used.
    pub load: f64,
    /// Whether flows are sprayed unless marked.
    pub sprays: bool,
}

/// One flow that carries something.
#[derive(Clone, Copy, Debug)]
pub struct BucketTraffic {
    /// Bytes a second.
    pub rate: f64,
    /// Share of its link's time that is used, by all.
    pub link_load: f64,
}

/// How a flow goes, where that differs from what its policy does by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    /// Over several links, though its policy keeps flows whole.
    Sprayed {
        /// For so many rounds.
        rounds: u32,
        /// Bytes a second before.
        before: f64,
    },
    /// As its policy says: spraying it gained nothing. For so many rounds more.
    Barred(u32),
    /// Whole, though its policy sprays.
    Whole,
}

/// The states of a peer's flows, by bucket.
#[derive(Debug, Default)]
pub struct Elephants(BTreeMap<u32, State>);

impl Elephants {
    /// What becomes of a flow in this round.
    pub fn next(&mut self, bucket: u32, seen: BucketTraffic, round: Round) -> Option<State> {
        let next = next(self.0.get(&bucket).copied(), seen, round);
        match next {
            Some(state) => self.0.insert(bucket, state),
            None => self.0.remove(&bucket),
        };
        next
    }

    /// Drops what is known of flows that are gone.
    pub fn retain(&mut self, mut is_there: impl FnMut(u32) -> bool) {
        self.0.retain(|bucket, _| is_there(*bucket));
    }
}

fn next(state: Option<State>, seen: BucketTraffic, round: Round) -> Option<State> {
    let share = seen.rate / (round.capacity * round.load).max(1.0);
    match state {
        Some(State::Sprayed { rounds, before }) if !round.sprays => {
            if share < FITS || seen.rate < NOT_FULL * round.capacity {
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
        _ => (share > TOO_MUCH && seen.link_load >= FULL).then_some(State::Sprayed { rounds: 0, before: seen.rate }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three links of 1,000,000 bytes a second.
    fn round(bytes: f64, sprays: bool) -> Round {
        Round { capacity: 1e6, load: bytes / 3e6, sprays }
    }

    fn seen(rate: f64) -> BucketTraffic {
        BucketTraffic { rate, link_load: rate / 1e6 }
    }

    #[test]
    fn a_lone_elephant_is_sprayed_while_it_gains() {
        let mut elephants = Elephants::default();
        assert_eq!(elephants.next(1, seen(0.5e6), round(0.5e6, false)), None, "its link is not full");
        assert!(matches!(elephants.next(1, seen(0.95e6), round(1e6, false)), Some(State::Sprayed { .. })));
        for _ in 0..100 {
            assert!(matches!(elephants.next(1, seen(2.7e6), round(2.8e6, false)), Some(State::Sprayed { .. })));
        }
        assert_eq!(elephants.next(1, seen(0.9e6), round(2.8e6, false)), None, "others have come");
    }

    #[test]
    fn what_gains_nothing_is_left_alone_for_a_while() {
        let mut elephants = Elephants::default();
        let mut sprayed = 0;
        for _ in 0..=(BARRED + TRIAL.0) {
            let state = elephants.next(1, seen(0.95e6), round(1e6, false));
            sprayed += u32::from(matches!(state, Some(State::Sprayed { .. })));
        }
        assert_eq!(sprayed, TRIAL.0);
        elephants.next(1, seen(0.95e6), round(1e6, false));
        let state = elephants.next(1, seen(0.95e6), round(1e6, false));
        assert!(matches!(state, Some(State::Sprayed { .. })), "another trial, {state:?}");
    }

    #[test]
    fn flows_that_fill_a_link_each_go_whole() {
        let mut elephants = Elephants::default();
        for rate in [0.9e6, 1.0e6, 0.8e6] {
            assert_eq!(elephants.next(1, seen(rate), round(2.8e6, false)), None);
            assert_eq!(elephants.next(2, seen(rate), round(2.8e6, true)), Some(State::Whole));
        }
        assert_eq!(elephants.next(2, seen(1.1e6), round(2.8e6, true)), Some(State::Whole), "no swinging");
        assert_eq!(elephants.next(2, seen(1.4e6), round(2.8e6, true)), None, "another has left");
        assert_eq!(elephants.next(3, seen(0.1e6), round(0.3e6, true)), None, "links are not busy");
        assert_eq!(elephants.next(3, seen(2.8e6), round(2.8e6, true)), None, "one for all links");
    }

    #[test]
    fn a_changed_policy_starts_anew() {
        let mut elephants = Elephants::default();
        elephants.next(1, seen(0.95e6), round(1e6, false));
        assert_eq!(elephants.next(1, seen(2.8e6), round(2.8e6, true)), None);
        elephants.next(1, seen(0.9e6), round(2.8e6, true));
        assert_eq!(elephants.next(1, seen(0.9e6), round(2.8e6, false)), None);
        elephants.next(1, seen(0.95e6), round(1e6, false));
        elephants.retain(|_| false);
        assert!(elephants.0.is_empty());
    }
}
