//! Builds, tests and shows ecmpvpn: `cargo xtask --help`.

mod bench;
mod build_ebpf;
mod count;
mod demo;
#[cfg(test)]
mod dependencies;
mod fingerprint;
mod fuzz;
mod lint;
mod machines;
mod packages;
mod setup;
mod sh;
mod side_by_side;
mod sim;
#[cfg(test)]
mod structure;
mod suites;
mod test;
mod tier;
mod toolchain;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Builds, tests and shows ecmpvpn",
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Compile the eBPF programs into target/ebpf/ecmpvpn.o, which the program embeds
    BuildEbpf {
        /// Compiler to use [default: the first that fits: rustup's, then Debian's]
        #[arg(long, value_name = "TOOLCHAIN")]
        toolchain: Option<toolchain::ToolchainChoice>,
        /// Only show which toolchains are installed and whether they fit
        #[arg(long)]
        describe: bool,
    },
    /// Install what is missing on this machine: tools, the eBPF toolchain, cargo-deny, QEMU, the simulation's kernel
    #[command(after_help = "Examples:\n  \
        cargo xtask setup\n  \
        cargo xtask setup --check      (changes nothing)")]
    Setup(setup::Args),
    /// Build two sites on this machine, show ecmpvpn between them, and take everything down again
    #[command(after_help = "Examples:\n  \
        cargo xtask demo\n  \
        cargo xtask demo --sim     (kernel WireGuard, a real LACP bond, 3 links of 1 Gbit/s)")]
    Demo(demo::Args),
    /// Run every test, on this kernel, in the simulation and in emulated machines
    #[command(after_help = "Examples:\n  \
        cargo xtask test\n  \
        cargo xtask test --only unit\n  \
        cargo xtask test --only vm --kernel 6.1 --suite host -- undoes_the_earlier_ones")]
    Test(test::Args),
    /// Measure goodput between two sites, and the cost of planning and steering; run long tests
    #[command(after_help = "Examples:\n  \
        cargo xtask bench micro\n  \
        cargo xtask bench goodput\n  \
        cargo xtask bench goodput --case adaptive --runs 1 --seconds 6\n  \
        cargo xtask bench transport --profile equal --transport quic --seeds 1..3\n  \
        cargo xtask bench cycles --cycles 20")]
    Bench(bench::Args),
    /// Feed arbitrary bytes to everything that parses foreign input, each target for some seconds
    #[command(after_help = "Examples:\n  \
        cargo xtask fuzz\n  \
        cargo xtask fuzz config wg_quick --seconds 600")]
    Fuzz(fuzz::Args),
    /// Run a command or a suite in simulated time: a real kernel, WireGuard, bond and programs; only links take time
    #[command(after_help = "Examples:\n  \
        cargo xtask sim -- ip -V\n  \
        cargo xtask sim --suite failover -- blackholed\n  \
        cargo xtask sim --seed 7 -- target/release/ecmpvpn-bench --case adaptive\n  \
        cargo xtask sim        (a shell, in real time)")]
    Sim(sim::Args),
    /// Run a command in a virtual machine with a real kernel, or open a shell there
    #[command(after_help = "Examples:\n  \
        cargo xtask vm -- ip -V\n  \
        cargo xtask vm --kernel 6.1 --copy target/debug/ecmpvpn:/bin/ -- bash -c 'ecmpvpn --version; ip link'\n  \
        cargo xtask vm        (a shell)")]
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::BuildEbpf { describe: true, .. } => {
            println!("{}", toolchain::describe());
            Ok(0)
        }
        Task::BuildEbpf { toolchain, .. } => build_ebpf::build_ebpf(toolchain).map(|object| {
            eprintln!("{} is up to date", object.display());
            0
        }),
        Task::Setup(args) => setup::main(&args),
        Task::Demo(args) => demo::main(&args),
        Task::Test(args) => Ok(test::main(&args)),
        Task::Bench(args) => bench::main(args),
        Task::Fuzz(args) => fuzz::main(&args),
        Task::Sim(args) => sim::main(args),
        Task::Vm(args) => vm::main(args),
    };
    match done {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
