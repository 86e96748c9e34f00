//! Defects put in on purpose, one for each invariant, to show that it is found.

use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use rustix::process::Signal;

use crate::random::Random;
use crate::schedule::{Event, Fault, LINKS, Way};
use crate::stage::{BOND, Stage};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);
/// Routing table and rule preference of the way past the steering device.
const PAST: u32 = 4_000;

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Defect {
    /// For a moment one site routes the peer's prefix past the steering device, out of the bond
    Clear,
    /// One tunnel's device delays some packets and not others
    Reorder,
    /// One site's `run` is stopped (SIGSTOP) while a link is cut
    Recovery,
    /// One gateway has a route more when its former state is compared
    Restore,
}

impl Defect {
    pub fn told(self) -> &'static str {
        match self {
            Self::Clear => "the peer's prefix is routed past the steering device",
            Self::Reorder => "a tunnel's device delays some packets and not others",
            Self::Recovery => "SIGSTOP for `run`",
            Self::Restore => "a route is left behind",
        }
    }

    /// What happens from `at` on.
    pub fn events(self, at: Duration, random: &mut Random) -> Vec<Event> {
        let site = usize::from(random.index(2));
        let event = |at, lasts, fault| Event { at, lasts, fault };
        let sabotage = Fault::Sabotage { defect: self, site };
        match self {
            Self::Clear => vec![event(at, 300 * MS, sabotage)],
            Self::Reorder => vec![event(at, 5 * S, sabotage)],
            Self::Recovery => {
                let cut = Fault::Cut { link: random.index(LINKS), way: Way::Both };
                vec![event(at, 4 * S, sabotage), event(at + 500 * MS, 2 * S, cut)]
            }
            Self::Restore => vec![event(at, Duration::ZERO, sabotage)],
        }
    }

    pub fn begin(self, stage: &Stage, site: usize) -> Result<()> {
        let gateway = &stage.lab.sites[site].gateway;
        let far = &stage.lab.sites[1 - site];
        match self {
            Self::Clear => gateway.apply(
                "ip",
                &[
                    format!("route add default via {} dev {BOND} table {PAST}", far.endpoint),
                    format!("rule add pref {PAST} to 10.{}.0.0/16 lookup {PAST}", far.number),
                ],
            ),
            // Longer than a flow's datagrams are apart.
            Self::Reorder => gateway.apply("tc", &["qdisc add dev wg0 root netem delay 200ms reorder 50%".to_owned()]),
            Self::Recovery => stage.running(site)?.signal(Signal::STOP),
            Self::Restore => gateway.apply("ip", &["route add 198.51.100.0/24 dev lan0".to_owned()]),
        }
    }

    pub fn end(self, stage: &Stage, site: usize) -> Result<()> {
        let gateway = &stage.lab.sites[site].gateway;
        match self {
            Self::Clear => gateway.apply("ip", &[format!("rule del pref {PAST}"), format!("route flush table {PAST}")]),
            Self::Reorder => gateway.apply("tc", &["qdisc del dev wg0 root".to_owned()]),
            Self::Recovery => stage.running(site)?.signal(Signal::CONT),
            Self::Restore => Ok(()),
        }
    }
}
