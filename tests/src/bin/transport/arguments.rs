//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use ecmpvpn::config::Policy;
use lab::sites::Overrides;

use crate::job::Job;
use crate::profile::Profile;
use crate::transport::Transport;

/// What this program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Measures and prints the results as JSON.
    Measure,
    /// Names the jobs and runs none.
    List,
    /// Reads what jobs printed, and shows the results.
    Report,
}

/// Measures one flow of several transports between two sites, in simulated time.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    /// The program to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub ecmpvpn: Option<PathBuf>,
    /// Links between the sites [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub profile: Vec<Profile>,
    /// Traffic to measure
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tcp,quic,rtp,wireguard")]
    pub transport: Vec<Transport>,
    /// Policies to compare with one tunnel
    #[arg(long, value_delimiter = ',', value_parser = policy, default_value = "adaptive,spray")]
    pub policy: Vec<&'static str>,
    /// Seeds, from the first to the last; each has a simulation of its own
    #[arg(long, value_name = "A..B", value_parser = seeds, default_value = "1..10")]
    pub seeds: RangeInclusive<u64>,
    /// Length of each flow, seconds; its second half is measured
    #[arg(long, default_value_t = 4.0, value_name = "S", value_parser = seconds)]
    pub seconds: f64,
    /// Do not fill the links beforehand: ecmpvpn does not know yet what they carry
    #[arg(long)]
    pub cold: bool,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Time is simulated. It always is: on a real CPU the figures mean nothing
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
    /// All jobs, a seed of each profile before the next seed.
    pub fn jobs(&self) -> Vec<Job> {
        let profiles = if self.profile.is_empty() { Profile::value_variants() } else { &self.profile };
        let of = |seed| profiles.iter().map(move |profile| Job { profile: *profile, seed });
        self.seeds.clone().flat_map(of).collect()
    }
}

fn policy(word: &str) -> Result<&'static str, String> {
    let known = Policy::ALL.iter().map(|policy| policy.as_str());
    known.into_iter().find(|known| *known == word).ok_or_else(|| "not a policy".to_owned())
}

fn seeds(text: &str) -> Result<RangeInclusive<u64>, String> {
    let (first, last) = text.split_once("..").ok_or("not A..B")?;
    let number = |word: &str| word.parse::<u64>().map_err(|_| format!("{word:?} is not a seed"));
    let seeds = number(first)?..=number(last.strip_prefix('=').unwrap_or(last))?;
    if seeds.is_empty() { Err("the last seed is below the first".to_owned()) } else { Ok(seeds) }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number")?;
    if (1.0..=600.0).contains(&seconds) { Ok(seconds) } else { Err("not from 1 to 600".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(options: &[&str]) -> Vec<String> {
        let arguments = Arguments::try_parse_from([&["transport"], options].concat()).unwrap();
        arguments.jobs().iter().map(Job::to_string).collect()
    }

    #[test]
    fn each_profile_has_each_seed() {
        assert_eq!(
            jobs(&["--profile", "equal,apart", "--seeds", "3..4"]),
            ["equal/3", "apart/3", "equal/4", "apart/4"]
        );
        assert_eq!(jobs(&[]).len(), 10 * Profile::value_variants().len());
    }

    #[test]
    fn wrong_options_are_refused() {
        for wrong in [["--seeds", "4..3"], ["--seeds", "4"], ["--policy", "best"], ["--seconds", "0"]] {
            assert!(Arguments::try_parse_from([&["transport"][..], &wrong].concat()).is_err(), "{wrong:?}");
        }
    }
}
