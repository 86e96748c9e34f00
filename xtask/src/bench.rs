//! `cargo xtask bench`: measurements, as tables on stdout and as JSON below `target/bench`.

use std::fs;
use std::io::{self, Read as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::setup::{self, Part};
use crate::sh::{self, Cmd};
use crate::vm::kernel::Series;
use crate::vm::run::{Request, to_stdout};
use crate::{build_ebpf, vm};

/// How long measuring may take in the virtual machine.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
/// What a line of JSON begins with among the output.
const JSON: &str = "@json ";

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Planning, and the steering program beside one that only redirects; on the running kernel
    Micro {
        /// Passed to the measuring program: --rounds N, --plans N…; -- --help shows them all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    #[command(flatten)]
    Long(Long),
    /// Traffic over one tunnel, over kernel ECMP and by ecmpvpn, side by side
    Goodput {
        /// The virtual machine's kernel series
        #[arg(long, value_enum, default_value = "6.12")]
        kernel: Series,
        /// On the running kernel, with what it has
        #[arg(long, conflicts_with = "kernel")]
        here: bool,
        /// Passed to the measuring program: --case NAME, --runs N, --rate MBIT, --seconds S…; -- --help shows them all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

/// Tests that are asked for more than an ordinary run takes time for, on kernel WireGuard in the virtual machine.
#[derive(Debug, Clone, Copy, clap::Subcommand)]
enum Long {
    /// Time from the first lost packet to traffic flowing again when a tunnel dies, in each direction
    Failover {
        /// Tunnels that die, in each direction
        #[arg(long, default_value_t = 20)]
        trials: u32,
        /// The virtual machine's kernel series
        #[arg(long, value_enum, default_value = "6.12")]
        kernel: Series,
    },
    /// Full links that lose 1%, and no tunnel may be taken for dead
    Soak {
        /// How long
        #[arg(long, default_value_t = 600)]
        seconds: u32,
        /// The virtual machine's kernel series
        #[arg(long, value_enum, default_value = "6.12")]
        kernel: Series,
    },
    /// Started, killed, started again, reloaded and taken down, and nothing may be left behind
    Cycles {
        /// How often
        #[arg(long, default_value_t = 500)]
        cycles: u32,
        /// The virtual machine's kernel series
        #[arg(long, value_enum, default_value = "6.12")]
        kernel: Series,
    },
}

/// What the test programs are told to run.
const FAILOVER: [&str; 5] = ["kernel_and_bond::", "--skip", "full_and_lossy", "--skip", "started_anew"];
const SOAK: [&str; 1] = ["kernel_and_bond::full_and_lossy"];
const CYCLES: [&str; 1] = ["kernel_and_bond::cycles_five_hundred"];

fn long(what: Long) -> Result<i32> {
    // One CPU where nothing is measured: on it no code can be stale (`vm::death`).
    let (series, cpus, suite, variable, value, which) = match what {
        Long::Failover { trials, kernel } => (kernel, 2, "failover", "ECMPVPN_TRIALS", trials, &FAILOVER[..]),
        Long::Soak { seconds, kernel } => (kernel, 2, "failover", "ECMPVPN_SOAK", seconds, &SOAK[..]),
        Long::Cycles { cycles, kernel } => (kernel, 1, "lifecycle", "ECMPVPN_CYCLES", cycles, &CYCLES[..]),
    };
    build(&[Part::Lab, Part::Vm], Profile::Dev)?;
    let program = crate::test::suite(suite)?;
    let inside = |name: &str| PathBuf::from("/usr/local/bin").join(name);
    let request = Request {
        series,
        cpus,
        memory_mib: 2048,
        timeout: LIMIT,
        copies: vec![(built("ecmpvpn", Profile::Dev), inside("ecmpvpn")), (program, inside(suite))],
        env: vec![format!("{variable}={value}"), "ECMPVPN_REQUIRE=wireguard,bonding".to_owned()],
        command: [&[suite, "--include-ignored", "--nocapture"], which]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect(),
    };
    vm::run(&request, None, &mut to_stdout)
}

/// `cargo xtask bench`; returns the exit status.
pub fn main(args: Args) -> Result<i32> {
    match args.what {
        What::Micro { options } => {
            build(&[], Profile::Release)?;
            here(
                Cmd::root(built("ecmpvpn-micro", Profile::Release)).args(&options),
                &mut Results::new("micro", &options)?,
            )
        }
        What::Long(what) => long(what),
        What::Goodput { kernel, here, options } => goodput(kernel, here, options),
    }
}

/// What is measured is what is installed; tests run with what they are built with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Profile {
    Dev,
    Release,
}

/// Builds what is to be measured and the measuring programs.
fn build(needed: &[Part], profile: Profile) -> Result<()> {
    setup::ensure(&[&[Part::Build, Part::Ebpf], needed].concat())?;
    build_ebpf::build_ebpf(None)?;
    let step = sh::step("building ecmpvpn and the measuring programs (a few minutes the first time)");
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "-p", "ecmpvpn", "-p", "ecmpvpn-tests", "--bins"])
        .args((profile == Profile::Release).then_some("--release"))
        .dir(&sh::root())
        .run()?;
    step.done("");
    Ok(())
}

