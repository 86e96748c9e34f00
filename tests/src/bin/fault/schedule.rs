//! What goes wrong, where, when and for how long: a pure function of the seed.
//!
//! Faults that stop something follow one another, each with the time that it may take to recover from, so that whatever
//! breaks has one cause. Loss and delays lie over them, and a link may be cut while nobody watches.

use std::fmt;
use std::time::Duration;

use crate::bounds;
use crate::defect::Defect;
use crate::draw::Faults;
use crate::random::Random;

/// Links between the sites.
pub const LINKS: u8 = 3;
/// Traffic flows for so long before the first fault.
pub const LEAD: Duration = Duration::from_secs(3);
/// And at least for so long after the last one is over.
const TAIL: Duration = Duration::from_secs(2);
const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// Which way over a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    FromA,
    FromB,
    Both,
}

impl Way {
    pub const ALL: [Self; 3] = [Self::FromA, Self::FromB, Self::Both];

    /// The sites that send that way, 0 for A.
    pub fn senders(self) -> &'static [usize] {
        match self {
            Self::FromA => &[0],
            Self::FromB => &[1],
            Self::Both => &[0, 1],
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FromA => "from a to b",
            Self::FromB => "from b to a",
            Self::Both => "both ways",
        })
    }
}

/// What a configuration changes to before `reload`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// One tunnel's weight at one site.
    Weight { tunnel: u8, weight: u8 },
    /// A prefix behind the peer comes, or goes again, at one site.
    Prefix,
    /// The last tunnel goes, or comes again, at both sites.
    Tunnel,
    /// One tunnel's UDP port at this site, and the other site is told; `draw` says which.
    Port { tunnel: u8, draw: u16 },
}

/// Something that goes wrong, or that somebody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One link loses everything and keeps its carrier.
    Cut { link: u8, way: Way },
    /// All links do, both ways.
    CutAll,
    /// One link loses its carrier at both ends.
    Pull { link: u8 },
    /// All links do.
    PullAll,
    /// One link loses some packets.
    Loss { link: u8, way: Way, percent: u8 },
    /// A link takes longer, or all links do.
    Delay { link: Option<u8>, ms: u8 },
    /// `run` gets SIGKILL, and is started again.
    Kill { site: usize },
    /// A gateway is taken down and brought up again with nothing left of before; after SIGKILL, if it `crashed`.
    Restart { site: usize, crashed: bool },
    /// Both gateways lose what they had at once, and are brought up again at once.
    PowerCut,
    /// `ecmpvpn reload` with a changed configuration.
    Reload { site: usize, change: Change },
    /// A gateway has another address on its bond for a while, in place of its own.
    Move { site: usize },
    /// A gateway has none.
    Unaddress { site: usize },
    /// On purpose: what has to be found.
    Sabotage { defect: Defect, site: usize },
}

impl Fault {
    /// What it is counted under.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Cut { way: Way::Both, .. } => "link cut both ways",
            Self::Cut { .. } => "link cut one way",
            Self::CutAll => "all links cut",
            Self::Pull { .. } => "member pulled",
            Self::PullAll => "all members pulled",
            Self::Loss { .. } => "loss",
            Self::Delay { .. } => "delay step",
            Self::Kill { .. } => "SIGKILL",
            Self::Restart { .. } => "far end restarted",
            Self::PowerCut => "both ends restarted",
            Self::Reload { .. } => "reload",
            Self::Move { .. } => "endpoint moved",
            Self::Unaddress { .. } => "address removed",
            Self::Sabotage { .. } => "sabotage",
        }
    }
}

/// Sites as they are told.
pub const SITES: [&str; 2] = ["a", "b"];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut { link, way } => write!(f, "link {link} is cut {way}"),
            Self::CutAll => write!(f, "all links are cut both ways"),
            Self::Pull { link } => write!(f, "link {link} is pulled out of its ports"),
            Self::PullAll => write!(f, "all links are pulled out of their ports"),
            Self::Loss { link, way, percent } => write!(f, "link {link} loses {percent}% {way}"),
            Self::Delay { link: Some(link), ms } => write!(f, "link {link} takes {ms} ms"),
            Self::Delay { link: None, ms } => write!(f, "all links take {ms} ms"),
            Self::Kill { site } => write!(f, "SIGKILL for `run` of {}", SITES[*site]),
            Self::Restart { site, crashed: true } => write!(f, "{} crashes and is taken down", SITES[*site]),
            Self::PowerCut => write!(f, "both sites crash and are taken down"),
            Self::Restart { site, crashed: false } => write!(f, "{} is taken down", SITES[*site]),
            Self::Reload { site, change } => {
                let site = SITES[*site];
                match change {
                    Change::Nothing => write!(f, "{site} reloads, nothing changed"),
                    Change::Weight { tunnel, weight } => write!(f, "{site} reloads, wg{tunnel} with weight {weight}"),
                    Change::Prefix => write!(f, "{site} reloads, one prefix more or less"),
                    Change::Tunnel => write!(f, "{site} and its peer reload, one tunnel more or less"),
                    Change::Port { tunnel, .. } => {
                        write!(f, "{site} and its peer reload, wg{tunnel} with another port")
                    }
                }
            }
            Self::Move { site } => write!(f, "{} moves to another address", SITES[*site]),
            Self::Unaddress { site } => write!(f, "{} loses its address", SITES[*site]),
            Self::Sabotage { defect, site } => write!(f, "sabotage at {}: {}", SITES[*site], defect.told()),
        }
    }
}

