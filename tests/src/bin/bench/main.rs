//! Goodput of ecmpvpn beside one tunnel and the kernel's ECMP, between two sites on this machine.
//!
//! Each repetition measures every contestant, and ratios are taken within it: whatever is different from one repetition to
//! the next is the same for all of them. `cargo xtask bench goodput` builds and starts it. In simulated time it is started
//! once for each repetition (`--mode list` names these jobs, `--only` runs one), and once more to put them together (`--mode report`).

mod bulk;
mod cases;
mod changes;
mod contest;
mod draw;
mod quantiles;
mod reorder;
mod report;
mod series;
mod short;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use ecmpvpn::config::Policy;
use lab::interrupt;
use lab::sites::binary;
use serde_json::json;

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// One tunnel, the published recipe, ECMP with planned ports, adaptive with 3, 4, 6, 12 and 48 long TCP flows, and
    /// spray with one.
    Main,
    /// The same with 10 flows at the recipe's own rates, members of 1 Gbit/s.
    Recipe,
    /// Every policy with 1 to 48 long TCP flows.
    Policies,
    /// Policy `adaptive`, 3, 4, 6 and 12 long TCP flows.
    Adaptive,
    /// Policy `spray`, 1 and 3 long TCP flows; and 1 with one tunnel slower by 5 ms.
    Spray,
    /// Policy `adaptive` over members of 2, 2 and 0.5 times the rate.
    Unequal,
    /// One tunnel slower by 5 ms, and by 20 ms.
    Delayed,
    /// Links that lose 0.01%, and 1%.
    Lossy,
    /// 30 TCP flows that arrive and leave.
    Passing,
    /// Policy `adaptive`: 200 transfers of 100 KB while each tunnel carries a long flow.
    Short,
    /// Policy `adaptive`, one tunnel slower by 5 ms: what arrives out of order.
    Reorder,
    /// 100 changes of policy, weights and rules in 10 s under load: what is lost.
    Changes,
    /// Policy, flows, rates, delays, jitter and losses as given by options; no target.
    Custom,
}

/// Where long flows begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ends {
    /// At the gateways themselves: two network namespaces.
    Gateways,
    /// At hosts in the LAN behind each gateway, whose packets the gateways forward: four.
    Hosts,
}

/// What this program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Measures and shows.
    Measure,
    /// Names the jobs, and does none.
    List,
    /// Reads what jobs printed, and shows it.
    Report,
}

impl Ends {
    fn words(self) -> &'static str {
        match self {
            Self::Gateways => ", between the gateways",
            Self::Hosts => ", between LAN hosts",
        }
    }
}

/// Measures goodput between two sites in network namespaces, and cleans up.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The program to measure; the one beside this program unless given
    #[arg(long, value_name = "PATH")]
    ecmpvpn: Option<PathBuf>,
    /// These cases
    #[arg(long, value_enum, default_value = "main")]
    case: Vec<Case>,
    /// Repetitions [default: 20 of main and recipe in simulated time, 10 where a target asks for them, else 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// The first repetition's seed; the next one has the next
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Rate of each member in each direction, Mbit/s [default: 100 in simulated time, else 10]
    #[arg(long, value_name = "MBIT")]
    rate: Option<f64>,
    /// Length of each transfer [default: 3 in simulated time, else 10]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Where long flows begin and end, but in short, reorder and changes [default: hosts in simulated time, else gateways]
    #[arg(long, value_enum)]
    ends: Option<Ends>,
    /// Other numbers of flows than the case's own
    #[arg(long, value_delimiter = ',', value_name = "N")]
    flows: Vec<usize>,
    /// Another policy than the case's own: hash, flowlet, adaptive or spray
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    policy: Option<&'static str>,
    /// With --case custom: what each tunnel delays more, milliseconds, as 0,5,0
    #[arg(long, value_delimiter = ',', value_name = "MS")]
    delays: Vec<f64>,
    /// With --case custom: rate of each tunnel's member instead of --rate, as 20,20,5
    #[arg(long, value_delimiter = ',', value_name = "MBIT")]
    rates: Vec<f64>,
    /// With --case custom: percent of the packets that each link loses
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT")]
    loss: f64,
    /// With --case custom: by so much each packet takes longer or shorter, milliseconds
    #[arg(long, default_value_t = 0.0, value_name = "MS")]
    jitter: f64,
    /// Added to both configurations, as `[[rule]]…`
    #[arg(long, default_value = "", value_name = "TOML")]
    extra: String,
    /// Leave kernel ECMP out
    #[arg(long)]
    without_ecmp: bool,
    /// Time is simulated: links have wires with a delay, and targets are tight
    #[arg(long, hide = true)]
    simulated: bool,
    /// What to do
    #[arg(long, hide = true, value_enum, default_value = "measure")]
    mode: Mode,
    /// Does this job only, and leaves it to --mode report to show what came of it
    #[arg(long, hide = true, value_name = "JOB")]
    only: Option<Job>,
}

