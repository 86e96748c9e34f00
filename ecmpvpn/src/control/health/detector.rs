//! Decides from its probes whether a tunnel is up. Pure: time and events come from the caller.
//!
//! Evidence of life is an answer to a probe, or a report of the far end (see `wire`) that packets of this end arrived
//! there. Both show that both directions work. A full tunnel still gives reports when every probe is dropped. What
//! counts is when the arrived packet was *sent*: a late answer shows nothing about the time after that.
//!
//! A probe is missed when its answer is overdue, judged by recent round trips. From the first missed probe on, probes
//! are sent faster. The tunnel is dead when `down_after` probes are missed, and `down_after - 0.5` intervals plus a
//! round trip have passed since the last evidence. With the defaults that is 150 to 250 ms, plus a round trip, after
//! the first dropped packet. If a tunnel that is up loses probes at random, more must be missed: more than it is likely
//! to lose in a row.
//!
//! Leaving a tunnel helps only if another one works. If all tunnels to a site fall silent together, none does, and most
//! likely something that they share has stopped for a moment. They get [`TOGETHER`] times as long.

use std::collections::VecDeque;

use super::estimate::{Loss, RoundTrip};
use super::nanos::{MILLISECOND, Nanos};
use super::wire::Received;

/// A probe counts as lost if it has no answer after this time, or after two intervals if that is longer.
const LATE: Nanos = 2_000 * MILLISECOND;
/// Bounds of a probe's timeout. The lower bound is half an interval, between `LEAST_TIMEOUT` and `FLOOR_AT_MOST`.
/// `UNKNOWN_TIMEOUT` applies while no round trip is known.
const LEAST_TIMEOUT: Nanos = 20 * MILLISECOND;
const FLOOR_AT_MOST: Nanos = 100 * MILLISECOND;
const UNKNOWN_TIMEOUT: Nanos = 250 * MILLISECOND;
const MOST_TIMEOUT: Nanos = 1_000 * MILLISECOND;
/// After a missed probe, probes are sent every fifth of the interval, but not faster than this.
const LEAST_GAP: Nanos = 10 * MILLISECOND;
/// How long a tunnel that never answered gets for its first handshakes.
const FIRST_ANSWER: Nanos = 3_000 * MILLISECOND;
/// How long reports of the far end alone keep a tunnel up, after the last answer.
const REPORTS_HOLD: Nanos = 3_000 * MILLISECOND;
/// A session ends 180 s after its handshake. Probes make WireGuard renew it after 120 s. If nothing answers probes, the
/// handshakes are the only sign of life.
const HANDSHAKE_HOLDS: Nanos = 190_000 * MILLISECOND;
/// Factor on the time until a tunnel is dead, if no other tunnel to the site does better: leaving it gains nothing
/// then.
const TOGETHER: Nanos = 4;
/// Upper bound of the probes that wait for an answer.
const MOST_OUTSTANDING: usize = 512;

/// The section `[health]` of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Interval between probes.
    pub interval: Nanos,
    /// How many probes must be missed until a tunnel is dead.
    pub down_after: u32,
    /// How many probes must be answered in a row until it is up again.
    pub up_after: u32,
}

/// A tunnel that is up must miss enough probes that random loss alone declares it dead less than once in this many
/// trials. A trial is a missed probe after an answered one.
const TRIALS_WITHOUT_ERROR: f64 = 1e6;
/// Upper bound of that number: after a miss, probes come every fifth of an interval.
const MOST_BY_CHANCE: usize = 12;

/// What was last seen of a dead tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Reports of the far end arrive, and say that nothing arrives there.
    Sending,
    /// Packets still arrive here, but no answer.
    Unanswered,
    /// Nothing arrives here.
    Silent,
    /// No probe was ever answered, and WireGuard could not renew its session.
    NoHandshake,
}

