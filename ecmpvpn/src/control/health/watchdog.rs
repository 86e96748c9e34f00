//! When a tunnel that stays dead is started anew. Pure.

use super::Nanos;

const SECOND: Nanos = 1_000_000_000;
/// Dead for so long, a tunnel is started anew; the next times come after twice as long each.
const FIRST: Nanos = 5 * SECOND;
const LONGEST: Nanos = 300 * SECOND;
/// So often the handshake alone is tried.
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
}

impl Watchdog {
    /// What is due at `now` for a tunnel that is `dead` since then, `None` for one that lives; `others`: another
    /// tunnel to the same site lives, so that the site can be reached.
    pub fn poll(&mut self, now: Nanos, dead: Option<Nanos>, others: bool) -> Option<Remedy> {
        let Some(since) = dead else {
            *self = Self::default();
            return None;
        };
        if self.tried == 0 {
            self.next = since + FIRST;
        }
        if now < self.next {
            return None;
        }
        self.tried = self.tried.saturating_add(1);
        self.next = now + (FIRST << self.tried.min(10)).min(LONGEST);
        Some(if others && self.tried > HANDSHAKES { Remedy::Interface } else { Remedy::Handshake })
    }
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
