//! When a tunnel that stays dead is started anew. Pure.
//!
//! Both ends watch, and what one does must not undo what the other has just done: handshake initiations that cross leave
//! both ends waiting for a response that the other one drops (`wg_noise_handshake_consume_initiation()`,
//! drivers/net/wireguard/noise.c). So one end leads and the other comes later, and both at a moment of their own
//! ([`Watchdog::new`]).

use super::nanos::Nanos;
use crate::config::InterfaceName;

const SECOND: Nanos = 1_000_000_000;
/// A tunnel that has been dead for this long is restarted. The delay doubles with each further restart.
const FIRST: Nanos = 5 * SECOND;
const LONGEST: Nanos = 300 * SECOND;
/// The following end acts later by this.
const FOLLOWS: Nanos = 2 * SECOND + SECOND / 2;
/// Each end acts later by a random time below this.
const SCATTER: Nanos = SECOND;
/// A new handshake is tried this many times before the interface is set up again.
const HANDSHAKES: u32 = 2;

/// How a tunnel is started anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Its peer is set again: keys are forgotten, the endpoint is the configured one, and the next packet begins a
    /// handshake.
    Handshake,
    /// Its interface is set down, given key, port and peer again, and set up: a new socket as well. It keeps its index,
    /// its addresses and its programs.
    Interface,
}

/// One tunnel's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watchdog {
    tried: u32,
    next: Nanos,
    /// How much later than others this one acts.
    lag: Nanos,
}

impl Watchdog {
    /// One of the end that `leads`, or of the other. `random`: any number, another one for each tunnel and end.
    pub fn new(leads: bool, random: u64) -> Self {
        let lag = random % SCATTER + if leads { 0 } else { FOLLOWS };
        Self { lag, ..Self::default() }
    }

    /// What is due at `now` for a tunnel that is `dead` since then, `None` for one that lives; `others`: another
    /// tunnel to the same site lives, so that the site can be reached.
    pub fn poll(&mut self, now: Nanos, dead: Option<Nanos>, others: bool) -> Option<Remedy> {
        let Some(since) = dead else {
            *self = Self { lag: self.lag, ..Self::default() };
            return None;
        };
        if self.tried == 0 {
            self.next = since + FIRST + self.lag;
        }
        if now < self.next {
            return None;
        }
        self.tried = self.tried.saturating_add(1);
        self.next = now + (FIRST << self.tried.min(10)).min(LONGEST) + self.lag;
        Some(if others && self.tried > HANDSHAKES { Remedy::Interface } else { Remedy::Handshake })
    }
}

/// A tunnel that is to be started anew.
#[derive(Clone, Debug)]
pub struct Request {
    pub tunnel: InterfaceName,
    pub remedy: Remedy,
    /// It has never had a handshake yet.
    pub first: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(others: bool) -> Vec<(Nanos, Remedy)> {
        let mut dog = Watchdog::default();
        let at = |second: Nanos| (second, 100 * SECOND + second * SECOND);
        (0..2000).map(at).filter_map(|(s, now)| Some((s, dog.poll(now, Some(100 * SECOND), others)?))).collect()
    }

    #[test]
    fn handshakes_come_first_and_ever_more_rarely() {
        use Remedy::{Handshake, Interface};
        let found = times(true);
        assert_eq!(found[..4], [(5, Handshake), (15, Handshake), (35, Interface), (75, Interface)]);
        assert!(found.windows(2).all(|pair| pair[1].0 - pair[0].0 <= 300), "{found:?}");
    }

    #[test]
    fn the_ends_of_a_tunnel_never_act_together() {
        // Both have found it dead at the same moment.
        let acts = |leads, random| {
            let mut dog = Watchdog::new(leads, random);
            let at = |tenth: Nanos| tenth * SECOND / 10;
            (0..1_500).map(at).filter(|now| dog.poll(*now, Some(0), true).is_some()).collect::<Vec<_>>()
        };
        for random in [0, 7, SCATTER - 1, 123 * SCATTER + SCATTER / 2] {
            for other in [0, SCATTER / 3, SCATTER - 1] {
                let (leader, follower) = (acts(true, random), acts(false, other));
                assert!(leader.len() >= 4 && follower.len() >= 4);
                let apart = |at: &Nanos| leader.iter().map(|lead| lead.abs_diff(*at)).min();
                assert!(follower.iter().all(|at| apart(at) >= Some(SECOND / 2)), "{leader:?} {follower:?}");
            }
        }
    }

    #[test]
    fn no_interface_is_rebuilt_while_the_site_cannot_be_reached() {
        assert!(times(false).iter().all(|(_, remedy)| *remedy == Remedy::Handshake));
    }

    #[test]
    fn a_tunnel_that_lives_is_left_alone_and_begins_anew() {
        let mut dog = Watchdog::default();
        assert_eq!(dog.poll(500 * SECOND, None, true), None);
        assert!(dog.poll(600 * SECOND, Some(595 * SECOND), true).is_some());
        assert_eq!(dog.poll(601 * SECOND, None, true), None);
        assert_eq!(dog.poll(602 * SECOND, Some(601 * SECOND), true), None);
        assert!(dog.poll(606 * SECOND, Some(601 * SECOND), true).is_some());
    }
}
