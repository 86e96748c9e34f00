//! Compares interruptions with what the faults may cost. Pure.

use std::time::Duration;

use crate::bounds::Cost;
use crate::ledger::Outage;

/// A packet that was sent at most this long before a fault began may be lost by the fault.
const ON_THE_WAY: Duration = Duration::from_millis(200);

/// The time in which a fault may cost something.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Number of the event in the schedule.
    pub event: usize,
    pub from: Duration,
    /// When the fault was over. `None` while it lasts.
    pub over: Option<Duration>,
    pub cost: Cost,
}

impl Window {
    /// Until when the fault may cost something.
    fn to(&self) -> Duration {
        let Some(over) = self.over else { return Duration::MAX };
        over + match self.cost {
            Cost::Nothing => Duration::ZERO,
            Cost::Interruptions { longest, settles } => longest + settles,
            Cost::Standstill { after } => after,
        }
    }

    fn overlaps(&self, from: Duration, to: Duration) -> bool {
        self.from.saturating_sub(ON_THE_WAY) <= to && from <= self.to()
    }
}

/// The judgement of an interruption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The interruption is within what faults may cost. `event` is its cause. `recovery` counts from the end of a fault
    /// that stops everything. For other faults, it is the whole interruption without the time in which a `run` was not
    /// watching.
    Within { event: usize, recovery: Duration },
    /// The interruption is longer by `by`, or no fault explains it.
    Beyond { event: Option<usize>, by: Duration },
}

/// All faults and times that explain interruptions.
#[derive(Clone, Debug, Default)]
pub struct Explanations {
    pub windows: Vec<Window>,
    /// Spans in which a `run` was not running, or had not yet heard from each tunnel.
    pub unwatched: Vec<(Duration, Duration)>,
}

impl Explanations {
    /// Judges one interruption.
    ///
    /// Time in which nothing has to flow does not count. If a tunnel may go down, time in which a `run` is not watching
    /// does not count either. The rest may be as long as all faults of that time together may interrupt a flow.
    pub fn judge(&self, outage: &Outage) -> Verdict {
        let Outage { from, to, .. } = *outage;
        let near: Vec<&Window> = self.windows.iter().filter(|window| window.overlaps(from, to)).collect();
        let mut allowed = Duration::ZERO;
        let mut excused: Vec<(Duration, Duration)> = Vec::new();
        for window in &near {
            match window.cost {
                Cost::Nothing => {}
                Cost::Interruptions { longest, .. } => allowed += longest,
                Cost::Standstill { .. } => excused.push((window.from.saturating_sub(ON_THE_WAY), window.to())),
            }
        }
        if near.iter().any(|window| window.cost != Cost::Nothing) {
            excused.extend(&self.unwatched);
        }
        let lasted = to.saturating_sub(from);
        let left = lasted.saturating_sub(covered(from, to, &mut excused));
        let cause = near.iter().filter(|window| window.cost != Cost::Nothing);
        // A fault that stops everything is preferred to one that may interrupt a flow. Then the latest one before the
        // interruption is preferred.
        let cause = cause.max_by_key(|window| {
            let stops = matches!(window.cost, Cost::Standstill { .. });
            (stops, window.from <= from + ON_THE_WAY, window.from)
        });
        match cause {
            Some(window) if left <= allowed => {
                let recovery = match (window.cost, window.over) {
                    (Cost::Standstill { .. }, Some(over)) => to.saturating_sub(over),
                    (Cost::Standstill { .. }, None) => Duration::ZERO,
                    _ => left,
                };
                Verdict::Within { event: window.event, recovery }
            }
            cause => Verdict::Beyond { event: cause.map(|window| window.event), by: left.saturating_sub(allowed) },
        }
    }

    /// Forgets everything that was over before `before`.
    pub fn forget(&mut self, before: Duration) {
        self.windows.retain(|window| window.to() >= before);
        self.unwatched.retain(|(_, to)| *to >= before);
    }
}

