//! Every flag.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

/// Where the configuration is unless `-c` names another file.
pub const DEFAULT_CONFIG: &str = "/etc/ecmpvpn/ecmpvpn.toml";

/// Steers traffic between sites over several WireGuard tunnels.
///
/// Joins two or more sites over hosts whose network ports are slower than the traffic between the sites: several
/// WireGuard tunnels over a bond, their UDP ports planned against the bond's own hash, each flow put onto a tunnel
/// by an eBPF program.
#[derive(Debug, Parser)]
#[command(
    name = "ecmpvpn",
    version,
    after_help = "Example: sudo ecmpvpn run -c site-a/ecmpvpn.toml",
    after_long_help = "Example, from nothing to a running VPN:\n  \
        ecmpvpn init --a-endpoint 10.2.3.4 --a-prefix 10.10.0.0/16 \\\n    \
        --b-endpoint 10.5.6.7 --b-prefix 10.20.0.0/16\n  \
        sudo ecmpvpn run -c site-a/ecmpvpn.toml     (on the one host)\n  \
        sudo ecmpvpn run -c site-b/ecmpvpn.toml     (on the other)\n\n\
        Exit status: 0 done; 1 failed at run time; 2 wrong usage or configuration;\n\
        3 the host lacks something; 4 `check` found problems."
)]
pub struct Cli {
    /// Configuration of this site.
    #[arg(short, long, global = true, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    pub config: PathBuf,

    /// Log more; twice for everything.
    ///
    /// The environment variable `ECMPVPN_LOG` takes its place: a list such as `warn,ecmpvpn=debug`.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands; each is carried out by the module of its name in `commands`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Validate a configuration without touching the kernel.
    ///
    /// Tells every problem at once, each with its line and the fix, and exits with 4 where there are any. Reads the
    /// configuration and the key files that it names; needs no privilege beyond that.
    #[command(
        after_help = "Example: ecmpvpn check -c site-a/ecmpvpn.toml",
        after_long_help = "Example, in a deployment script:\n  ecmpvpn check -c new.toml && install -m 644 new.toml /etc/ecmpvpn/ecmpvpn.toml"
    )]
    Check,
}

/// `run`
#[derive(Args, Clone, Copy, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn run -c site-a/ecmpvpn.toml",
    after_long_help = "Example, first look and then leap:\n  \
        sudo ecmpvpn run --dry-run -c site-a/ecmpvpn.toml\n  \
        sudo ecmpvpn run -c site-a/ecmpvpn.toml"
)]
pub struct RunArgs {
    /// Print what would be changed, and change nothing.
    #[arg(long)]
    pub dry_run: bool,

    /// Leave everything up on exit; `ecmpvpn down` removes it.
    #[arg(long, conflicts_with = "dry_run")]
    pub persist: bool,
}

/// `down`
#[derive(Args, Clone, Copy, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn down -c site-a/ecmpvpn.toml",
    after_long_help = "Example, after a crash or a `run --persist`:\n  sudo ecmpvpn down -c site-a/ecmpvpn.toml"
)]
pub struct DownArgs {}

/// `stats`
#[derive(Args, Clone, Copy, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn stats --watch",
    after_long_help = "Example, the bytes that each tunnel has sent:\n  \
        sudo ecmpvpn stats --json | jq '.tunnels[] | {name, tx_bytes}'"
)]
pub struct StatsArgs {
    /// One JSON object on standard output.
    #[arg(long)]
    pub json: bool,

    /// Again every second until Ctrl-C, with rates; one JSON object a line with --json.
    #[arg(long)]
    pub watch: bool,
}
