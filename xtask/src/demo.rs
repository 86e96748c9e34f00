//! `cargo xtask demo`: everything from a bare machine to a table of what ecmpvpn does.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::setup::{self, Part};
use crate::sh::{self, Cmd};
use crate::vm::kernel::Series;
use crate::vm::run::{Request, to_stdout};
use crate::{build_ebpf, vm};

/// How long the demonstration may take in the virtual machine.
const LIMIT: Duration = Duration::from_secs(900);

/// Arguments of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// In the virtual machine, with kernel WireGuard and a real LACP bond, whatever the running kernel has
    #[arg(long)]
    vm: bool,
    /// The virtual machine's kernel series
    #[arg(long, value_enum, default_value = "6.12", requires = "vm")]
    kernel: Series,
    /// Passed to the demonstration; `-- --help` shows what it takes
    #[arg(last = true)]
    options: Vec<String>,
}

/// `cargo xtask demo`; returns the exit status.
pub fn main(args: Args) -> Result<i32> {
    let mut parts = vec![Part::Build, Part::Ebpf, Part::Lab];
    parts.extend(args.vm.then_some(Part::Vm));
    setup::ensure(&parts)?;
    build_ebpf::build_ebpf(None)?;
    let step = sh::step("building ecmpvpn and its demonstration (a few minutes the first time)");
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        // What the demonstration needs fast is optimised in this profile too; a release build takes far longer.
        .args(["build", "--quiet", "-p", "ecmpvpn", "-p", "ecmpvpn-tests", "--bins"])
        .dir(&sh::root())
        .run()?;
    step.done("");
    let built = |name: &str| sh::target().join("debug").join(name);
    let (program, demo) = (built("ecmpvpn"), built("ecmpvpn-demo"));

    if args.vm {
        let inside = |name: &str| PathBuf::from("/usr/local/bin").join(name);
        let words = ["ecmpvpn-demo", "--ecmpvpn", "/usr/local/bin/ecmpvpn"].map(str::to_owned);
        let request = Request {
            series: args.kernel,
            cpus: 2,
            memory_mib: 2048,
            timeout: LIMIT,
            copies: vec![(program, inside("ecmpvpn")), (demo, inside("ecmpvpn-demo"))],
            env: Vec::new(),
            command: words.into_iter().chain(args.options).collect(),
        };
        return vm::run(&request, None, &mut to_stdout);
    }
    if !sh::is_root() {
        sh::note("sudo is needed: the demonstration makes network namespaces");
    }
    let status = Cmd::root(demo).arg("--ecmpvpn").arg(program).args(&args.options).status()?;
    Ok(status.code().unwrap_or(1))
}
