//! Which keys the following end gives a tunnel: those that the leading end uses. Pure.
//!
//! It needs no word of the moment. A tunnel that the leading end wanted left, and that is silent now, has either its former
//! keys at the far end or its new ones: it tries one after the other until it is answered, and so finds back after any
//! interruption at either end. So it does where this process has just begun, or the tunnel stays dead. A tunnel that only
//! fails for a moment is left alone.

use std::time::Duration;

/// Nothing has come from the tunnel for so long, though probes go on.
const SILENT: Duration = Duration::from_millis(500);
/// Dead for so long, it may be for its keys, whatever the leading end has said.
const LONG: Duration = Duration::from_secs(30);
/// How long each of the two gets. The far end repeats a handshake after 5 s, and must find the keys that it has.
const EACH: Duration = Duration::from_secs(7);

/// What is seen of a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// It carries traffic.
    pub live: bool,
    /// Since when nothing has come from it.
    pub silent: Duration,
    /// The leading end wants it left.
    pub asked: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Nothing.
    Wait,
    /// Give it its new keys.
    TryNew,
    /// Give it its former keys.
    TryFormer,
    /// It works with the new ones: keep them.
    Keep,
}

/// One tunnel's.
#[derive(Clone, Copy, Debug)]
pub struct Follow {
    has_new: bool,
    /// Its keys may be what it is silent for.
    suspect: bool,
    tried: Option<Duration>,
}

impl Follow {
    /// Of a tunnel that has its new keys already, or its former ones.
    pub fn new(has_new: bool) -> Self {
        Self { has_new, suspect: true, tried: None }
    }

    /// What is to be done at `now`; `interval`: between probes.
    pub fn poll(&mut self, now: Duration, interval: Duration, seen: Observation) -> Do {
        if seen.live {
            self.tried = None;
            self.suspect = false;
            return if self.has_new { Do::Keep } else { Do::Wait };
        }
        self.suspect |= seen.asked || seen.silent >= LONG;
        let silent = self.suspect && seen.silent >= SILENT.max(4 * interval);
        let tried_enough = self.tried.is_none_or(|at| now.saturating_sub(at) >= EACH.max(20 * interval));
        if !silent || !tried_enough {
            return Do::Wait;
        }
        self.tried = Some(now);
        self.has_new = !self.has_new;
        if self.has_new { Do::TryNew } else { Do::TryFormer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(100);

    fn seen(live: bool, silent: u64) -> Observation {
        Observation { live, silent: Duration::from_millis(silent), asked: false }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn it_changes_when_the_tunnel_falls_silent_and_keeps_what_works() {
        let mut follow = Follow::new(false);
        assert_eq!(follow.poll(ms(0), INTERVAL, seen(true, 9_000)), Do::Wait, "in use");
        let left = Observation { asked: true, ..seen(false, 100) };
        assert_eq!(follow.poll(ms(10), INTERVAL, left), Do::Wait, "left, and still answering");
        assert_eq!(follow.poll(ms(700), INTERVAL, seen(false, 500)), Do::TryNew);
        assert_eq!(follow.poll(ms(2_000), INTERVAL, seen(false, 1_800)), Do::Wait);
        assert_eq!(follow.poll(ms(2_500), INTERVAL, seen(true, 0)), Do::Keep);
    }

    #[test]
    fn it_tries_one_after_the_other_until_one_is_answered() {
        let mut follow = Follow::new(false);
        let mut done = Vec::new();
        for second in 0..30 {
            match follow.poll(ms(second * 1000), INTERVAL, seen(false, 1_000)) {
                Do::Wait => {}
                todo => done.push((second, todo)),
            }
        }
        let expected = [(0, Do::TryNew), (7, Do::TryFormer), (14, Do::TryNew), (21, Do::TryFormer), (28, Do::TryNew)];
        assert_eq!(done, expected);
        assert_eq!(follow.poll(ms(36_000), INTERVAL, seen(false, 9_000)), Do::TryFormer);
        // The far end has gone back to the former ones.
        assert_eq!(follow.poll(ms(37_000), INTERVAL, seen(true, 0)), Do::Wait);
    }

    #[test]
    fn one_that_fails_for_another_reason_keeps_its_keys() {
        let mut follow = Follow::new(false);
        follow.poll(ms(0), INTERVAL, seen(true, 0));
        assert_eq!(follow.poll(ms(1_000), INTERVAL, seen(false, 1_000)), Do::Wait);
        assert_eq!(follow.poll(ms(29_900), INTERVAL, seen(false, 29_900)), Do::Wait);
        assert_eq!(follow.poll(ms(30_000), INTERVAL, seen(false, 30_000)), Do::TryNew);
    }
}
