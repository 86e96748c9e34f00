//! Decides which keys the following end gives a tunnel: those that the leading end uses. Pure.
//!
//! It needs no message about the exact moment. If the leading end asked to stop using a tunnel, and the tunnel is
//! silent now, then the far end has either the former keys or the new ones. The following end tries both in turn until
//! probes are answered, and so recovers from any interruption at either end. It does the same if this process has just
//! started, or the tunnel stays dead. A tunnel that fails only briefly is left alone.

use std::time::Duration;

/// A tunnel is silent if nothing has come from it for this long, although probes continue.
const SILENT: Duration = Duration::from_millis(500);
/// If a tunnel is silent for this long, its keys may be the cause, whatever the leading end has said.
const LONG: Duration = Duration::from_secs(30);
/// How long each of the two keys is tried. The far end repeats a handshake after 5 s, and must meet its own keys within
/// this time.
const EACH: Duration = Duration::from_secs(7);

/// The observed state of a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// The tunnel carries traffic.
    pub live: bool,
    /// For how long nothing has come from it.
    pub silent: Duration,
    /// The leading end asks both ends to stop using it.
    pub asked: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Wait,
    /// Give it its new keys.
    TryNew,
    /// Give it its former keys.
    TryFormer,
    /// It works with its new keys: keep them.
    Keep,
}

#[derive(Clone, Copy, Debug)]
pub struct Follow {
    has_new: bool,
    /// Its keys may be the cause of the silence.
    suspect: bool,
    tried: Option<Duration>,
}

impl Follow {
    /// `has_new`: the tunnel has its new keys already.
    pub fn new(has_new: bool) -> Self {
        Self { has_new, suspect: true, tried: None }
    }

    /// Says what to do at `now`. `interval`: the time between probes.
    pub fn poll(&mut self, now: Duration, interval: Duration, seen: Observation) -> Action {
        if seen.live {
            self.tried = None;
            self.suspect = false;
            return if self.has_new { Action::Keep } else { Action::Wait };
        }
        self.suspect |= seen.asked || seen.silent >= LONG;
        let silent = self.suspect && seen.silent >= SILENT.max(4 * interval);
        let tried_enough = self.tried.is_none_or(|at| now.saturating_sub(at) >= EACH.max(20 * interval));
        if !silent || !tried_enough {
            return Action::Wait;
        }
        self.tried = Some(now);
        self.has_new = !self.has_new;
        if self.has_new { Action::TryNew } else { Action::TryFormer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(100);

    fn observation(live: bool, silent: u64) -> Observation {
        Observation { live, silent: Duration::from_millis(silent), asked: false }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn it_changes_when_the_tunnel_falls_silent_and_keeps_what_works() {
        let mut follow = Follow::new(false);
        assert_eq!(follow.poll(ms(0), INTERVAL, observation(true, 9_000)), Action::Wait, "in use");
        let left = Observation { asked: true, ..observation(false, 100) };
        assert_eq!(follow.poll(ms(10), INTERVAL, left), Action::Wait, "left, and still answering");
        assert_eq!(follow.poll(ms(700), INTERVAL, observation(false, 500)), Action::TryNew);
        assert_eq!(follow.poll(ms(2_000), INTERVAL, observation(false, 1_800)), Action::Wait);
        assert_eq!(follow.poll(ms(2_500), INTERVAL, observation(true, 0)), Action::Keep);
    }

    #[test]
    fn it_tries_one_after_the_other_until_one_is_answered() {
        let mut follow = Follow::new(false);
        let mut done = Vec::new();
        for second in 0..30 {
            match follow.poll(ms(second * 1000), INTERVAL, observation(false, 1_000)) {
                Action::Wait => {}
                todo => done.push((second, todo)),
            }
        }
        let expected = [
            (0, Action::TryNew),
            (7, Action::TryFormer),
            (14, Action::TryNew),
            (21, Action::TryFormer),
            (28, Action::TryNew),
        ];
        assert_eq!(done, expected);
        assert_eq!(follow.poll(ms(36_000), INTERVAL, observation(false, 9_000)), Action::TryFormer);
        // The far end has restored the former keys.
        assert_eq!(follow.poll(ms(37_000), INTERVAL, observation(true, 0)), Action::Wait);
    }

    #[test]
    fn one_that_fails_for_another_reason_keeps_its_keys() {
        let mut follow = Follow::new(false);
        follow.poll(ms(0), INTERVAL, observation(true, 0));
        assert_eq!(follow.poll(ms(1_000), INTERVAL, observation(false, 1_000)), Action::Wait);
        assert_eq!(follow.poll(ms(29_900), INTERVAL, observation(false, 29_900)), Action::Wait);
        assert_eq!(follow.poll(ms(30_000), INTERVAL, observation(false, 30_000)), Action::TryNew);
    }
}
