//! Draws the next fault, where it is and how long it lasts.

use std::time::Duration;

use crate::bounds;
use crate::random::Random;
use crate::schedule::{Change, Event, Fault, LINKS, Way};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// Draws faults.
pub struct Faults {
    pub random: Random,
    tunnels: u8,
}

/// What can be drawn, and how often.
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
}

const DRAWS: [(u64, Draw); 14] = [
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
];

impl Faults {
    pub fn new(random: Random, tunnels: u8) -> Self {
        Self { random, tunnels }
    }

    /// What begins at `at`: one fault, and what lies over it.
    pub fn next(&mut self, at: Duration) -> Vec<Event> {
        let draw = self.random.weighed(&DRAWS);
        if matches!(draw, Draw::Double) {
            return self.double(at);
        }
        let random = &mut self.random;
        let (link, site) = (random.index(LINKS), usize::from(random.index(2)));
        // What LACP takes half a minute to forgive is seldom drawn: nothing else could go wrong meanwhile.
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
        };
        let event = Event { at, lasts, fault };
        let mut events = vec![event];
        if matches!(draw, Draw::KillAndCut) {
            // A tunnel dies while nobody watches it at one end, and is still dead when somebody does again.
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
        events
    }

    /// Links fail, and meanwhile something is done at a site.
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
        // The last tunnel may not be there.
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
