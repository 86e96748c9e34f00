//! Whether a tunnel lives, told from the fate of its probes. Pure: time and events come from the caller.
//!
//! Evidence of life is an answer to a probe, or a report of the far side (see `wire`) that packets of ours have arrived
//! there: both show that both directions work, and a full tunnel gives the second even where every probe is dropped.
//! What counts is when the thing that arrived was *sent*, so that a late answer is no sign of life after its time.
//!
//! A probe is missed once it is older than the round trips of late make plausible. From the first missed one on, more
//! are sent. The tunnel is dead when `down_after` are missed, and as many intervals less a half one, and a round trip, have
//! passed since the last evidence: with the defaults 150 to 250 ms after the first packet was dropped, and a round trip
//! more. Where probes are lost while the tunnel lives, more must be missed: so many as are not lost in a row by that chance.
//!
//! A tunnel is left for another one. Where all to a site fall silent together there is none to be had, and what they share
//! has more likely come to a halt for a moment than each of them died: they get [`TOGETHER`] times as long.

use std::collections::VecDeque;

use super::estimate::{Loss, RoundTrip};
use super::nanos::Nanos;
use super::wire::Received;

const MILLISECOND: Nanos = 1_000_000;
/// A probe without an answer after this, or after two intervals, is lost for good.
const LATE: Nanos = 2_000 * MILLISECOND;
/// Bounds of a probe's timeout; and what it is while no round trip is known.
const LEAST_TIMEOUT: Nanos = 20 * MILLISECOND;
const FLOOR_AT_MOST: Nanos = 100 * MILLISECOND;
const UNKNOWN_TIMEOUT: Nanos = 250 * MILLISECOND;
const MOST_TIMEOUT: Nanos = 1_000 * MILLISECOND;
/// Between the probes that a missed one calls for: a fifth of the interval, but no less than this.
const LEAST_GAP: Nanos = 10 * MILLISECOND;
/// A tunnel that never answered gets this long for its first handshakes.
const FIRST_ANSWER: Nanos = 3_000 * MILLISECOND;
/// The far side's reports alone keep a tunnel alive for so long.
const REPORTS_HOLD: Nanos = 3_000 * MILLISECOND;
/// A session is dead 180 s after its handshake; probes have WireGuard renew it after 120 s. Where nothing answers probes,
/// that is the only sign that there is.
const HANDSHAKE_HOLDS: Nanos = 190_000 * MILLISECOND;
/// Times a tunnel's patience, where no other one of the site has fared better: to leave it gains nothing.
const TOGETHER: Nanos = 4;
/// More probes than this are not waited for.
const MOST_OUTSTANDING: usize = 512;

/// `[health]`
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Between probes.
    pub interval: Nanos,
    /// Probes missed until a tunnel is dead.
    pub down_after: u32,
    /// Probes answered in a row until it lives again.
    pub up_after: u32,
}

/// A living tunnel is to miss as many probes as make a death by chance rarer than one in this many trials, each of them a
/// probe that is missed after one that was answered.
const TRIALS_WITHOUT_ERROR: f64 = 1e6;
/// But more than this need not be missed: they come every fifth of an interval.
const MOST_BY_CHANCE: usize = 12;

/// What a dead tunnel's last signs were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The far side is heard, and says that nothing arrives there.
    Sending,
    /// Something still arrives here, but no answer.
    Unanswered,
    /// Nothing arrives here.
    Silent,
    /// No probe was ever answered, and WireGuard could not renew its session.
    NoHandshake,
}

/// A change of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is dead.
    Down(Fault),
    /// It lives, but carries nothing: one of the ends is going to change it.
    Left,
    /// It lives again.
    Up,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Send the probe of this number.
    pub send: Option<u16>,
    /// The tunnel's state has changed.
    pub turn: Option<Turn>,
}

/// The other tunnels to the same site.
#[derive(Clone, Copy, Debug, Default)]
pub struct Others {
    /// One of them has answered a probe, at any time.
    pub answered: bool,
    /// When the latest thing was sent that is known to have come through one of them.
    pub evidence: Option<Nanos>,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    sequence: u16,
    at: Nanos,
}

/// A count that is looked at now and then.
#[derive(Clone, Copy, Debug)]
struct Growing {
    count: u64,
    looked: Nanos,
    /// Between which two looks it last grew.
    grew: Option<(Nanos, Nanos)>,
}

/// What a tunnel is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signs {
    /// Probes missed since the last evidence of life.
    pub missed: usize,
    /// How long ago the latest thing was sent that is known to have come through.
    pub evidence: Nanos,
    /// The same of the tunnel to that site that has fared best of the others.
    pub others: Option<Nanos>,
    /// How long ago the last answer to a probe came.
    pub answer: Option<Nanos>,
    /// How long ago the far side's last report came.
    pub report: Option<Nanos>,
    /// Smoothed round-trip time.
    pub round_trip: Option<Nanos>,
}

