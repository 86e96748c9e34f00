//! Draws the next fault, its place and its length.

use std::time::Duration;

use lab::hostile::Flood;

use crate::bounds;
use crate::defect::Defect;
use crate::event::{Change, Disturbance, Event, Fault, LINKS, Way};
use crate::random::Random;

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);
/// A longer one would only take longer.
const LONGEST_FLOOD: Duration = Duration::from_secs(4);

pub struct Faults {
    pub random: Random,
    tunnels: u8,
}

/// Kinds of faults that can be drawn.
#[derive(Clone, Copy)]
enum Draw {
    Cut,
    CutAll,
    Pull,
    PullAll,
    Loss,
    Delay,
    Kill,
    KillAndCut,
    Double,
    Restart,
    PowerCut,
    Reload,
    Move,
    Unaddress,
    Hostile,
    Disturb,
}

const DRAWS: [(u64, Draw); 16] = [
    (20, Draw::Cut),
    (6, Draw::CutAll),
    (12, Draw::Pull),
    (3, Draw::PullAll),
    (8, Draw::Loss),
    (8, Draw::Delay),
    (8, Draw::Kill),
    (6, Draw::KillAndCut),
    (10, Draw::Double),
    (8, Draw::Restart),
    (3, Draw::PowerCut),
    (12, Draw::Reload),
    (6, Draw::Move),
    (4, Draw::Unaddress),
    (8, Draw::Hostile),
    (8, Draw::Disturb),
];

impl Faults {
    pub fn new(random: Random, tunnels: u8) -> Self {
        Self { random, tunnels }
    }

    /// The events of a defect, from `at` on.
    pub fn of_defect(&mut self, defect: Defect, at: Duration) -> Vec<Event> {
        let site = usize::from(self.random.index(2));
        let event = |at, lasts, fault| Event { at, lasts, fault };
        let sabotage = Fault::Sabotage { defect, site };
        match defect {
            Defect::Clear => vec![event(at, 300 * MS, sabotage)],
            Defect::Reorder => vec![event(at, 5 * S, sabotage)],
            Defect::Recovery => {
                let cut = Fault::Cut { link: self.random.index(LINKS), way: Way::Both };
                vec![event(at, 4 * S, sabotage), event(at + 500 * MS, 2 * S, cut)]
            }
            Defect::Restore => vec![event(at, Duration::ZERO, sabotage)],
        }
    }

    /// The events that begin about `at`: one fault, and what overlaps it.
    pub fn next(&mut self, at: Duration) -> Vec<Event> {
        let draw = self.random.weighed(&DRAWS);
        if matches!(draw, Draw::Double) {
            return self.double(at);
        }
        let random = &mut self.random;
        let (link, site) = (random.index(LINKS), usize::from(random.index(2)));
        // Long cuts are drawn seldom: LACP needs half a minute to recover from them, and no other fault can happen in
        // that time.
        let cut = |random: &mut Random, least, most| {
            let long = random.chance(15);
            if long {
                random.between_octaves(bounds::LACP_FORGETS, most)
            } else {
                random.between_octaves(least, bounds::LACP_FORGETS)
            }
        };
        let (lasts, fault) = match draw {
            Draw::Cut => (cut(random, 200 * MS, 12 * S), Fault::Cut { link, way: *random.pick(&Way::ALL) }),
            Draw::CutAll => (cut(random, 100 * MS, 25 * S), Fault::CutAll),
            Draw::Pull => (random.between_octaves(200 * MS, 12 * S), Fault::Pull { link }),
            Draw::PullAll => (random.between_octaves(200 * MS, 12 * S), Fault::PullAll),
            Draw::Loss => (random.between(2 * S, 10 * S), self.loss()),
            Draw::Delay => (random.between(2 * S, 10 * S), self.delay()),
            Draw::Kill | Draw::KillAndCut | Draw::Double => {
                (random.between_octaves(200 * MS, 10 * S), Fault::Kill { site })
            }
            Draw::Restart => {
                (random.between_octaves(500 * MS, 10 * S), Fault::Restart { site, crashed: random.chance(50) })
            }
            Draw::PowerCut => (random.between_octaves(500 * MS, 10 * S), Fault::PowerCut),
            Draw::Reload => (Duration::ZERO, Fault::Reload { site, change: self.change() }),
            Draw::Move => (random.between(3 * S, 10 * S), Fault::Move { site }),
            Draw::Unaddress => (random.between_octaves(200 * MS, 12 * S), Fault::Unaddress { site }),
            Draw::Hostile => (random.between_octaves(200 * MS, LONGEST_FLOOD), self.hostile()),
            Draw::Disturb => (Duration::ZERO, Fault::Disturb { site, what: *random.pick(&Disturbance::ALL) }),
        };
        let event = Event { at, lasts, fault };
        let mut events = vec![event];
        if matches!(draw, Draw::KillAndCut) {
            // A tunnel goes down while no `run` probes it at one end, and is still down when one does again.
            let from = at + lasts / 2;
            let more = self.random.between(4 * S, 8 * S);
            let fault = Fault::Cut { link, way: *self.random.pick(&Way::ALL) };
            events.push(Event { at: from, lasts: (event.end() + more).saturating_sub(from), fault });
        } else if !matches!(draw, Draw::Loss | Draw::Delay) && self.random.chance(30) {
            let fault = if self.random.chance(50) { self.loss() } else { self.delay() };
            let before = self.random.between(500 * MS, 2 * S);
            let after = self.random.between(500 * MS, 6 * S);
            events.push(Event { at: at.saturating_sub(before), lasts: before + lasts + after, fault });
        }
        if !fault.is_hostile() && self.random.chance(25) {
            let before = self.random.between(200 * MS, S);
            let after = self.random.between(200 * MS, 2 * S);
            let fault = self.hostile();
            let lasts = (before + lasts + after).min(LONGEST_FLOOD);
            events.push(Event { at: at.saturating_sub(before), lasts, fault });
        }
        events
    }

