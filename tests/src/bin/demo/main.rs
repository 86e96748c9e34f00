//! The demonstration. Two sites on this machine make the same transfers over one tunnel, by the usual recipe, over
//! kernel ECMP with planned ports, and by ecmpvpn. Then a tunnel is cut under traffic.
//!
//! Everything except the distance is real: the program, its tunnels, the rates of the links. `cargo xtask demo` builds
//! and starts this program, on the running kernel or in the simulation. Progress goes to standard error. The result
//! goes to standard output after everything is taken down.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod cut;
mod left;
mod measured;
mod plan;
mod priority;
mod say;
mod stage;
mod transfer;
mod verdict;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use lab::interrupt;
use lab::sites::binary;

use left::Left;
use measured::Measured;
use plan::Plan;

/// Shows ecmpvpn at work between two sites in network namespaces, and cleans up.
#[derive(Debug, Parser)]
#[command(version)]
#[command(
    after_help = "Exit status: 0 shown, or nobody reads the output any more (as in `| head -3`); 1 something did \
                        not work; 2 usage; 3 not root; 130 interrupted. Everything is taken down in each case."
)]
struct Arguments {
    /// The program to show [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    ecmpvpn: Option<PathBuf>,
    /// Rate of each link between the sites, in each direction, Mbit/s [default: what this machine can fill, at most 20]
    #[arg(long, value_name = "MBIT", value_parser = positive)]
    rate: Option<f64>,
    /// Delay of each link in each direction, ms; needs netem in the kernel [default: none]
    #[arg(long, value_name = "MS", value_parser = positive)]
    delay: Option<f64>,
    /// How long each transfer is measured, seconds. It runs as long before that without being measured; a lone flow
    /// over ecmpvpn runs at least 3 s
    #[arg(long, default_value_t = 2.0, value_name = "N", value_parser = positive)]
    seconds: f64,
}

/// A number that can be a rate or a time.
fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if number > 0.0 && number <= 100_000.0 { Ok(number) } else { Err("must be above 0, and at most 100000".to_owned()) }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    interrupt::catch();
    say::watch();
    if !rustix::process::geteuid().is_root() {
        say::error("network namespaces need root: run this with sudo");
        return ExitCode::from(3);
    }
    match show(&arguments) {
        Ok(End::Shown | End::Unread) => ExitCode::SUCCESS,
        Ok(End::Interrupted) => {
            say::error("interrupted; everything is taken down");
            ExitCode::from(130)
        }
        Err(error) => {
            say::error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// How the demonstration ended without an error.
enum End {
    Shown,
    /// Nobody reads the output any more.
    Unread,
    Interrupted,
}

fn show(arguments: &Arguments) -> Result<End> {
    let start = Instant::now();
    let program = match &arguments.ecmpvpn {
        Some(path) => fs::canonicalize(path).with_context(|| format!("--ecmpvpn {}", path.display()))?,
        None => binary()?,
    };
    let mut left = Left::look()?;
    let measured = perform(arguments, program, &mut left);
    // The labs are taken down here, also after an error.
    say::step("looking for anything left behind");
    left.check()?;
    if say::closed() {
        return Ok(End::Unread);
    }
    if interrupt::requested() {
        return Ok(End::Interrupted);
    }
    let measured = measured?;
    say::note("nothing: no interface, address, route, rule, sysctl, pin, run file, namespace or process");
    say::note(&format!("done in {:.0} s", start.elapsed().as_secs_f64()));
    let mut text = format!("\n{}\n\n{}\n\n", measured.goodputs(), measured.bytes());
    for sentence in verdict::of(&measured) {
        text += &verdict::wrapped(&sentence);
    }
    say::result(&text)?;
    Ok(if say::closed() { End::Unread } else { End::Shown })
}

/// Runs both labs, one after the other: tunnels with equal ports, as in the usual recipe, and tunnels with planned
/// ports.
fn perform(arguments: &Arguments, program: PathBuf, left: &mut Left) -> Result<Measured> {
    let mut plan = Plan::new(program, arguments.rate, arguments.delay, arguments.seconds);
    if plan.is_userspace()
        && let Err(error) = priority::raise()
    {
        say::note(&format!("no priority over other programs ({error}): keep this machine idle meanwhile"));
    }
    let usual = stage::usual_recipe(&mut plan, left)?;
    let planned = stage::planned_ports(&mut plan, left)?;
    Ok(Measured { title: plan.links(), usual, planned })
}
