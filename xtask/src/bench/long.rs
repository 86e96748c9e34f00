//! Tests of the suites, run longer than in an ordinary run, on kernel WireGuard over a bond.

use std::path::PathBuf;

use anyhow::Result;

use super::programs::{Kept, LIMIT, Place, Profile, build, built};
use crate::setup::{self, Part};
use crate::sh::Cmd;
use crate::sim::run::Clock;
use crate::tier::Tier;
use crate::vm::kernel::{self, Series};
use crate::vm::run::to_stdout;
use crate::{sim, vm};

/// Where a test runs, and its seed.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Setting {
    #[command(flatten)]
    place: Place,
    /// Seed of the simulation's random numbers
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with_all = ["kernel", "here"])]
    seed: u64,
}

/// The long tests.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Long {
    /// Time from the first lost packet to traffic flowing again when a tunnel dies, in each direction
    Failover {
        /// Tunnels that die, in each direction
        #[arg(long, default_value_t = 20)]
        trials: u32,
        #[command(flatten)]
        setting: Setting,
    },
    /// Full links that lose 1%; fails if a tunnel is taken for dead
    Soak {
        /// How long, in seconds
        #[arg(long, default_value_t = 600)]
        seconds: u32,
        #[command(flatten)]
        setting: Setting,
    },
    /// Start, kill, start again, reload and take down a site; fails if something is left behind
    Cycles {
        /// How many times
        #[arg(long, default_value_t = 500)]
        cycles: u32,
        #[command(flatten)]
        setting: Setting,
    },
    /// Kill the program at every change of the host, of the maps and of a file, then take it down or start it again
    Crash {
        /// Only one of `it_comes_up`, `it_adopts`, `it_reloads`, `it_stops`, `down_undoes`, `keys_are_renewed`
        #[arg(long, value_name = "OPERATION")]
        only: Option<String>,
        #[command(flatten)]
        setting: Setting,
    },
}

/// Arguments of the test programs.
const FAILOVER: [&str; 5] = ["kernel_and_bond::", "--skip", "full_and_lossy", "--skip", "restarted"];
const SOAK: [&str; 1] = ["kernel_and_bond::full_and_lossy"];
const CYCLES: [&str; 1] = ["kernel_and_bond::cycles_five_hundred"];
/// With `--here`: the userspace backend.
const CRASH: [&str; 2] = ["kernel_and_bond::killed_while", "userspace::killed_while"];
/// The tests need these features everywhere. Without them they fail.
const REQUIRE: &str = "ECMPVPN_REQUIRE=wireguard,bonding";
/// Rate of each link, 10^6 bits a second, and number of connections: an emulated CPU can carry this on full links.
const EMULATED: [&str; 2] = ["ECMPVPN_RATE=8", "ECMPVPN_FLOWS=12"];
/// The same for a soak in simulated time, where each packet costs real time.
const SIMULATED: [&str; 2] = ["ECMPVPN_RATE=4", "ECMPVPN_FLOWS=6"];

/// A test of a suite, and its length.
struct Test {
    suite: &'static str,
    /// `VARIABLE=VALUE`.
    asked: String,
    which: Vec<String>,
    /// The build of ecmpvpn in the simulation.
    profile: Profile,
    /// Of an emulated machine. One CPU if nothing is measured: with one CPU no code can be stale (`vm::death`).
    cpus: u32,
}

impl Test {
    /// The arguments of the test program.
    fn words(&self) -> impl Iterator<Item = String> {
        ["--include-ignored", "--nocapture"].into_iter().map(str::to_owned).chain(self.which.iter().cloned())
    }