/// One fault in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When it begins, from the first datagram on.
    pub at: Duration,
    /// How long it lasts; zero for what is done at once.
    pub lasts: Duration,
    pub fault: Fault,
}

impl Event {
    /// When it is over.
    pub fn end(&self) -> Duration {
        self.at + self.lasts
    }
}

/// All that follows from a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    pub seed: u64,
    /// Tunnels between the sites.
    pub tunnels: u8,
    /// UDP port of the first tunnel; the others' follow from it.
    pub first_port: u16,
    /// The first source port of the traffic, of each direction.
    pub source_ports: [u16; 2],
    /// B's `run` is started so much later than A's.
    pub stagger: Duration,
    /// In order of time.
    pub events: Vec<Event>,
    /// How long traffic flows.
    pub length: Duration,
    /// Whether each site is ended by SIGKILL and `down`, and not by SIGTERM.
    pub ends_killed: [bool; 2],
}

impl Schedule {
    /// The schedule of `seed` for about `length`, with a defect early in it.
    pub fn new(seed: u64, length: Duration, defect: Option<Defect>) -> Self {
        let mut setting = Random::new(seed, "setting");
        let tunnels = 3 + setting.index(2);
        let port =
            |random: &mut Random, from: u16, count: u64| from + u16::try_from(random.below(count)).expect("small");
        let mut schedule = Self {
            seed,
            tunnels,
            first_port: port(&mut setting, 20_000, 10_000),
            source_ports: [port(&mut setting, 40_000, 5_000), port(&mut setting, 50_000, 5_000)],
            stagger: setting.between(300 * MS, 1_500 * MS),
            events: Vec::new(),
            length,
            ends_killed: [setting.chance(50), setting.chance(50)],
        };
        let mut faults = Faults::new(Random::new(seed, "faults"), tunnels);
        let mut at = LEAD + faults.random.between(Duration::ZERO, 2 * S);
        if let Some(defect) = defect {
            let events = defect.events(at, &mut faults.random);
            at = events.iter().map(Event::end).max().unwrap_or(at) + 5 * S;
            schedule.events.extend(events);
        }
        loop {
            let events = faults.next(at);
            let over = events.iter().map(|event| event.end() + bounds::recovery(event)).max().unwrap_or(at);
            if over + TAIL > length {
                break;
            }
            schedule.events.extend(events);
            at = over + faults.random.between(2 * S, 5 * S);
        }
        schedule.events.sort_by_key(|event| event.at);
        schedule
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const FIVE_MINUTES: Duration = Duration::from_secs(300);

    fn is_over_others(event: &Event) -> bool {
        matches!(event.fault, Fault::Loss { .. } | Fault::Delay { .. })
    }

    #[test]
    fn a_schedule_follows_from_its_seed_alone() {
        let schedule = |seed| Schedule::new(seed, FIVE_MINUTES, None);
        assert_eq!(schedule(7), schedule(7));
        assert_ne!(schedule(7).events, schedule(8).events);
        // A longer one begins as a shorter one does.
        let long = Schedule::new(7, 24 * FIVE_MINUTES, None);
        let short = schedule(7);
        assert_eq!(long.events[..short.events.len()], short.events);
        assert!(long.events.len() > 20 * short.events.len());
    }

    #[test]
    fn every_kind_of_fault_comes_and_none_too_late() {
        let mut kinds = BTreeSet::new();
        for seed in 0..50 {
            let schedule = Schedule::new(seed, FIVE_MINUTES, None);
            assert!(schedule.events.len() >= 8, "{:?}", schedule.events);
            assert!(schedule.events.is_sorted_by_key(|event| event.at));
            for event in &schedule.events {
                kinds.insert(event.fault.kind());
                assert!(event.at >= S && event.end() + bounds::recovery(event) <= FIVE_MINUTES, "{event:?}");
            }
        }
        assert_eq!(kinds.len(), 13, "{kinds:?}");
    }

    #[test]
    fn what_stops_something_has_its_time_to_recover() {
        for seed in 0..50 {
            let events = Schedule::new(seed, FIVE_MINUTES, None).events;
            let (mut ends, mut recovers) = (Duration::ZERO, Duration::ZERO);
            for event in events.iter().filter(|event| !is_over_others(event)) {
                // What begins while another one lasts is part of the same fault.
                assert!(event.at < ends || event.at > recovers, "seed {seed}: {event:?}");
                ends = ends.max(event.end());
                recovers = recovers.max(event.end() + bounds::recovery(event));
            }
        }
    }

    #[test]
    fn a_defect_comes_first() {
        for defect in [Defect::Clear, Defect::Reorder, Defect::Recovery, Defect::Restore] {
            let schedule = Schedule::new(1, FIVE_MINUTES, Some(defect));
            assert!(matches!(schedule.events[0].fault, Fault::Sabotage { defect: found, .. } if found == defect));
            assert!(schedule.events[0].at < 6 * S);
        }
    }
}