/// A change of the tunnel's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The tunnel is dead.
    Down(Fault),
    /// The tunnel works, but must carry nothing: one of the ends is about to change it.
    Withheld,
    /// The tunnel is up again.
    Up,
}

/// What the caller must do now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Send the probe with this sequence number.
    pub send: Option<u16>,
    /// The tunnel's state has changed.
    pub transition: Option<Transition>,
}

/// The other tunnels to the same site.
#[derive(Clone, Copy, Debug, Default)]
pub struct Others {
    /// One of them has answered a probe at some time.
    pub answered: bool,
    /// When the latest packet was sent that is known to have arrived through one of them.
    pub evidence: Option<Nanos>,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    sequence: u16,
    at: Nanos,
}

/// A counter that is read from time to time.
#[derive(Clone, Copy, Debug)]
struct Growing {
    count: u64,
    looked: Nanos,
    /// The two reads between which it last grew.
    grew: Option<(Nanos, Nanos)>,
}

/// The figures that a tunnel is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signs {
    /// Probes missed since the last evidence of life.
    pub missed: usize,
    /// How long ago the latest packet was sent that is known to have arrived.
    pub evidence: Nanos,
    /// The same for the best other tunnel to that site.
    pub others: Option<Nanos>,
    /// How long ago the last answer to a probe came.
    pub answer: Option<Nanos>,
    /// How long ago the far end's last report came.
    pub report: Option<Nanos>,
    /// Smoothed round-trip time.
    pub round_trip: Option<Nanos>,
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts about one tunnel")]
#[derive(Clone, Debug)]
pub struct Tunnel {
    settings: Settings,
    live: bool,
    since: Nanos,
    began: Nanos,
    /// When the last handshake was; `None`: not read yet; `Some(0)`: never.
    handshake: Option<Nanos>,
    /// The tunnel is dead because it had no handshake.
    awaits_handshake: bool,
    /// Probes without an answer yet, the oldest first.
    outstanding: VecDeque<Sent>,
    next_sequence: u16,
    next_at: Nanos,
    /// When the latest packet was sent that is known to have arrived: an answer or a report about it came back.
    evidence: Nanos,
    others: Others,
    /// Since when another tunnel does better.
    behind_since: Option<Nanos>,
    /// When the last answer to a probe came.
    answered: Option<Nanos>,
    /// Probes were answered before this value was made.
    answered_before: bool,
    /// Answers to probes sent before this do not count as round trips: the probes waited for a handshake.
    fresh_from: Option<Nanos>,
    streak: u32,
    round_trip: RoundTrip,
    loss: Loss,
    /// The random loss: only of probes that were sent while the tunnel was up, and after which others arrived.
    chance: Loss,
    received: Option<Growing>,
    /// The far end's last report, and when it came.
    far: Option<(Received, Nanos)>,
    /// The tunnel must carry nothing.
    withheld: bool,
    /// When it last had to.
    withheld_at: Nanos,
}

impl Tunnel {
    /// A tunnel that is up or not, as the map says. Probes start at `first`.
    pub fn new(settings: Settings, live: bool, round_trip: RoundTrip, first: Nanos) -> Self {
        Self {
            settings,
            live,
            since: first,
            began: first,
            handshake: None,
            awaits_handshake: false,
            outstanding: VecDeque::new(),
            next_sequence: 0,
            next_at: first,
            evidence: first,
            others: Others::default(),
            behind_since: None,
            answered: None,
            answered_before: false,
            fresh_from: None,
            streak: 0,
            round_trip,
            loss: Loss::default(),
            chance: Loss::default(),
            received: None,
            far: None,
            withheld: false,
            withheld_at: 0,
        }
    }

    /// Call it if the far end answered probes before this value was made. A silent tunnel is then dead as soon as it
    /// has had time for its first handshake.
    pub fn remember_answers(&mut self) {
        self.answered_before = true;
    }

    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Whether it carries traffic.
    pub fn live(&self) -> bool {
        self.live
    }

