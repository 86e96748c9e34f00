//! The demonstration: two sites on this machine, and the same transfers over one tunnel, by the usual recipe, over kernel
//! ECMP with planned ports, and by ecmpvpn; then a tunnel is cut under traffic.
//!
//! Everything is real but the distance: the program, its tunnels, the links' rates. `cargo xtask demo` builds and
//! starts it, on the running kernel or in the simulation. Progress goes to standard error; the result goes to standard
//! output, and only when everything is taken down.

mod cut;
mod left;
mod plan;
mod priority;
mod say;
mod seen;
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
use plan::Plan;
use seen::Seen;

/// Shows ecmpvpn at work between two sites in network namespaces, and cleans up.
#[derive(Debug, Parser)]
#[command(version)]
#[command(
    after_help = "Exit status: 0 shown, or nobody reads the output any more (as in `| head -3`); 1 something did \
                        not work; 2 usage; 3 not root; 130 interrupted. Everything is taken down in each case."
)]
struct Arguments {
    /// The program to show; the one beside this program unless given
    #[arg(long, value_name = "PATH")]
    ecmpvpn: Option<PathBuf>,
    /// Rate of each link between the sites, in each direction, Mbit/s [default: what this machine can fill, at most 20]
    #[arg(long, value_name = "MBIT", value_parser = positive)]
    rate: Option<f64>,
    /// Delay of each link in each direction, ms; needs netem in the kernel [default: none]
    #[arg(long, value_name = "MS", value_parser = positive)]
    delay: Option<f64>,
    /// How long each transfer is measured, seconds; it goes on for as long before, unmeasured, and a lone flow of ecmpvpn's for 3 s
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

/// How it ended, where nothing went wrong.
enum End {
    Shown,
    /// Nobody reads what is printed any more.
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
    let seen = perform(arguments, program, &mut left);
    // The labs are gone here, whatever became of them.
    say::step("looking for anything left behind");
    left.check()?;
    if say::closed() {
        return Ok(End::Unread);
    }
    if interrupt::requested() {
        return Ok(End::Interrupted);
    }
    let seen = seen?;
    say::note("nothing: no interface, address, route, rule, sysctl, pin, run file, namespace or process");
    say::note(&format!("done in {:.0} s", start.elapsed().as_secs_f64()));
    let mut text = format!("\n{}\n\n{}\n\n", seen.goodputs(), seen.bytes());
    for sentence in verdict::of(&seen) {
        text += &verdict::wrapped(&sentence);
    }
    say::result(&text)?;
    Ok(if say::closed() { End::Unread } else { End::Shown })
}

/// Both labs, one after the other: tunnels with equal ports as the usual recipe has them, and with planned ports.
fn perform(arguments: &Arguments, program: PathBuf, left: &mut Left) -> Result<Seen> {
    let mut plan = Plan::new(program, arguments.rate, arguments.delay, arguments.seconds);
    if plan.is_userspace()
        && let Err(error) = priority::raise()
    {
        say::note(&format!("no priority over other programs ({error}): keep this machine idle meanwhile"));
    }
    let usual = stage::usual_recipe(&mut plan, left)?;
    let planned = stage::planned_ports(&mut plan, left)?;
    Ok(Seen { title: plan.links(), usual, planned })
}
