//! Agrees with the far end that it restores the order of the packets that this end sprays, and the other way round. Pure.
//!
//! A mark in a packet must never reach a host, and nobody but the far gateway must be able to make one. So each
//! direction begins in three steps, one probe each: the receiver *offers* to restore; the sender removes marks that its
//! own hosts make up and says that it is *ready*; the receiver heeds marks, and says that it *acts*; the sender stamps.
//! A former version says none of this, and so packets of it and to it are left alone.

use super::nanos::{Nanos, SECOND};

/// How long a message counts: a few intervals of probes, and at least this long.
const LIFETIME: Nanos = SECOND;
/// In intervals of probes.
const INTERVALS: u64 = 4;

/// What one end says about the order of sprayed packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ordering {
    /// It can restore the order of what it receives.
    pub offers: bool,
    /// It restores it.
    pub acts: bool,
    /// Of what it sends, nothing is marked that it has not stamped.
    pub ready: bool,
}

/// What this end does for one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// What to tell the far end.
    pub says: Ordering,
    /// Heed the marks of packets that arrive.
    pub restores: bool,
    /// Remove made-up marks from packets that leave.
    pub unmarks: bool,
    /// Stamp sprayed packets.
    pub stamps: bool,
}

/// The agreement with one peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    far: Ordering,
    heard: Option<Nanos>,
    /// When this end last offered to restore.
    offered: Option<Nanos>,
}

impl Agreement {
    /// Takes a message of the far end, from any of its tunnels.
    pub fn hear(&mut self, far: Ordering, now: Nanos) {
        (self.far, self.heard) = (far, Some(now));
    }

    /// What this end does now. `is_on`: the configuration allows it. `can_hold`: there is a device that holds packets
    /// until their time. `interval`: between two probes of a tunnel.
    pub fn state(&mut self, is_on: bool, can_hold: bool, now: Nanos, interval: Nanos) -> Agreed {
        let lifetime = LIFETIME.max(INTERVALS * interval);
        let is_fresh = self.heard.is_some_and(|at| now.saturating_sub(at) < lifetime);
        let far = if is_fresh { self.far } else { Ordering::default() };
        let offers = is_on && can_hold;
        if offers {
            self.offered = Some(now);
        }
        // Marks are heeded also while the far end is silent, and for a while after this end was switched off: packets
        // that the far end has stamped may still arrive.
        let still = can_hold && self.offered.is_some_and(|at| now.saturating_sub(at) < 2 * lifetime);
        let restores = still && self.far.ready;
        let unmarks = is_on && far.offers;
        let says = Ordering { offers, acts: offers && restores, ready: unmarks };
        Agreed { says, restores, unmarks, stamps: unmarks && far.acts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Nanos = SECOND / 10;

    /// Two ends that exchange a message each, in turn.
    fn exchange(rounds: usize, on: [bool; 2], can_hold: [bool; 2]) -> [Agreed; 2] {
        let mut ends = [Agreement::default(); 2];
        for round in 0..rounds {
            for from in [0, 1] {
                let said = ends[from].state(on[from], can_hold[from], round as Nanos, INTERVAL).says;
                ends[1 - from].hear(said, round as Nanos);
            }
        }
        [0, 1].map(|end| ends[end].state(on[end], can_hold[end], rounds as Nanos, INTERVAL))
    }

    #[test]
    fn both_ends_stamp_once_the_other_one_restores() {
        for rounds in 0..10 {
            let [a, b] = exchange(rounds, [true; 2], [true; 2]);
            for (sender, receiver) in [(a, b), (b, a)] {
                assert!(!sender.stamps || sender.unmarks && receiver.restores, "{sender:?}, {receiver:?}");
            }
            if rounds > 3 {
                assert!(a.stamps && b.stamps && a.restores && b.restores);
            }
        }
    }

    #[test]
    fn an_end_that_cannot_hold_packets_still_stamps_for_one_that_can() {
        let [a, b] = exchange(10, [true; 2], [false, true]);
        assert!(a.stamps && !a.restores && !b.stamps && b.restores, "{a:?}, {b:?}");
    }

    #[test]
    fn an_end_that_is_switched_off_does_nothing() {
        let [a, b] = exchange(10, [false, true], [true; 2]);
        assert_eq!(a, Agreed::default());
        assert!(!b.stamps && !b.restores && !b.unmarks);
    }

    #[test]
    fn a_silent_end_is_not_stamped_for() {
        let mut agreement = Agreement::default();
        agreement.hear(Ordering { offers: true, acts: true, ready: true }, 5 * SECOND);
        assert!(agreement.state(true, true, 5 * SECOND + SECOND / 2, INTERVAL).stamps);
        let later = agreement.state(true, true, 6 * SECOND, INTERVAL);
        assert!(!later.stamps && later.restores);
        let off = |agreement: &mut Agreement, now| agreement.state(false, true, now, INTERVAL);
        let stays = off(&mut agreement, 7 * SECOND);
        assert!(stays.restores && stays.says == Ordering::default(), "stamped packets may still come");
        assert!(!off(&mut agreement, 9 * SECOND).restores);
        assert!(agreement.state(true, true, 9 * SECOND, INTERVAL).restores);
        agreement.hear(Ordering::default(), 9 * SECOND);
        assert!(!agreement.state(true, true, 9 * SECOND, INTERVAL).restores, "a former version has started there");
    }
}