    /// Since when it carries nothing although it may. `None`: it is up, or it must carry nothing.
    pub fn failing_since(&self) -> Option<Nanos> {
        (!self.live && !self.withheld).then(|| self.since.max(self.withheld_at))
    }

    /// When the latest packet was sent that is known to have arrived; `None`: no probe was ever answered.
    pub fn last_evidence(&self) -> Option<Nanos> {
        self.ever_answered().then_some(self.evidence)
    }

    /// When the last answer to a probe came.
    pub fn last_answer(&self) -> Option<Nanos> {
        self.answered
    }

    pub fn ever_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// Whether it has answered a probe, also before this value was made.
    pub fn is_known_to_answer(&self) -> bool {
        self.answered_before || self.ever_answered()
    }

    /// Recent round trips.
    pub fn round_trip(&self) -> &RoundTrip {
        &self.round_trip
    }

    /// The loss of recent probes.
    pub fn loss(&self) -> &Loss {
        &self.loss
    }

    /// Call it when an answer to the probe `sequence` came, at `arrival`.
    pub fn answered(&mut self, sequence: u16, arrival: Nanos) {
        let Some(at) = self.outstanding.iter().position(|sent| sent.sequence == sequence) else { return };
        let Some(Sent { at: sent, .. }) = self.outstanding.remove(at) else { return };
        self.loss.push(false);
        self.chance.push(false);
        // Before the first answer, probes wait for a handshake or are dropped for want of one: none of them is missed.
        let from = if self.ever_answered() { sent } else { arrival };
        self.answered = Some(arrival);
        self.evidence = self.evidence.max(from);
        match self.fresh_from {
            None => {
                self.fresh_from = Some(arrival);
                self.streak = 1;
            }
            Some(fresh) if sent >= fresh => {
                self.round_trip.sample(arrival, arrival.saturating_sub(sent));
                self.streak = self.streak.saturating_add(1);
            }
            Some(_) => {}
        }
    }

    /// Takes the time of the last handshake; 0: there was none.
    pub fn on_handshake(&mut self, at: Nanos) {
        self.handshake = Some(at);
    }

    /// Sets whether the tunnel must carry nothing. Probes continue.
    pub fn set_withheld(&mut self, withheld: bool) {
        self.withheld = withheld;
    }

    /// Takes the state of the other tunnels at `now`.
    pub fn compare_with(&mut self, others: Others, now: Nanos) {
        self.others = others;
        let lag = self.settings.interval + self.round_trip.smoothed().unwrap_or(0);
        let behind = others.evidence.is_some_and(|others| others >= self.evidence + lag);
        self.behind_since = behind.then(|| self.behind_since.unwrap_or(now));
    }

    /// Takes the count of packets received from the tunnel, read at `now`.
    pub fn received(&mut self, count: u64, now: Nanos) {
        self.received = Some(match self.received {
            Some(before) if count > before.count => Growing { count, looked: now, grew: Some((before.looked, now)) },
            Some(before) => Growing { count, looked: now, ..before },
            None => Growing { count, looked: now, grew: None },
        });
    }

    /// What to report to the far end at `now` about packets that arrived here.
    pub fn report(&self, now: Nanos) -> Received {
        let Some(Growing { count, grew, .. }) = self.received else { return Received::default() };
        Received { count, age: grew.map(|(after, _)| now.saturating_sub(after)), at_probe: None }
    }

