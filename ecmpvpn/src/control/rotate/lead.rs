//! Decides when the leading end changes a tunnel's keys, and when it restores the former ones. Pure: time and
//! observations come from the caller.
//!
//! ```text
//! Ready --far end ready, others live--> Leaving --both have left--> Settling --> Changed --alive, kept there--> kept
//!    |                                    |                                        |
//!  stop: nothing was changed            stop                              former keys, stop
//! ```

use std::time::Duration;

/// How long to wait until the far end says that it has the new keys.
const READY: Duration = Duration::from_secs(10);
/// How long both ends may take to stop using the tunnel.
const LEAVE: Duration = Duration::from_secs(5);
/// How long to wait, when both have stopped, for packets that are still in the tunnel.
const SETTLE: Duration = Duration::from_millis(300);
/// How long a tunnel whose change was cut off may take to answer with its former keys: as long as WireGuard waits before
/// it repeats a handshake.
const DOUBT: Duration = Duration::from_secs(5);
/// How long the tunnel may take to answer with its new keys. WireGuard repeats a handshake that came too early after 5
/// s.
const ANSWER: Duration = Duration::from_secs(20);

/// The observed state of a tunnel.
#[expect(clippy::struct_excessive_bools, reason = "four findings of one look")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Observation {
    /// The tunnel carries traffic.
    pub live: bool,
    /// Another tunnel to the same site carries traffic.
    pub others: bool,
    /// The far end has the new keys of the same renewal, and its configuration does not name them yet.
    pub far_ready: bool,
    /// The far end sends nothing but probes through it.
    pub far_left: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Wait,
    /// Ask that both ends stop using the tunnel.
    Leave,
    /// Give it its new keys.
    Change,
    /// It works: keep them.
    Keep,
    /// Give it its former keys, and stop.
    GoBack(&'static str),
    /// Stop; nothing was changed.
    Stop(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Ready,
    Leaving,
    Settling,
    Changed,
}

#[derive(Clone, Copy, Debug)]
pub struct Lead {
    phase: Phase,
    since: Duration,
    began: Duration,
    begun: bool,
}

impl Lead {
    /// Begins at `now`. `has_new`: the tunnel has its new keys already. `begun`: an earlier process has begun to change
    /// it, so that the far end may have the new keys already.
    pub fn new(now: Duration, has_new: bool, begun: bool) -> Self {
        Self { phase: if has_new { Phase::Changed } else { Phase::Ready }, since: now, began: now, begun }
    }

    /// Says what to do at `now`. The caller must do it.
    pub fn poll(&mut self, now: Duration, seen: Observation) -> Action {
        let waited = now.saturating_sub(self.since);
        let (next, todo) = match self.phase {
            // The far end may have the new keys, or the former ones still.
            Phase::Ready if !seen.live && self.begun && waited >= DOUBT => (Phase::Changed, Action::Change),
            // The far end has the former keys, like this one: they are not why it is silent. After a start, a tunnel
            // takes some seconds to answer.
            Phase::Ready if !seen.live && !self.begun => {
                self.since = now;
                let gave_up = now.saturating_sub(self.began) >= ANSWER;
                return if gave_up { Action::Stop("it does not answer with its present keys") } else { Action::Wait };
            }
            Phase::Ready if seen.live && seen.others && seen.far_ready => (Phase::Leaving, Action::Leave),
            Phase::Ready if waited >= READY && !seen.others => {
                return Action::Stop("no other tunnel to that site is up, so that its traffic would be interrupted");
            }
            Phase::Ready if waited >= READY => {
                return Action::Stop(
                    "the other site does not have the new keys: apply the file there, with `run` running",
                );
            }
            Phase::Leaving if !seen.live && seen.far_left => (Phase::Settling, Action::Wait),
            Phase::Leaving if waited >= LEAVE => {
                return Action::Stop("the two sites did not both stop using the tunnel");
            }
            Phase::Settling if waited >= SETTLE => (Phase::Changed, Action::Change),
            // The far end has written the new keys to its configuration: it does not restore the former ones any more.
            Phase::Changed if seen.live && !seen.far_ready => return Action::Keep,
            Phase::Changed if waited >= ANSWER => {
                return Action::GoBack("it did not answer with its new keys, and has its former ones again");
            }
            _ => return Action::Wait,
        };
        *self = Self { phase: next, since: now, ..*self };
        todo
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: Observation = Observation { live: true, others: true, far_ready: true, far_left: false };
    const LEFT: Observation = Observation { live: false, far_left: true, ..FINE };
    const KEPT: Observation = Observation { far_ready: false, ..FINE };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_tunnel_is_left_by_both_before_it_is_changed_and_kept_when_it_answers() {
        let mut lead = Lead::new(ms(0), false, false);
        assert_eq!(lead.poll(ms(1), KEPT), Action::Wait);
        assert_eq!(lead.poll(ms(100), FINE), Action::Leave);
        // Only one end has stopped using it.
        assert_eq!(lead.poll(ms(200), Observation { live: false, ..FINE }), Action::Wait);
        assert_eq!(lead.poll(ms(900), Observation { live: true, ..LEFT }), Action::Wait);
        assert_eq!(lead.poll(ms(1000), LEFT), Action::Wait);
        assert_eq!(lead.poll(ms(1299), LEFT), Action::Wait);
        assert_eq!(lead.poll(ms(1300), LEFT), Action::Change);
        assert_eq!(lead.poll(ms(5000), LEFT), Action::Wait);
        assert_eq!(lead.poll(ms(5001), FINE), Action::Wait, "not kept at the far end");
        assert_eq!(lead.poll(ms(5200), KEPT), Action::Keep);
    }

    #[test]
    fn without_the_far_end_or_another_tunnel_nothing_is_touched() {
        for (seen, why) in
            [(KEPT, "does not have the new keys"), (Observation { others: false, ..FINE }, "no other tunnel")]
        {
            let mut lead = Lead::new(ms(0), false, false);
            assert_eq!(lead.poll(ms(9_999), seen), Action::Wait);
            let Action::Stop(message) = lead.poll(ms(10_000), seen) else { panic!() };
            assert!(message.contains(why), "{message}");
        }
        let mut lead = Lead::new(ms(0), false, false);
        assert_eq!(lead.poll(ms(0), FINE), Action::Leave);
        assert!(matches!(lead.poll(ms(5_000), Observation { live: false, ..FINE }), Action::Stop(_)));
    }

    #[test]
    fn what_does_not_come_back_has_its_former_keys_again() {
        let mut lead = Lead::new(ms(0), false, false);
        lead.poll(ms(0), FINE);
        lead.poll(ms(1), LEFT);
        assert_eq!(lead.poll(ms(301), LEFT), Action::Change);
        assert_eq!(lead.poll(ms(20_300), LEFT), Action::Wait);
        assert!(matches!(lead.poll(ms(20_301), LEFT), Action::GoBack(_)));
    }

    #[test]
    fn one_that_was_cut_off_goes_on_with_the_new_keys() {
        let mut lead = Lead::new(ms(0), false, true);
        let dead = Observation { live: false, others: true, far_ready: false, far_left: false };
        assert_eq!(lead.poll(ms(4_999), dead), Action::Wait);
        assert_eq!(lead.poll(ms(5_000), dead), Action::Change);
        assert_eq!(lead.poll(ms(5_400), KEPT), Action::Keep);
        assert_eq!(Lead::new(ms(0), true, true).poll(ms(1), KEPT), Action::Keep);
    }

    #[test]
    fn one_that_was_cut_off_before_the_far_end_changed_begins_again() {
        let mut lead = Lead::new(ms(0), false, true);
        let dead = Observation { live: false, others: true, far_ready: true, far_left: false };
        assert_eq!(lead.poll(ms(3_000), dead), Action::Wait);
        assert_eq!(lead.poll(ms(3_100), FINE), Action::Leave);
    }

    #[test]
    fn one_that_has_not_answered_yet_keeps_its_keys() {
        let dead = Observation { live: false, others: true, far_ready: false, far_left: false };
        let mut lead = Lead::new(ms(0), false, false);
        assert_eq!(lead.poll(ms(300), dead), Action::Wait);
        assert_eq!(lead.poll(ms(15_000), dead), Action::Wait);
        // The time for the far end's answer begins when the tunnel is up.
        assert_eq!(lead.poll(ms(15_100), Observation { live: true, ..dead }), Action::Wait);
        assert_eq!(lead.poll(ms(15_200), FINE), Action::Leave);
        let mut lead = Lead::new(ms(0), false, false);
        assert_eq!(lead.poll(ms(19_999), dead), Action::Wait);
        assert!(matches!(lead.poll(ms(20_000), dead), Action::Stop(_)));
    }
}
