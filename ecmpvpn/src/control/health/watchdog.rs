//! Decides when a tunnel that stays dead is restarted. Pure.
//!
//! Both ends do this, and must not undo each other's work. If their handshake initiations cross, each end waits for a
//! response that the other one drops (`wg_noise_handshake_consume_initiation()`, drivers/net/wireguard/noise.c). So one
//! end leads and the other acts later, each after a random delay of its own ([`Watchdog::new`]).

use super::nanos::{Nanos, SECOND};
use crate::config::InterfaceName;

/// A tunnel that has been dead for this long is restarted. The delay doubles with each further restart.
const FIRST: Nanos = 5 * SECOND;
const LONGEST: Nanos = 300 * SECOND;
/// How much later the following end acts.
const FOLLOWS: Nanos = 2 * SECOND + SECOND / 2;
/// Upper bound of the random delay that each end adds.
const SCATTER: Nanos = SECOND;
/// A new handshake is tried this many times before the interface is set up again.
const HANDSHAKES: u32 = 2;

/// How a tunnel is restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Sets the peer again: WireGuard forgets the session keys, the endpoint is the configured one, and the next packet
    /// starts a handshake.
    Handshake,
    /// Sets the interface down, sets key, port and peer again, and sets it up: that also gives it a new socket. It
    /// keeps its index, addresses and programs.
    Interface,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Watchdog {
    tried: u32,
    next: Nanos,
    /// The delay of this end: random, and `FOLLOWS` if it does not lead.
    lag: Nanos,
}

impl Watchdog {
    /// For the end that `leads`, or the other one. `random`: any number, different for each tunnel and end.
    pub fn new(leads: bool, random: u64) -> Self {
        let lag = random % SCATTER + if leads { 0 } else { FOLLOWS };
        Self { lag, ..Self::default() }
    }

    /// The remedy that is due at `now`, if any. `dead`: since when the tunnel is dead, `None` if it is up. `others`:
    /// another tunnel to the same site is up, so the site is reachable.
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

/// A request to restart a tunnel.
#[derive(Clone, Debug)]
pub struct Request {
    pub tunnel: InterfaceName,
    pub remedy: Remedy,
    /// The tunnel has never had a handshake.
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
        // Both ends found the tunnel dead at the same moment.
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
    fn a_tunnel_that_is_up_is_left_alone_and_starts_again() {
        let mut dog = Watchdog::default();
        assert_eq!(dog.poll(500 * SECOND, None, true), None);
        assert!(dog.poll(600 * SECOND, Some(595 * SECOND), true).is_some());
        assert_eq!(dog.poll(601 * SECOND, None, true), None);
        assert_eq!(dog.poll(602 * SECOND, Some(601 * SECOND), true), None);
        assert!(dog.poll(606 * SECOND, Some(601 * SECOND), true).is_some());
    }
}