    /// Takes a report of the far end about packets that it received. The report came at `arrival`.
    pub fn reported(&mut self, received: Received, arrival: Nanos) {
        if self.answered.is_some_and(|answered| arrival.saturating_sub(answered) < REPORTS_HOLD) {
            let there_since = match (received.age, self.far) {
                (Some(age), _) => arrival.saturating_sub(age),
                // The new packets arrived there after the previous report was sent.
                (None, Some((before, last))) if received.count > before.count && received.at_probe.is_none() => last,
                (None, _) => 0,
            };
            // The report took half of a round trip, and so did the packet that it reports.
            let sent = there_since.saturating_sub(self.round_trip.smoothed().unwrap_or(0));
            self.evidence = self.evidence.max(sent);
        }
        let count = match (received.at_probe, self.far) {
            (Some(_), before) => before.map_or(0, |(before, _)| before.count),
            (None, _) => received.count,
        };
        self.far = Some((Received { count, ..received }, arrival));
    }

    /// The figures that it is judged by at `now`.
    pub fn signs(&self, now: Nanos) -> Signs {
        let ago = |at: Nanos| now.saturating_sub(at);
        Signs {
            missed: self.missed(now),
            evidence: ago(self.evidence),
            others: self.others.evidence.map(ago),
            answer: self.answered.map(ago),
            report: self.far.map(|(_, at)| ago(at)),
            round_trip: self.round_trip.smoothed(),
        }
    }

    /// Whether something that came at `at` came after the time when the tunnel may have failed.
    fn came_after_failure(&self, at: Option<Nanos>) -> bool {
        // The first probe without an answer was sent an interval after the evidence. Packets may still have been on
        // their way then.
        let on_the_way = self.settings.interval / 4 + self.round_trip.smoothed().unwrap_or(0);
        at.is_some_and(|at| at > self.evidence + self.settings.interval + on_the_way)
    }

    fn timeout(&self) -> Nanos {
        let least = (self.settings.interval / 2).clamp(LEAST_TIMEOUT, FLOOR_AT_MOST);
        self.round_trip.timeout(least, UNKNOWN_TIMEOUT, MOST_TIMEOUT)
    }

    /// Probes sent since the last evidence whose answers are overdue.
    fn missed(&self, now: Nanos) -> usize {
        let timeout = self.timeout();
        let missed = |sent: &&Sent| sent.at > self.evidence && now.saturating_sub(sent.at) >= timeout;
        self.outstanding.iter().filter(missed).count()
    }

    /// How many probes must be missed.
    fn misses_needed(&self) -> usize {
        let down_after = (self.settings.down_after as usize).min(MOST_OUTSTANDING);
        down_after.max(self.chance.run_of(TRIALS_WITHOUT_ERROR, MOST_BY_CHANCE))
    }

    fn fault(&self) -> Fault {
        if self.came_after_failure(self.far.map(|(_, at)| at)) {
            Fault::Sending
        } else if self.came_after_failure(self.received.and_then(|received| received.grew).map(|(_, until)| until)) {
            Fault::Unanswered
        } else {
            Fault::Silent
        }
    }

    /// How old the last evidence must be for the tunnel to be dead, if another tunnel does better.
    fn longest_silence(&self) -> Nanos {
        let on_the_way = self.round_trip.smoothed().map_or(0, |time| time + 2 * self.round_trip.deviation());
        let halves = 2 * Nanos::from(self.settings.down_after) - 1;
        let patience = halves * self.settings.interval / 2 + on_the_way;
        // The tunnel may just be full: the far end does not report, but its packets do arrive.
        if self.fault() == Fault::Unanswered { patience * 3 / 2 } else { patience }
    }

    /// The same, considering the other tunnels at `now`.
    fn patience_beside(&self, now: Nanos) -> Nanos {
        // Not at once: after a stop of all tunnels the answers of one come before those of another.
        let ahead_for = self.behind_since.map(|since| now.saturating_sub(since));
        let alone = ahead_for.is_some_and(|time| time >= self.settings.interval / 2);
        if alone { self.longest_silence() } else { self.longest_silence() * TOGETHER }
    }

