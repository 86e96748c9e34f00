//! Every flag.

pub mod plan;
pub mod policy;
pub mod rotate;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use ipnet::IpNet;

use crate::cli::plan::PlanArgs;
use crate::cli::policy::{ExplainArgs, PolicyArgs};
use crate::cli::rotate::RotateArgs;
use crate::config::{MAX_TUNNELS_PER_PEER, is_site_name, parse_prefix};
use crate::plan::init::{Members, Request};

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

    /// Write both sites' configurations and keys, UDP ports planned.
    ///
    /// Makes two folders, one a site, each with `ecmpvpn.toml`, the site's private key and the key that both share.
    /// Nothing that exists is overwritten: either both folders are written, or nothing is.
    ///
    /// With --from it reads this site's wg-quick files instead, keeps the keys in them, plans the ports, says what
    /// changes, and writes site A's folder only, with a text that says what the other site must set.
    Init(Box<InitArgs>),

    /// Show each tunnel's bond member in both directions, and ports that spread better.
    ///
    /// With two endpoints on the command line it needs neither a configuration nor a privilege: it judges the ports of
    /// any set-up, or plans new ones. Without them it shows the configured tunnels.
    Plan(PlanArgs),

    /// Bring everything up and keep it; Ctrl-C or SIGTERM takes it all down again.
    ///
    /// Makes or reuses the bond, makes the tunnels and the steering device, routes the remote prefixes to it, and
    /// attaches the steering program. Any step that fails undoes the earlier ones.
    ///
    /// What an earlier `run` has left, because it was killed or had --persist, is gone on with and changed where the
    /// configuration differs: with the kernel backend no packet is lost. SIGHUP and `ecmpvpn reload` apply a changed
    /// configuration.
    Run(RunArgs),

    /// Apply a changed configuration to a running `run`.
    ///
    /// Tunnels, prefixes, addresses, weights and keys are changed one tunnel at a time, while the others carry the
    /// traffic. What cannot be applied changes nothing, and the reason is told. Some keys need `run` to be started
    /// again; they are named.
    Reload(ReloadArgs),

    /// Renew keys and pre-shared keys, tunnel by tunnel, without losing a packet.
    ///
    /// In three steps: `rotate --prepare` here makes new keys, and the file for the other site; `rotate --apply FILE`
    /// there takes it; `rotate` here changes one tunnel after the other, while the others carry the traffic. It goes on
    /// by itself when this command is cut off. A tunnel that does not come back gets its former keys, and the rest is
    /// not touched. This renews this site's private keys and what both share; do the same from the other site for its.
    Rotate(RotateArgs),

    /// Keep what `run --confirm` brought up.
    Confirm(ConfirmArgs),

    /// Remove everything that `run` made, and only that.
    ///
    /// Stops a running `ecmpvpn run` first. Also cleans up after a crash or a `run --persist`. Nothing to remove is no
    /// error.
    Down(DownArgs),

    /// Show what goes through which tunnel.
    ///
    /// Reads the counters that the kernel keeps: it needs no running `ecmpvpn run`. Rates are measured over a quarter
    /// of a second.
    Stats(StatsArgs),

    /// Show and change how flows are steered, at once and without a restart.
    ///
    /// Works on what the kernel holds: it needs no running `ecmpvpn run`, no packet is lost, and what is changed stays
    /// when `run` is started again. With --save it is written to the configuration too.
    Policy(PolicyArgs),

    /// Tell where a flow goes and why: rule, bucket, tunnel, bond member, and the tunnel that would be next.
    ///
    /// Makes the very decision of the steering program on a copy of what the kernel holds; changes nothing.
    Explain(ExplainArgs),
}