    fn simulate(&self, seed: u64) -> Result<i32> {
        build(&[Part::Lab, Part::Sim], self.profile, &["ecmpvpn"])?;
        setup::simulation(Series::V6_12)?;
        let suite = crate::suites::suite(self.suite)?.program;
        let programs = Kept::of(&[&built("ecmpvpn", self.profile), &suite])?;
        let name = suite.file_name().unwrap_or_default().to_string_lossy();
        let mut env = sim::suite_env(kernel::ALL[0], Tier::simulated(kernel::ALL[0]));
        // The last value of a variable counts.
        env.extend([self.asked.clone(), format!("ECMPVPN_BIN={}", programs.path("ecmpvpn"))]);
        if self.which == words(&SOAK) {
            env.extend(SIMULATED.map(str::to_owned));
        }
        let request = sim::run::Request {
            series: kernel::ALL[0],
            clock: Clock::Simulated { seed },
            memory_mib: 2048,
            timeout: LIMIT,
            env,
            command: std::iter::once(programs.path(&name)).chain(self.words()).collect(),
        };
        sim::run(&request, &mut to_stdout)
    }

    fn emulate(&self, series: Series) -> Result<i32> {
        build(&[Part::Lab, Part::Vm], Profile::Dev, &["ecmpvpn"])?;
        let inside = |name: &str| PathBuf::from("/usr/local/bin").join(name);
        let suite = crate::suites::suite(self.suite)?.program;
        let request = vm::run::Request {
            series,
            cpus: self.cpus,
            memory_mib: 2048,
            timeout: LIMIT,
            copies: vec![(built("ecmpvpn", Profile::Dev), inside("ecmpvpn")), (suite, inside(self.suite))],
            // Not the tier of emulated machines: it lacks these tests, because an ordinary run leaves them out there.
            env: [&self.asked, REQUIRE, &Tier::Here.env()].into_iter().chain(EMULATED).map(str::to_owned).collect(),
            command: std::iter::once(self.suite.to_owned()).chain(self.words()).collect(),
        };
        vm::run(&request, None, &mut to_stdout)
    }

    fn here(&self) -> Result<i32> {
        build(&[Part::Lab], Profile::Dev, &["ecmpvpn"])?;
        let binary = format!("ECMPVPN_BIN={}", built("ecmpvpn", Profile::Dev).display());
        // `env` because sudo does not keep the environment.
        let program = Cmd::root("env").args([&self.asked, REQUIRE, &Tier::Here.env(), &binary]);
        let program = program.arg(crate::suites::suite(self.suite)?.program);
        Ok(program.args(self.words()).status()?.code().unwrap_or(1))
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Runs a long test; returns the exit status.
pub fn run(what: Long) -> Result<i32> {
    let (test, setting) = match what {
        Long::Failover { trials, setting } => {
            let asked = format!("ECMPVPN_TRIALS={trials}");
            (Test { suite: "failover", asked, which: words(&FAILOVER), profile: Profile::Release, cpus: 2 }, setting)
        }
        Long::Soak { seconds, setting } => {
            let asked = format!("ECMPVPN_SOAK={seconds}");
            (Test { suite: "failover", asked, which: words(&SOAK), profile: Profile::Release, cpus: 2 }, setting)
        }
        Long::Cycles { cycles, setting } => {
            let asked = format!("ECMPVPN_CYCLES={cycles}");
            (Test { suite: "lifecycle", asked, which: words(&CYCLES), profile: Profile::Release, cpus: 1 }, setting)
        }
        Long::Crash { only, setting } => {
            let kind = CRASH[usize::from(setting.place.here)];
            let which = only.map_or_else(|| kind.to_owned(), |only| format!("{kind}_{only}"));
            let asked = "ECMPVPN_CRASH=all".to_owned();
            // Only a build with debug assertions has fault points.
            (Test { suite: "crash", asked, which: vec![which], profile: Profile::Dev, cpus: 1 }, setting)
        }
    };
    match setting.place {
        Place { here: true, .. } => test.here(),
        Place { kernel: Some(series), .. } => test.emulate(series),
        Place { .. } => test.simulate(setting.seed),
    }
}