fn built(name: &str, profile: Profile) -> PathBuf {
    let directory = if profile == Profile::Release { "release" } else { "debug" };
    sh::target().join(directory).join(name)
}

/// Runs a measuring program on this machine; its exit status.
fn here(program: Cmd, results: &mut Results) -> Result<i32> {
    let line = program.line();
    let mut child =
        program.into_inner().stdout(Stdio::piped()).spawn().with_context(|| format!("starting `{line}`"))?;
    let mut output = child.stdout.take().context("it has no output")?;
    let mut buffer = [0; 1 << 14];
    while let length @ 1.. = output.read(&mut buffer).with_context(|| format!("reading from `{line}`"))? {
        results.feed(&buffer[..length])?;
    }
    Ok(child.wait()?.code().unwrap_or(1))
}

fn goodput(kernel: Series, on_this: bool, options: Vec<String>) -> Result<i32> {
    build(if on_this { &[Part::Lab] } else { &[Part::Lab, Part::Vm] }, Profile::Release)?;
    let (program, bench) = (built("ecmpvpn", Profile::Release), built("ecmpvpn-bench", Profile::Release));
    let mut results = Results::new("goodput", &options)?;
    if on_this {
        return here(Cmd::root(bench).arg("--ecmpvpn").arg(program).args(&options), &mut results);
    }
    let inside = |name: &str| PathBuf::from("/usr/local/bin").join(name);
    let words = ["ecmpvpn-bench", "--ecmpvpn", "/usr/local/bin/ecmpvpn"].map(str::to_owned);
    let request = Request {
        series: kernel,
        cpus: 2,
        memory_mib: 2048,
        timeout: LIMIT,
        copies: vec![(program, inside("ecmpvpn")), (bench, inside("ecmpvpn-bench"))],
        env: Vec::new(),
        command: words.into_iter().chain(options).collect(),
    };
    vm::run(&request, None, &mut |bytes| results.feed(bytes).map_err(io::Error::other))
}

/// Passes output on, and collects what is for programs in a file.
struct Results {
    path: PathBuf,
    options: Vec<String>,
    series: Vec<Value>,
    line: Vec<u8>,
}

impl Results {
    fn new(name: &str, options: &[String]) -> Result<Self> {
        let dir = sh::target().join("bench");
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let path = dir.join(format!("{name}.json"));
        Ok(Self { path, options: options.to_vec(), series: Vec::new(), line: Vec::new() })
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                match line.strip_prefix(JSON.as_bytes()) {
                    Some(json) => self.add(serde_json::from_slice(json).context("a line of results")?)?,
                    None => to_stdout(&line)?,
                }
            }
        }
        Ok(())
    }

    /// Written at once, so that what was measured before an interruption is kept.
    fn add(&mut self, series: Value) -> Result<()> {
        self.series.push(series);
        let all = json!({ "options": self.options, "series": self.series });
        fs::write(&self.path, format!("{all:#}\n")).with_context(|| format!("writing {}", self.path.display()))?;
        sh::note(format!("written to {}", self.path.display()));
        Ok(())
    }
}