/// One tunnel.
#[derive(Clone, Debug)]
pub struct Tunnel {
    settings: Settings,
    live: bool,
    since: Nanos,
    began: Nanos,
    /// When the last handshake was; `None`: not looked at; `Some(0)`: never.
    handshake: Option<Nanos>,
    /// It is dead for lack of a handshake.
    awaits_handshake: bool,
    /// Not yet answered, the oldest first.
    outstanding: VecDeque<Sent>,
    next_sequence: u16,
    next_at: Nanos,
    /// When the latest thing was sent that is known to have come through, with word of it back.
    evidence: Nanos,
    others: Others,
    /// Since when another tunnel has fared better.
    behind_since: Option<Nanos>,
    /// When the last answer to a probe came.
    answered: Option<Nanos>,
    /// Answers to probes sent before this tell nothing of the round trip: they waited for a handshake.
    fresh_from: Option<Nanos>,
    streak: u32,
    round_trip: RoundTrip,
    loss: Loss,
    /// That of probes alone which were sent while it lived, and after which others came through.
    chance: Loss,
    received: Option<Growing>,
    /// What arrived at the far side, and when the last report of it came.
    far: Option<(Received, Nanos)>,
    /// It is to carry nothing.
    withheld: bool,
}

impl Tunnel {
    /// A tunnel that lives or does not, as the map says, and that is probed from `first` on.
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
            fresh_from: None,
            streak: 0,
            round_trip,
            loss: Loss::default(),
            chance: Loss::default(),
            received: None,
            far: None,
            withheld: false,
        }
    }

    /// Whether it carries traffic.
    pub fn live(&self) -> bool {
        self.live
    }

    /// Since when it has been in that state.
    pub fn since(&self) -> Nanos {
        self.since
    }

    /// When the latest thing was sent that is known to have come through; `None`: nothing ever was.
    pub fn evidence(&self) -> Option<Nanos> {
        self.ever_answered().then_some(self.evidence)
    }

    /// When the last answer to a probe came.
    pub fn last_answer(&self) -> Option<Nanos> {
        self.answered
    }

    /// Whether it ever answered.
    pub fn ever_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// Round trips of late.
    pub fn round_trip(&self) -> &RoundTrip {
        &self.round_trip
    }

    /// Probes lost of late.
    pub fn loss(&self) -> &Loss {
        &self.loss
    }

    /// The probe numbered `sequence` was answered, and the answer came at `arrival`.
    pub fn answered(&mut self, sequence: u16, arrival: Nanos) {
        let Some(at) = self.outstanding.iter().position(|sent| sent.sequence == sequence) else { return };
        let Some(Sent { at: sent, .. }) = self.outstanding.remove(at) else { return };
        self.loss.push(false);
        self.chance.push(false);
        self.answered = Some(arrival);
        self.evidence = self.evidence.max(sent);
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

    /// The last handshake was at `at`; 0: there was none.
    pub fn on_handshake(&mut self, at: Nanos) {
        self.handshake = Some(at);
    }

    /// Says whether it is to carry nothing, while probes go on.
    pub fn withhold(&mut self, withheld: bool) {
        self.withheld = withheld;
    }

    /// How the others fare until `now`.
    pub fn compare_with(&mut self, others: Others, now: Nanos) {
        self.others = others;
        let lag = self.settings.interval + self.round_trip.smoothed().unwrap_or(0);
        let behind = others.evidence.is_some_and(|others| others >= self.evidence + lag);
        self.behind_since = behind.then(|| self.behind_since.unwrap_or(now));
    }

    /// Packets received from the tunnel until `now`.
    pub fn received(&mut self, count: u64, now: Nanos) {
        self.received = Some(match self.received {
            Some(before) if count > before.count => Growing { count, looked: now, grew: Some((before.looked, now)) },
            Some(before) => Growing { count, looked: now, ..before },
            None => Growing { count, looked: now, grew: None },
        });
    }

    /// What the far side is told at `now` of what arrived here.
    pub fn report(&self, now: Nanos) -> Received {
        let Some(Growing { count, grew, .. }) = self.received else { return Received::default() };
        Received { count, age: grew.map(|(after, _)| now.saturating_sub(after)) }
    }

    /// The far side says what it has received from the tunnel; its word came at `arrival`.
    pub fn reported(&mut self, received: Received, arrival: Nanos) {
        if self.answered.is_some_and(|answered| arrival.saturating_sub(answered) < REPORTS_HOLD) {
            let there_since = match (received.age, self.far) {
                (Some(age), _) => arrival.saturating_sub(age),
                // What has newly arrived there had not when the report before this one was sent.
                (None, Some((before, last))) if received.count > before.count => last,
                (None, _) => 0,
            };
            // Its word was on its way for one half of a round trip, and what it tells of for the other.
            let sent = there_since.saturating_sub(self.round_trip.smoothed().unwrap_or(0));
            self.evidence = self.evidence.max(sent);
        }
        self.far = Some((received, arrival));
    }

    /// What it is judged by at `now`.
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

    /// Whether what came at `at` came after the tunnel may have died.
    fn heard(&self, at: Option<Nanos>) -> bool {
        // The first probe without an answer was sent an interval after the evidence; some was still on its way then.
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

    /// So many must be missed.
    fn enough(&self) -> usize {
        let down_after = (self.settings.down_after as usize).min(MOST_OUTSTANDING);
        down_after.max(self.chance.run_of(TRIALS_WITHOUT_ERROR, MOST_BY_CHANCE))
    }

    fn fault(&self) -> Fault {
        if self.heard(self.far.map(|(_, at)| at)) {
            Fault::Sending
        } else if self.heard(self.received.and_then(|received| received.grew).map(|(_, until)| until)) {
            Fault::Unanswered
        } else {
            Fault::Silent
        }
    }

    /// How long nothing must have been sent of which there is evidence.
    fn patience(&self) -> Nanos {
        let on_the_way = self.round_trip.smoothed().map_or(0, |time| time + 2 * self.round_trip.deviation());
        let halves = 2 * Nanos::from(self.settings.down_after) - 1;
        let patience = halves * self.settings.interval / 2 + on_the_way;
        // It may be full: the far side cannot tell us, but what it sends does arrive.
        if self.fault() == Fault::Unanswered { patience * 3 / 2 } else { patience }
    }

    /// The same at `now`, if that is all that is known then of the other tunnels.
    fn patience_beside(&self, now: Nanos) -> Nanos {
        // Not at once: when all that stood still goes on, the answers of one come before those of another.
        let ahead_for = self.behind_since.map(|since| now.saturating_sub(since));
        let alone = ahead_for.is_some_and(|time| time >= self.settings.interval / 2);
        if alone { self.patience() } else { self.patience() * TOGETHER }
    }

    /// Whether it is dead now.
    fn dead(&self, now: Nanos) -> Option<Fault> {
        let stale = |at: Nanos| now.saturating_sub(at.max(self.began)) >= HANDSHAKE_HOLDS;
        if !self.ever_answered() && self.handshake.is_some_and(stale) {
            return Some(Fault::NoHandshake);
        }
        // Where nothing ever answered the far side may not be up yet, or may not answer probes at all.
        let known = self.ever_answered() || (self.others.answered && now.saturating_sub(self.since) >= FIRST_ANSWER);
        let dead = known
            && self.missed(now) >= self.enough()
            && now.saturating_sub(self.evidence) >= self.patience_beside(now);
        dead.then(|| self.fault())
    }

    /// Between the probes that a missed one calls for.
    fn gap_when_missed(&self) -> Nanos {
        (self.settings.interval / 5).max(LEAST_GAP).min(self.settings.interval)
    }

    /// What is to be done at `now`.
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
        }
        let turn = if self.live && self.withheld {
            Some(Turn::Left)
        } else if self.live {
            self.dead(now).map(Turn::Down)
        } else {
            let has_handshake =
                self.awaits_handshake && !self.withheld && self.handshake.is_some_and(|at| at > self.since);
            (has_handshake || self.streak >= self.settings.up_after).then_some(Turn::Up)
        };
        if let Some(turn) = turn {
            self.live = turn == Turn::Up;
            self.awaits_handshake = turn == Turn::Down(Fault::NoHandshake);
            self.since = now;
        }
        let missed = self.missed(now) > 0;
        if missed && !self.live {
            self.streak = 0;
            self.fresh_from = None;
            self.round_trip.restart();
        }
        // Where all stands still, more probes only add to what there is to do when it goes on.
        let soon = self.behind_since.is_some() || now.saturating_sub(self.evidence) < self.patience();
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
        Step { send, turn }
    }

    /// The probe could not be sent for a reason that is not the tunnel's.
    pub fn not_sent(&mut self, sequence: u16) {
        self.outstanding.retain(|sent| sent.sequence != sequence);
    }

    /// When [`Tunnel::poll`] is to be called again at the latest.
    pub fn next_poll(&self, now: Nanos) -> Nanos {
        let timeout = self.timeout();
        let overdue = self.outstanding.iter().map(|sent| sent.at + timeout).find(|at| *at > now);
        let judged = self.evidence + self.patience_beside(now);
        let judged = (self.live && judged > now && self.missed(now) > 0).then_some(judged);
        // What arrives is looked at shortly before it is reported, so that the report can tell how long ago it came.
        let look = self.next_at.saturating_sub(self.gap_when_missed());
        let next = if look > now { look } else { self.next_at };
        next.min(overdue.unwrap_or(Nanos::MAX)).min(judged.unwrap_or(Nanos::MAX))
    }
}