/// How much of the time between `from` and `to` the spans cover.
fn covered(from: Duration, to: Duration, spans: &mut [(Duration, Duration)]) -> Duration {
    spans.sort();
    let (mut sum, mut at) = (Duration::ZERO, from);
    for (start, end) in spans {
        let (start, end) = ((*start).max(at), (*end).min(to));
        if start < end {
            sum += end.saturating_sub(start);
            at = end;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn outage(from: u64, to: u64) -> Outage {
        Outage { sender: 0, flow: 0, from: ms(from), to: ms(to), lost: 1, goes_on: false }
    }

    fn window(event: usize, from: u64, over: u64, cost: Cost) -> Window {
        Window { event, from: ms(from), over: Some(ms(over)), cost }
    }

    fn explained(windows: &[Window]) -> Explanations {
        Explanations { windows: windows.to_vec(), unwatched: Vec::new() }
    }

    const DYING: Cost = Cost::Interruptions { longest: ms(500), settles: ms(1_000) };
    const STILL: Cost = Cost::Standstill { after: ms(800) };

    #[test]
    fn without_a_fault_nothing_may_be_lost() {
        assert_eq!(explained(&[]).judge(&outage(100, 180)), Verdict::Beyond { event: None, by: ms(80) });
        let harmless = explained(&[window(4, 0, 10_000, Cost::Nothing)]);
        assert_eq!(harmless.judge(&outage(100, 180)), Verdict::Beyond { event: None, by: ms(80) });
    }

    #[test]
    fn a_dying_tunnel_may_interrupt_each_time_for_so_long() {
        let all = explained(&[window(2, 1_000, 3_000, DYING)]);
        let within = |from, to| Verdict::Within { event: 2, recovery: ms(to - from) };
        for (from, to) in [(1_000, 1_500), (2_000, 2_400), (3_900, 4_300)] {
            assert_eq!(all.judge(&outage(from, to)), within(from, to));
        }
        assert_eq!(all.judge(&outage(1_000, 1_600)), Verdict::Beyond { event: Some(2), by: ms(100) });
        assert_eq!(all.judge(&outage(500, 700)), Verdict::Beyond { event: None, by: ms(200) });
        assert_eq!(all.judge(&outage(4_600, 4_700)), Verdict::Beyond { event: None, by: ms(100) });
    }

    #[test]
    fn after_a_standstill_all_flows_again_in_time() {
        let all = explained(&[window(0, 1_000, 9_000, STILL)]);
        assert_eq!(all.judge(&outage(990, 9_600)), Verdict::Within { event: 0, recovery: ms(600) });
        assert_eq!(all.judge(&outage(3_000, 5_000)), Verdict::Within { event: 0, recovery: ms(0) });
        assert_eq!(all.judge(&outage(990, 9_900)), Verdict::Beyond { event: Some(0), by: ms(100) });
        let lasting = explained(&[Window { over: None, ..window(0, 1_000, 0, STILL) }]);
        assert_eq!(lasting.judge(&outage(990, 99_900)), Verdict::Within { event: 0, recovery: ms(0) });
    }

    #[test]
    fn what_was_on_its_way_when_a_fault_began_is_lost_with_it() {
        let all = explained(&[window(3, 1_000, 2_000, STILL)]);
        assert_eq!(all.judge(&outage(980, 980)), Verdict::Within { event: 3, recovery: ms(0) });
        assert_eq!(all.judge(&outage(700, 710)), Verdict::Beyond { event: None, by: ms(10) });
    }

    #[test]
    fn a_standstill_is_its_own_cause_and_leaves_the_others_their_time() {
        let all = explained(&[window(0, 1_000, 2_000, STILL), window(1, 2_500, 5_000, DYING)]);
        // 800 ms after the standstill, and 500 ms for the tunnel that goes down.
        assert_eq!(all.judge(&outage(1_000, 3_300)), Verdict::Within { event: 0, recovery: ms(1_300) });
        assert_eq!(all.judge(&outage(1_000, 3_400)), Verdict::Beyond { event: Some(0), by: ms(100) });
    }

    #[test]
    fn a_tunnel_that_dies_unwatched_is_found_when_somebody_watches() {
        let mut all = explained(&[window(7, 1_000, 9_000, DYING)]);
        all.unwatched.push((ms(500), ms(4_000)));
        assert_eq!(all.judge(&outage(1_100, 4_500)), Verdict::Within { event: 7, recovery: ms(500) });
        assert_eq!(all.judge(&outage(1_100, 4_600)), Verdict::Beyond { event: Some(7), by: ms(100) });
        // Without a fault, time without a watching `run` excuses nothing.
        all.windows.clear();
        assert_eq!(all.judge(&outage(1_100, 1_200)), Verdict::Beyond { event: None, by: ms(100) });
    }

    #[test]
    fn what_overlaps_is_covered_once() {
        let mut spans = [(ms(10), ms(30)), (ms(0), ms(20)), (ms(25), ms(28)), (ms(90), ms(200))];
        assert_eq!(covered(ms(5), ms(100), &mut spans), ms(35));
        assert_eq!(covered(ms(5), ms(100), &mut []), ms(0));
    }
}
