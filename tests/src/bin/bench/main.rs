//! Goodput of ecmpvpn beside one tunnel and the kernel's ECMP, between two sites on this machine.
//!
//! Each repetition measures every contestant, one right after the other, and ratios are taken within it: whatever slows
//! the machine down for a while slows all of them. `cargo xtask bench goodput` builds and starts it.

mod bulk;
mod changes;
mod contest;
mod reorder;
mod report;
mod short;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use ecmpvpn::config::Policy;
use lab::interrupt;
use lab::sites::binary;

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Policy `adaptive`, 3, 4, 6 and 12 long TCP flows.
    Adaptive,
    /// Policy `spray`, 1 and 3 long TCP flows; and 1 with one tunnel slower by 5 ms.
    Spray,
    /// Policy `adaptive` over members of 20, 20 and 5 Mbit/s.
    Unequal,
    /// Policy `adaptive`: 200 transfers of 100 KB while each tunnel carries a long flow.
    Short,
    /// Policy `adaptive`, one tunnel slower by 5 ms: what arrives out of order.
    Reorder,
    /// 100 changes of policy, weights and rules in 10 s under load: what is lost.
    Changes,
    /// Policy, flows and delays as given by options; no target.
    Custom,
}

/// Where long flows begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ends {
    /// At the gateways themselves: two network namespaces.
    Gateways,
    /// At a host in the LAN behind each gateway, whose packets the gateways forward: four.
    Hosts,
}

/// Measures goodput between two sites in network namespaces, and cleans up.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The program to measure; the one beside this program unless given
    #[arg(long, value_name = "PATH")]
    ecmpvpn: Option<PathBuf>,
    /// Only these cases [default: all but custom]
    #[arg(long, value_enum)]
    case: Vec<Case>,
    /// Repetitions [default: 5, and 10 where a target asks for them]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Rate of each member in each direction, Mbit/s
    #[arg(long, default_value_t = 10.0, value_name = "MBIT")]
    rate: f64,
    /// Length of each transfer, of which the first quarter is not measured
    #[arg(long, default_value_t = 10.0, value_name = "S")]
    seconds: f64,
    /// Where long flows of adaptive, spray, unequal and custom begin and end
    #[arg(long, value_enum, default_value = "gateways")]
    ends: Ends,
    /// Other numbers of flows than the case's own
    #[arg(long, value_delimiter = ',', value_name = "N")]
    flows: Vec<usize>,
    /// Another policy than the case's own: hash, flowlet, adaptive or spray
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    policy: Option<&'static str>,
    /// With --case custom: what each tunnel delays more, milliseconds, as 0,5,0
    #[arg(long, value_delimiter = ',', value_name = "MS")]
    delays: Vec<f64>,
    /// With --case custom: rate of each member instead of --rate, as 20,20,5
    #[arg(long, value_delimiter = ',', value_name = "MBIT")]
    rates: Vec<f64>,
    /// Added to both configurations, as `[[rule]]…`
    #[arg(long, default_value = "", value_name = "TOML")]
    extra: String,
    /// Leave kernel ECMP out
    #[arg(long)]
    without_ecmp: bool,
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
}

fn policy(word: &str) -> Result<&'static str, String> {
    let known = Policy::ALL.iter().map(|policy| policy.as_str());
    known.into_iter().find(|known| *known == word).ok_or_else(|| "not a policy".to_owned())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !rustix::process::geteuid().is_root() {
        eprintln!("error: network namespaces need root: run this with sudo");
        return ExitCode::from(3);
    }
    interrupt::catch();
    match measure(&arguments) {
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

fn measure(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.rate > 0.0 && arguments.seconds >= 1.0, "--rate and --seconds: too small");
    let program = match &arguments.ecmpvpn {
        Some(path) => std::fs::canonicalize(path).with_context(|| format!("--ecmpvpn {}", path.display()))?,
        None => binary()?,
    };
    let all = [Case::Adaptive, Case::Short, Case::Spray, Case::Unequal, Case::Reorder, Case::Changes];
    let cases = if arguments.case.is_empty() { &all[..] } else { &arguments.case };
    for case in cases {
        for bulk in bulk::of_case(*case, arguments) {
            let rows = bulk.run(arguments, &program)?;
            report::show(&bulk.title, &rows);
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
