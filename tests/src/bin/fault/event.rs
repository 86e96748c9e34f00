//! Faults, and when they happen.

use std::fmt;
use std::time::Duration;

use lab::hostile::Flood;

use crate::defect::Defect;

/// Number of links between the sites.
pub const LINKS: u8 = 3;
/// A direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    FromA,
    FromB,
    Both,
}

impl Way {
    pub const ALL: [Self; 3] = [Self::FromA, Self::FromB, Self::Both];

    /// The sites that send in that direction, 0 for A.
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

/// A change of a configuration before `reload`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Nothing,
    /// Sets one tunnel's weight at one site.
    Weight {
        tunnel: u8,
        weight: u8,
    },
    /// Adds a prefix behind the peer at one site, or removes it again.
    Prefix,
    /// Removes the last tunnel at both sites, or adds it again.
    Tunnel,
    /// Changes one tunnel's UDP port at this site, and the remote port at the other site. The new port follows from
    /// `draw`.
    Port {
        tunnel: u8,
        draw: u16,
    },
}

/// What another program of a gateway does to what `run` has made. Each has its commands for `ip`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbance {
    Down,
    DownAndUp,
    Route,
    RouteV6,
    Unreachable,
}

impl Disturbance {
    pub const ALL: [Self; 5] = [Self::Down, Self::DownAndUp, Self::Route, Self::RouteV6, Self::Unreachable];

    /// The commands at a site whose peer has these prefixes.
    pub fn commands(self, [v4, v6]: [&str; 2]) -> Vec<String> {
        let down = || "link set ecmp0 down".to_owned();
        match self {
            Self::Down => vec![down()],
            Self::DownAndUp => vec![down(), "link set ecmp0 up".to_owned()],
            Self::Route => vec![format!("route delete {v4} dev ecmp0")],
            Self::RouteV6 => vec![format!("-6 route delete {v6} dev ecmp0")],
            Self::Unreachable => vec![format!("route delete unreachable {v4}")],
        }
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Down => "the steering device is set down",
            Self::DownAndUp => "the steering device is set down and up",
            Self::Route => "the steered IPv4 route is deleted",
            Self::RouteV6 => "the steered IPv6 route is deleted",
            Self::Unreachable => "the unreachable IPv4 route is deleted",
        })
    }
}

/// A failure, or an action of an operator or of another user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One link loses everything and keeps its carrier.
    Cut { link: u8, way: Way },
    /// All links lose everything, both ways, and keep their carrier.
    CutAll,
    /// One link loses its carrier at both ends.
    Pull { link: u8 },
    /// All links lose their carrier at both ends.
    PullAll,
    /// One link loses some packets.
    Loss { link: u8, way: Way, percent: u8 },
    /// One link, or all links, delay packets more. `None`: all links.
    Delay { link: Option<u8>, ms: u8 },
    /// `run` is killed by SIGKILL, and is started again.
    Kill { site: usize },
    /// A gateway is taken down and brought up again, with nothing left from before. It is taken down after SIGKILL if
    /// it `crashed`.
    Restart { site: usize, crashed: bool },
    /// Both gateways crash and are taken down at the same time, and are brought up again at the same time.
    PowerCut,
    /// `ecmpvpn reload` runs with a changed configuration.
    Reload { site: usize, change: Change },
    /// A gateway has another address on its bond for a while, instead of its own.
    Move { site: usize },
    /// A gateway has no address on its bond for a while.
    Unaddress { site: usize },
    /// A user without privilege of one gateway holds a lock on all that it may open.
    Locks { site: usize },
    /// A user without privilege of one gateway sends echo requests through all tunnels, at this rate a second.
    Flood { site: usize, flood: Flood, rate: u16 },
    /// Another program of a gateway disturbs what `run` has made, which mends it.
    Disturb { site: usize, what: Disturbance },
    /// A defect that is introduced on purpose and must be found.
    Sabotage { defect: Defect, site: usize },
}

impl Fault {
    /// The name under which faults of this kind are counted.
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
            Self::Locks { .. } => "locks of a user",
            Self::Flood { .. } => "flood of a user",
            Self::Disturb { .. } => "host disturbed",
            Self::Sabotage { .. } => "sabotage",
        }
    }
}

/// Names of the sites in the output.
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
            Self::Locks { site } => write!(f, "a user of {} holds locks", SITES[*site]),
            Self::Flood { site, flood, rate } => {
                let what = match flood {
                    Flood::Pings => "pings",
                    Flood::Reports => "forged reports",
                    Flood::Truncated => "truncated reports",
                };
                write!(f, "a user of {} sends {rate} {what} a second", SITES[*site])
            }
            Self::Disturb { site, what } => write!(f, "at {} {what}", SITES[*site]),
            Self::Sabotage { defect, site } => write!(f, "sabotage at {}: {}", SITES[*site], defect.describe()),
        }
    }
}

impl Fault {
    /// Whether the fault is a user without privilege who tries something, which must cost nothing.
    pub fn is_hostile(self) -> bool {
        matches!(self, Self::Locks { .. } | Self::Flood { .. })
    }
}

/// One fault with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When the fault begins, counted from the first datagram.
    pub at: Duration,
    /// How long the fault lasts. Zero for an action that takes no time.
    pub lasts: Duration,
    pub fault: Fault,
}

impl Event {
    /// When the fault is over, counted from the first datagram.
    pub fn end(&self) -> Duration {
        self.at + self.lasts
    }
}
