//! `cargo xtask demo`: sets up the machine, builds, and shows in a table what ecmpvpn does.

use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::setup::{self, Part};
use crate::sh::{self, Cmd};
use crate::sim::run::{Clock, Request};
use crate::vm::kernel::Series;
use crate::vm::run::to_stdout;
use crate::{build_ebpf, sim};

/// Limit for the demonstration in the simulation, in this machine's time.
const LIMIT: Duration = Duration::from_secs(900);
/// The simulation's links, as in the published usual recipe. Transfers are short, since a simulated second at these
/// rates takes several seconds of this machine.
const SIMULATED: [&str; 6] = ["--rate", "1000", "--delay", "0.5", "--seconds", "0.4"];

/// Arguments of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run in simulated time, with kernel WireGuard and a real LACP bond, whatever this machine has
    #[arg(long)]
    sim: bool,
    /// Passed to the demonstration; `-- --help` shows its options
    #[arg(last = true)]
    options: Vec<String>,
}

/// `cargo xtask demo`; returns the exit status.
pub fn main(args: &Args) -> Result<i32> {
    let mut parts = vec![Part::Build, Part::Ebpf, Part::Lab];
    parts.extend(args.sim.then_some(Part::Sim));
    setup::ensure(&parts)?;
    build_ebpf::build_ebpf(None)?;
    let step = sh::step("building ecmpvpn and its demonstration (a few minutes the first time)");
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        // This profile also optimises what must be fast here; a release build takes far longer.
        .args(["build", "--quiet", "-p", "ecmpvpn", "-p", "ecmpvpn-tests", "--bin", "ecmpvpn", "--bin", "ecmpvpn-demo"])
        .dir(&sh::root())
        .run()?;
    step.done("");
    let built = |name: &str| sh::target().join("debug").join(name);
    let (program, demo) = (built("ecmpvpn"), built("ecmpvpn-demo"));
    if args.sim {
        return simulated(&program, &demo, &args.options);
    }
    if !sh::is_root() {
        sh::note("sudo is needed: the demonstration makes network namespaces");
    }
    // The demonstration replaces this process. So a signal reaches it, and the caller waits until it has taken
    // everything down.
    let mut demo = Cmd::root(demo).arg("--ecmpvpn").arg(program).args(&args.options).into_inner();
    Err(demo.exec()).with_context(|| format!("starting {} as root", demo.get_program().display()))
}

/// Everything that is made in the simulation ends with it, and the simulation ends with this process.
fn simulated(program: &Path, demo: &Path, options: &[String]) -> Result<i32> {
    let mut command: Vec<String> =
        [demo, Path::new("--ecmpvpn"), program].map(|word| word.display().to_string()).into();
    command.extend(SIMULATED.map(str::to_owned));
    command.extend_from_slice(options);
    let request = Request {
        series: Series::V6_12,
        clock: Clock::Simulated { seed: 1 },
        memory_mib: 2048,
        timeout: LIMIT,
        env: Vec::new(),
        command,
    };
    let mut unread = false;
    let status = sim::run(&request, &mut |bytes| {
        let written = to_stdout(bytes);
        unread = written.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe);
        written
    });
    // As on the running kernel: a closed stdout is not an error.
    if unread { Ok(0) } else { status }
}