    /// Whether the tunnel is dead at `now`, and why.
    fn dead(&self, now: Nanos) -> Option<Fault> {
        let stale = |at: Nanos| now.saturating_sub(at.max(self.began)) >= HANDSHAKE_HOLDS;
        if !self.ever_answered() && self.handshake.is_some_and(stale) {
            return Some(Fault::NoHandshake);
        }
        // If nothing ever answered, the far end may not be up yet, or may not answer probes at all.
        let expected = self.others.answered || self.answered_before;
        let known = self.ever_answered() || (expected && now.saturating_sub(self.since) >= FIRST_ANSWER);
        let dead = known
            && self.missed(now) >= self.misses_needed()
            && now.saturating_sub(self.evidence) >= self.patience_beside(now);
        dead.then(|| self.fault())
    }

    /// Interval between probes after a missed one.
    fn gap_when_missed(&self) -> Nanos {
        (self.settings.interval / 5).max(LEAST_GAP).min(self.settings.interval)
    }

    /// Says what to do at `now`.
    pub fn poll(&mut self, now: Nanos) -> Step {
        let late = LATE.max(2 * self.settings.interval);
        while self
            .outstanding
            .front()
            .is_some_and(|sent| now.saturating_sub(sent.at) >= late || self.outstanding.len() >= MOST_OUTSTANDING)
        {
            let lost = self.outstanding.pop_front();
            self.loss.push(true);
            if self.live && lost.is_some_and(|lost| (self.since..self.evidence).contains(&lost.at)) {
                self.chance.push(true);
            }
        }
        if self.withheld {
            self.streak = 0;
            self.withheld_at = now;
        }
        let transition = if self.live && self.withheld {
            Some(Transition::Withheld)
        } else if self.live {
            self.dead(now).map(Transition::Down)
        } else {
            let has_handshake =
                self.awaits_handshake && !self.withheld && self.handshake.is_some_and(|at| at > self.since);
            (has_handshake || self.streak >= self.settings.up_after).then_some(Transition::Up)
        };
        if let Some(transition) = transition {
            self.live = transition == Transition::Up;
            self.awaits_handshake = transition == Transition::Down(Fault::NoHandshake);
            self.since = now;
        }
        let missed = self.missed(now) > 0;
        if missed && !self.live {
            self.streak = 0;
            self.fresh_from = None;
            self.round_trip.restart();
        }
        // If all tunnels have stopped, more probes would only add to the backlog.
        let soon = self.behind_since.is_some() || now.saturating_sub(self.evidence) < self.longest_silence();
        let hurry = missed && self.live && soon;
        let gap = if hurry { self.gap_when_missed() } else { self.settings.interval };
        let last = self.outstanding.back().map_or(0, |sent| sent.at);
        if hurry {
            self.next_at = self.next_at.min(last + gap);
        }
        let send = (now >= self.next_at).then(|| {
            self.next_at = now + gap;
            let sequence = self.next_sequence;
            self.next_sequence = sequence.wrapping_add(1);
            self.outstanding.push_back(Sent { sequence, at: now });
            sequence
        });
        Step { send, transition }
    }

    /// Call it when the probe could not be sent for a reason that is not the tunnel's.
    pub fn not_sent(&mut self, sequence: u16) {
        self.outstanding.retain(|sent| sent.sequence != sequence);
    }

    /// The latest time at which [`Tunnel::poll`] must be called again.
    pub fn next_poll(&self, now: Nanos) -> Nanos {
        let timeout = self.timeout();
        let overdue = self.outstanding.iter().map(|sent| sent.at + timeout).find(|at| *at > now);
        let judged = self.evidence + self.patience_beside(now);
        let judged = (self.live && judged > now && self.missed(now) > 0).then_some(judged);
        // Read the count of received packets shortly before it is reported, so that the report can say how long ago
        // they came.
        let look = self.next_at.saturating_sub(self.gap_when_missed());
        let next = if look > now { look } else { self.next_at };
        next.min(overdue.unwrap_or(Nanos::MAX)).min(judged.unwrap_or(Nanos::MAX))
    }
}
