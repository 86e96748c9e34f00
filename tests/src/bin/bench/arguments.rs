//! The command line, and the jobs that it asks for.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use ecmpvpn::config::Policy;
use lab::sites::Overrides;

/// A case that can be measured separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// One tunnel, the published recipe, ECMP with planned ports, adaptive with 3, 4, 6, 12 and 48 long TCP flows, and
    /// spray with one.
    Main,
    /// As main, with 10 flows at the rates of the published recipe: members of 1 Gbit/s.
    Recipe,
    /// Every policy, 1 to 48 long TCP flows.
    Policies,
    /// Policy `adaptive`, 3, 4, 6 and 12 long TCP flows.
    Adaptive,
    /// Policy `spray`, 1 and 3 long TCP flows; and 1 flow while one tunnel is slower by 5 ms.
    Spray,
    /// Policy `adaptive`, members of 2, 2 and 0.5 times the rate.
    Unequal,
    /// One tunnel slower by 5 ms, and by 20 ms.
    Delayed,
    /// Links that lose 0.01%, and 1%.
    Lossy,
    /// 30 TCP flows that arrive and leave.
    Passing,
    /// Policy `adaptive`: 200 transfers of 100 KB while each tunnel carries a long flow.
    Short,
    /// Policy `adaptive`, one tunnel slower by 5 ms: how much arrives out of order.
    Reorder,
    /// 100 changes of policy, weights and rules in 10 s under load: how much is lost.
    Changes,
    /// Policy, flows, rates, delays, jitter and losses from the options; no target.
    Custom,
}

/// Where long flows begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ends {
    /// At the gateways themselves: two network namespaces.
    Gateways,
    /// At hosts in the LAN behind each gateway, whose packets the gateways forward: four network namespaces.
    Hosts,
}

impl Ends {
    pub fn words(self) -> &'static str {
        match self {
            Self::Gateways => ", between the gateways",
            Self::Hosts => ", between LAN hosts",
        }
    }
}

/// What this program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Measures and shows the results.
    Measure,
    /// Names the jobs and runs none.
    List,
    /// Reads what jobs printed, and shows the results.
    Report,
}

/// Measures goodput between two sites in network namespaces, and cleans up.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    /// The program to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub ecmpvpn: Option<PathBuf>,
    /// Cases to measure
    #[arg(long, value_enum, default_value = "main")]
    pub case: Vec<Case>,
    /// Repetitions [default: 20 of main and recipe in simulated time, 10 where a target needs them, else 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: Option<u32>,
    /// Seed of the first repetition; each further repetition has the next number
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Rate of each member in each direction, Mbit/s [default: 100 in simulated time, else 10]
    #[arg(long, value_name = "MBIT")]
    pub rate: Option<f64>,
    /// Length of each transfer [default: 3 in simulated time, else 10]
    #[arg(long, value_name = "S")]
    pub seconds: Option<f64>,
    /// Where long flows begin and end, except in short, reorder and changes [default: hosts in simulated time, else
    /// gateways]
    #[arg(long, value_enum)]
    pub ends: Option<Ends>,
    /// Numbers of flows, instead of those of the case
    #[arg(long, value_delimiter = ',', value_name = "N")]
    pub flows: Vec<usize>,
    /// Policy, instead of that of the case: hash, flowlet, adaptive or spray
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    pub policy: Option<&'static str>,
    /// With --case custom: additional delay of each tunnel, milliseconds, as 0,5,0
    #[arg(long, value_delimiter = ',', value_name = "MS")]
    pub delays: Vec<f64>,
    /// With --case custom: rate of each tunnel's member instead of --rate, as 20,20,5
    #[arg(long, value_delimiter = ',', value_name = "MBIT")]
    pub rates: Vec<f64>,
    /// With --case custom: percent of the packets that each link loses
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT")]
    pub loss: f64,
    /// With --case custom: random variation of each packet's delay, up and down, milliseconds
    #[arg(long, default_value_t = 0.0, value_name = "MS")]
    pub jitter: f64,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Leave kernel ECMP out
    #[arg(long)]
    pub without_ecmp: bool,
    /// Run in simulated time: links have wires with a delay, and targets are tight
    #[arg(long, hide = true)]
    pub simulated: bool,
    /// What to do
    #[arg(long, hide = true, value_enum, default_value = "measure")]
    pub mode: Mode,
    /// Run only this job; --mode report then shows its results
    #[arg(long, hide = true, value_name = "JOB")]
    pub only: Option<Job>,
}

impl Arguments {
    /// The policy of the options, or else `own`, that of the case.
    pub fn policy(&self, own: &'static str) -> &'static str {
        self.policy.unwrap_or(own)
    }

    /// The repetitions of the options, or else `own`, those of the case.
    pub fn runs(&self, own: u32) -> u32 {
        self.runs.unwrap_or(own)
    }

    pub fn rate_or(&self, own: f64) -> f64 {
        self.rate.unwrap_or(own)
    }

    pub fn rate(&self) -> f64 {
        self.rate_or(if self.simulated { 100.0 } else { 10.0 })
    }

    pub fn seconds(&self) -> f64 {
        // Short transfers are enough in simulated time, where there is no noise.
        self.seconds.unwrap_or(if self.simulated { 3.0 } else { 10.0 })
    }

    pub fn ends(&self) -> Ends {
        self.ends.unwrap_or(if self.simulated { Ends::Hosts } else { Ends::Gateways })
    }

    /// The seed of a repetition. Repetitions are counted from 1.
    pub fn seed_of(&self, repetition: u32) -> u64 {
        self.seed.wrapping_add(u64::from(repetition) - 1)
    }
}

/// A part of the work that runs separately: one repetition of one table of a case, or a whole case. Tables are counted
/// from 0, repetitions from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    pub case: Case,
    pub repetition: Option<(usize, u32)>,
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let case = self.case.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        match self.repetition {
            Some((table, repetition)) => write!(f, "{case}/{table}/{repetition}"),
            None => write!(f, "{case}"),
        }
    }
}

impl std::str::FromStr for Job {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/');
        let case = Case::from_str(parts.next().unwrap_or_default(), false)?;
        let numbers: Vec<&str> = parts.collect();
        let repetition = match numbers[..] {
            [] => None,
            [table, repetition] => Some((
                table.parse().map_err(|_| "no number of a table")?,
                repetition.parse().map_err(|_| "no number of a repetition")?,
            )),
            _ => return Err("not CASE or CASE/TABLE/REPETITION".to_owned()),
        };
        Ok(Self { case, repetition })
    }
}

fn policy(word: &str) -> Result<&'static str, String> {
    let known = Policy::ALL.iter().map(|policy| policy.as_str());
    known.into_iter().find(|known| *known == word).ok_or_else(|| "not a policy".to_owned())
}