/// `init`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: ecmpvpn init --a-endpoint 10.2.3.4 --a-prefix 10.10.0.0/16 \\\n           \
        --b-endpoint 10.5.6.7 --b-prefix 10.20.0.0/16",
    after_long_help = "Example, with a bond to be made at site A and one of four members that exists at site B:\n  \
        ecmpvpn init --output vpn --tunnels 4 \\\n    \
        --a-name berlin --a-endpoint 10.2.3.4 --a-prefix 10.10.0.0/16 --a-prefix fd00:10::/48 \\\n    \
        --a-members eno1,eno2,eno3 --a-bond-address 10.2.3.4/24 \\\n    \
        --b-name paris --b-endpoint 10.5.6.7 --b-prefix 10.20.0.0/16 --b-members 4\n\n\
        Example, on a gateway that has wg-quick tunnels with an ECMP route over them and a bond of two members:\n  \
        sudo ecmpvpn init --from /etc/wireguard/wg0.conf /etc/wireguard/wg1.conf \\\n    \
        --a-endpoint 10.2.3.4 --a-members 2 --b-members 2"
)]
pub struct InitArgs {
    /// wg-quick files of the tunnels that site A has to site B, to be turned into a configuration.
    ///
    /// Both sites come to the same ports when both name their files in the same order of tunnels.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        conflicts_with_all = ["a_prefixes", "tunnels", "b_bond_addresses"],
    )]
    pub from: Vec<PathBuf>,

    /// Name of site A.
    #[arg(long, value_name = "NAME", default_value = "site-a", value_parser = site_name)]
    pub a_name: String,

    /// Name of site B.
    #[arg(long, value_name = "NAME", default_value = "site-b", value_parser = site_name)]
    pub b_name: String,

    /// Address that site A's gateway has towards site B.
    #[arg(long, value_name = "ADDRESS")]
    pub a_endpoint: IpAddr,

    /// Address that site B's gateway has towards site A; with --from, in place of a name in the files.
    #[arg(long, value_name = "ADDRESS", required_unless_present = "from")]
    pub b_endpoint: Option<IpAddr>,

    /// Net behind site A, IPv4 or IPv6; repeat for each.
    #[arg(long = "a-prefix", value_name = "NET", required_unless_present = "from", value_delimiter = ',', value_parser = parse_prefix)]
    pub a_prefixes: Vec<IpNet>,

    /// Net behind site B, IPv4 or IPv6; repeat for each. With --from, in place of the files' `AllowedIPs`.
    #[arg(long = "b-prefix", value_name = "NET", required_unless_present = "from", value_delimiter = ',', value_parser = parse_prefix)]
    pub b_prefixes: Vec<IpNet>,

    /// Number of tunnels.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = tunnel_count)]
    pub tunnels: u8,

    /// Interfaces that site A shall bond, as `eno1,eno2`; or how many members its bond has already.
    ///
    /// Left out, the ports are planned for as many members as there are tunnels.
    #[arg(long, value_name = "NAMES|COUNT")]
    pub a_members: Option<Members>,

    /// Interfaces that site B shall bond, as `eno1,eno2`; or how many members its bond has already.
    #[arg(long, value_name = "NAMES|COUNT")]
    pub b_members: Option<Members>,

    /// Address of site A's bond with its prefix length, as `10.2.3.4/24`; needed with --a-members NAMES.
    #[arg(long = "a-bond-address", value_name = "ADDRESS/LENGTH", requires = "a_members", value_delimiter = ',')]
    pub a_bond_addresses: Vec<IpNet>,

    /// Address of site B's bond with its prefix length; needed with --b-members NAMES.
    #[arg(long = "b-bond-address", value_name = "ADDRESS/LENGTH", requires = "b_members", value_delimiter = ',')]
    pub b_bond_addresses: Vec<IpNet>,

    /// Lowest UDP port to use [default: 51820; with --from, the lowest of the files].
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1024..))]
    pub base_port: Option<u16>,

    /// MTU of the tunnels, bytes [default: 1420; with --from, that of the files].
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1280..=9000))]
    pub mtu: Option<u32>,

    /// Folder to write the two sites' folders into; made if it does not exist.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub output: PathBuf,
}

impl InitArgs {
    /// What is asked for, without the files.
    pub fn request(&self) -> Request {
        Request {
            a_name: self.a_name.clone(),
            b_name: self.b_name.clone(),
            a_endpoint: self.a_endpoint,
            b_endpoint: self.b_endpoint,
            a_prefixes: self.a_prefixes.clone(),
            b_prefixes: self.b_prefixes.clone(),
            tunnels: self.tunnels,
            a_members: self.a_members.clone(),
            b_members: self.b_members.clone(),
            a_bond_addresses: self.a_bond_addresses.clone(),
            b_bond_addresses: self.b_bond_addresses.clone(),
            base_port: self.base_port,
            mtu: self.mtu,
        }
    }
}

fn tunnel_count(text: &str) -> Result<u8, String> {
    let count = text.parse().ok().filter(|count| (1..=MAX_TUNNELS_PER_PEER).contains(&usize::from(*count)));
    count.ok_or_else(|| format!("give 1 to {MAX_TUNNELS_PER_PEER}"))
}

fn site_name(text: &str) -> Result<String, String> {
    let rule = "give 1 to 32 letters, digits, dots, dashes or underscores, no dot first";
    if is_site_name(text) { Ok(text.to_owned()) } else { Err(rule.to_owned()) }
}

/// `run`
#[derive(Args, Clone, Copy, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn run -c site-a/ecmpvpn.toml",
    after_long_help = "Example, first look and then leap:\n  \
        sudo ecmpvpn run --dry-run -c site-a/ecmpvpn.toml\n  \
        sudo ecmpvpn run -c site-a/ecmpvpn.toml\n\n\
        Example, on a host far away, undone unless `ecmpvpn confirm` comes within a minute:\n  \
        sudo ecmpvpn run --confirm 60"
)]
pub struct RunArgs {
    /// Print what would be changed, and change nothing.
    #[arg(long)]
    pub dry_run: bool,

    /// Leave everything up on exit; the next `run` goes on with it, `ecmpvpn down` removes it.
    #[arg(long, conflicts_with = "dry_run")]
    pub persist: bool,

    /// Undo everything, the bond included, unless `ecmpvpn confirm` comes within so many seconds.
    #[arg(long, value_name = "SECONDS", conflicts_with = "dry_run", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub confirm: Option<u32>,

    /// Enslave also the port that carries the default route or an SSH session, if the bond takes its addresses over.
    #[arg(long)]
    pub take_management_port: bool,
}

/// `reload`
#[derive(Args, Clone, Copy, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn reload -c site-a/ecmpvpn.toml",
    after_long_help = "Example, in a deployment script:\n  \
        ecmpvpn check -c new.toml && install -m 644 new.toml /etc/ecmpvpn/ecmpvpn.toml && sudo ecmpvpn reload"
)]
pub struct ReloadArgs {}

/// `confirm`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn confirm",
    after_long_help = "Example, on a host that is reached over the port to be bonded:\n  \
        sudo ecmpvpn run --take-management-port --confirm 60 &\n  \
        sudo ecmpvpn confirm        (in a new session, which shows that there is a way in)"
)]
pub struct ConfirmArgs {
    /// Of `run --confirm`: undo everything of this site unless it is confirmed in time
    #[arg(long, value_name = "SITE", hide = true, requires = "within")]
    pub guard: Option<String>,
    /// Seconds
    #[arg(long, value_name = "SECONDS", hide = true, requires = "guard")]
    pub within: Option<u32>,
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