    /// What a user without privilege tries.
    fn hostile(&mut self) -> Fault {
        let site = usize::from(self.random.index(2));
        if self.random.chance(40) {
            return Fault::Locks { site };
        }
        let rate = 1_000 * (1 + u16::from(self.random.index(10)));
        Fault::Flood { site, flood: *self.random.pick(&Flood::ALL), rate }
    }

    /// Draws a failure of links, and an action at a site during it.
    fn double(&mut self, at: Duration) -> Vec<Event> {
        let random = &mut self.random;
        let (link, site) = (random.index(LINKS), usize::from(random.index(2)));
        let links = [
            Fault::Cut { link, way: *random.pick(&Way::ALL) },
            Fault::Cut { link, way: Way::Both },
            Fault::Pull { link },
            Fault::CutAll,
        ];
        let first = Event { at, lasts: random.between(2 * S, 6 * S), fault: *random.pick(&links) };
        let from = at + random.between(300 * MS, first.lasts);
        let lasts = random.between_octaves(200 * MS, 4 * S);
        let crashed = random.chance(50);
        let change = self.change();
        let done = [
            (lasts, Fault::Kill { site }),
            (lasts, Fault::Restart { site, crashed }),
            (Duration::ZERO, Fault::Reload { site, change }),
        ];
        let (lasts, fault) = *self.random.pick(&done);
        vec![first, Event { at: from, lasts, fault }]
    }

    fn loss(&mut self) -> Fault {
        let link = self.random.index(LINKS);
        let percent = 1 + self.random.index(10);
        Fault::Loss { link, way: *self.random.pick(&Way::ALL), percent }
    }

    fn delay(&mut self) -> Fault {
        let link = self.random.chance(60).then(|| self.random.index(LINKS));
        Fault::Delay { link, ms: 3 + self.random.index(78) }
    }

    fn change(&mut self) -> Change {
        // The last tunnel may be removed at present.
        let tunnel = self.random.index(self.tunnels - 1);
        let change = self.random.weighed(&[
            (1, Change::Nothing),
            (2, Change::Weight { tunnel, weight: 0 }),
            (2, Change::Prefix),
            (3, Change::Tunnel),
            (2, Change::Port { tunnel, draw: 0 }),
        ]);
        match change {
            Change::Weight { tunnel, .. } => Change::Weight { tunnel, weight: 1 + self.random.index(4) },
            Change::Port { tunnel, .. } => {
                Change::Port { tunnel, draw: u16::try_from(self.random.below(8_000)).expect("small") }
            }
            other => other,
        }
    }
}