impl Arguments {
    /// The policy to measure, where a case has one of its own.
    fn policy(&self, own: &'static str) -> &'static str {
        self.policy.unwrap_or(own)
    }

    /// How often to measure.
    fn runs(&self, own: u32) -> u32 {
        self.runs.unwrap_or(own)
    }

    fn rate_or(&self, own: f64) -> f64 {
        self.rate.unwrap_or(own)
    }

    fn rate(&self) -> f64 {
        self.rate_or(if self.simulated { 100.0 } else { 10.0 })
    }

    fn seconds(&self) -> f64 {
        // Nothing is noisy in simulated time.
        self.seconds.unwrap_or(if self.simulated { 3.0 } else { 10.0 })
    }

    fn ends(&self) -> Ends {
        self.ends.unwrap_or(if self.simulated { Ends::Hosts } else { Ends::Gateways })
    }

    /// The seed of a repetition, which are counted from 1.
    fn seed_of(&self, repetition: u32) -> u64 {
        self.seed.wrapping_add(u64::from(repetition) - 1)
    }
}

/// What can be done by itself: a repetition of a case's table, counted from 0 and from 1, or a whole case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Job {
    case: Case,
    repetition: Option<(usize, u32)>,
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.mode == Mode::Measure && !rustix::process::geteuid().is_root() {
        eprintln!("error: network namespaces need root: run this with sudo");
        return ExitCode::from(3);
    }
    interrupt::catch();
    match act(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupt::requested() => {
            eprintln!("interrupted; everything is taken down");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.rate() > 0.0, "--rate: too small");
    ensure!(arguments.seconds.is_none_or(|seconds| seconds >= 1.0), "--seconds: too small");
    match arguments.mode {
        Mode::Measure => measure(arguments),
        Mode::List => {
            list(arguments);
            Ok(())
        }
        Mode::Report => {
            let all: Vec<_> = arguments.case.iter().flat_map(|case| cases::of_case(*case, arguments)).collect();
            report::merge(&all, std::io::stdin().lock())
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let program = match &arguments.ecmpvpn {
        Some(path) => std::fs::canonicalize(path).with_context(|| format!("--ecmpvpn {}", path.display()))?,
        None => binary()?,
    };
    if let Some(Job { case, repetition: Some((table, repetition)) }) = arguments.only {
        let series = cases::of_case(case, arguments);
        let series = series.get(table).context("--only: there is no such table")?;
        for measured in series.measure(arguments, &program, &[repetition])? {
            report::json(&measured.json(&series.title));
        }
        return Ok(());
    }
    let cases = arguments.only.map_or_else(|| arguments.case.clone(), |job| vec![job.case]);
    for case in cases {
        for series in cases::of_case(case, arguments) {
            let repetitions: Vec<u32> = (1..=series.runs).collect();
            report::show(&series, &series.measure(arguments, &program, &repetitions)?);
        }
        match case {
            Case::Short => short::measure(arguments, &program)?,
            Case::Changes => changes::measure(arguments, &program)?,
            Case::Reorder => reorder::measure(arguments, &program)?,
            _ => {}
        }
    }
    Ok(())
}

/// A line of JSON for each job: its name and its seed.
fn list(arguments: &Arguments) {
    let line = |job: Job, seed: u64| println!("{}", json!({ "job": job.to_string(), "seed": seed }));
    for case in &arguments.case {
        let tables = cases::of_case(*case, arguments);
        for (table, series) in tables.iter().enumerate() {
            for repetition in 1..=series.runs {
                let job = Job { case: *case, repetition: Some((table, repetition)) };
                line(job, arguments.seed_of(repetition));
            }
        }
        if tables.is_empty() {
            line(Job { case: *case, repetition: None }, arguments.seed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_read_as_they_are_named() {
        for (name, repetition) in [("main/0/20", Some((0, 20))), ("short", None)] {
            let job: Job = name.parse().unwrap();
            assert_eq!((job.repetition, job.to_string()), (repetition, name.to_owned()));
        }
        for wrong in ["", "nothing", "main/0", "main/x/1", "main/0/1/2", "main/0/-1"] {
            assert!(wrong.parse::<Job>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_repetition_has_a_seed_of_its_own() {
        let arguments = Arguments::parse_from(["bench", "--seed", "7"]);
        assert_eq!((arguments.seed_of(1), arguments.seed_of(20)), (7, 26));
        assert_eq!(arguments.case, [Case::Main]);
    }
}
