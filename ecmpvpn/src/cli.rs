//! The subcommands and most of their flags.

pub mod plan;
pub mod policy;
pub mod rotate;
pub mod site;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use ipnet::IpNet;

use crate::cli::plan::PlanArgs;
use crate::cli::policy::{ExplainArgs, PolicyArgs};
use crate::cli::rotate::RotateArgs;
use crate::cli::site::{SiteArgs, site_name};
use crate::config::{MAX_TUNNELS_PER_PEER, parse_prefix};
use crate::plan::init::{Members, Request};
use crate::plan::ports::{HIGHEST_BASE_PORT, LOWEST_PORT};

/// The configuration that is read unless `-c` names another file.
pub const DEFAULT_CONFIG: &str = "/etc/ecmpvpn/ecmpvpn.toml";

/// Steers traffic between sites over several WireGuard tunnels.
///
/// Joins two or more sites whose network ports are slower than the traffic between them. Several WireGuard tunnels run
/// over a bond. Their UDP ports are planned against the bond's own hash. An eBPF program puts each flow onto a tunnel.
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

    /// Log more; give it twice to log everything.
    ///
    /// The environment variable `ECMPVPN_LOG` overrides it. Its value is a list such as `warn,ecmpvpn=debug`.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,

    #[command(subcommand)]
    pub command: Command,
}

/// Each subcommand is carried out by the module of its name in `commands`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Validate a configuration without touching the kernel.
    ///
    /// Reports all problems at once, each with its line and the fix. Exits with 4 if there are any. Reads the
    /// configuration and the key files that it names, and needs no other privilege.
    #[command(
        after_help = "Example: sudo ecmpvpn check -c site-a/ecmpvpn.toml",
        after_long_help = "Example, in a deployment script:\n  sudo ecmpvpn check -c new.toml && install -m 644 new.toml /etc/ecmpvpn/ecmpvpn.toml"
    )]
    Check,

    /// Write the configurations and keys of both sites, with planned UDP ports.
    ///
    /// Makes one folder for each site. Each has `ecmpvpn.toml`, the site's private key, and the key that both sites
    /// share. Nothing that exists is overwritten: either both folders are written, or nothing is.
    ///
    /// With --from it reads this site's wg-quick files instead. It keeps their keys, plans the ports and reports what
    /// changes. It writes the folder of site A only, with a text that says what the other site must set.
    Init(Box<InitArgs>),

    /// Show each tunnel's bond member in both directions, and ports that spread better.
    ///
    /// With two endpoints on the command line it needs neither a configuration nor a privilege: it judges the ports of
    /// any set-up, or plans new ones. Without endpoints it shows the configured tunnels.
    Plan(PlanArgs),

    /// Bring everything up and keep it up; Ctrl-C or SIGTERM takes everything down again.
    ///
    /// Makes or reuses the bond, makes the tunnels and the steering device, routes the remote prefixes to this device,
    /// and attaches the steering program. If a step fails, the earlier steps are undone.
    ///
    /// Adopts a site that an earlier `run` left up, because that was killed or had --persist. Changes what differs from
    /// the configuration; with the kernel backend no packet is lost. SIGHUP and `ecmpvpn reload` apply a changed
    /// configuration.
    Run(RunArgs),

    /// Apply a changed configuration to a running `run`.
    ///
    /// Tunnels, prefixes, addresses, weights and keys are changed one tunnel at a time, while the others carry the
    /// traffic. If the configuration cannot be applied, nothing is changed and the reason is printed. Some keys take
    /// effect only when `run` is started again; these are named.
    Reload(ReloadArgs),

    /// Renew keys and pre-shared keys, tunnel by tunnel, without losing a packet.
    ///
    /// There are three steps. `rotate --prepare` here makes new keys, and a file for the other site. `rotate --apply
    /// FILE` at the other site takes this file. `rotate` here then changes one tunnel after the other, while the others
    /// carry the traffic. The rotation continues if this command is interrupted. If a tunnel does not come up with its
    /// new keys, it gets its former keys back, and the remaining tunnels are not changed. This renews the private keys
    /// of this site and the pre-shared keys. Do the same from the other site to renew that site's private keys.
    Rotate(RotateArgs),

    /// Keep what `run --confirm` brought up, or what `reload --confirm` changed.
    Confirm(ConfirmArgs),

    /// Remove everything that `run` made, and only that.
    ///
    /// Stops a running `ecmpvpn run` first. Also cleans up after a crash or a `run --persist`. Needs only the name of
    /// the site, not its configuration. It is not an error if there is nothing to remove.
    Down(DownArgs),

    /// Show the traffic through each tunnel.
    ///
    /// Reads the counters that the kernel keeps, so it does not need a running `ecmpvpn run`. Rates are measured over a
    /// quarter of a second.
    Stats(StatsArgs),

    /// Show and change how flows are steered, immediately and without a restart.
    ///
    /// Works on the maps in the kernel, so it does not need a running `ecmpvpn run`. No packet is lost. A change stays
    /// when `run` is started again. With --save the change is also written to the configuration.
    Policy(PolicyArgs),

    /// Show where a flow goes and why: rule, bucket, tunnel, bond member, and the tunnel that would be next.
    ///
    /// Makes the same decision as the steering program, on a copy of the maps in the kernel. Changes nothing.
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
    /// wg-quick files of site A's tunnels to site B, to be turned into a configuration.
    ///
    /// Both sites arrive at the same ports if both list their files in the same order of tunnels.
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

    /// Address of site A's gateway towards site B.
    #[arg(long, value_name = "ADDRESS")]
    pub a_endpoint: IpAddr,

    /// Address of site B's gateway towards site A; with --from, replaces a host name in the files.
    #[arg(long, value_name = "ADDRESS", required_unless_present = "from")]
    pub b_endpoint: Option<IpAddr>,

    /// Net behind site A, IPv4 or IPv6; repeat for each.
    #[arg(long = "a-prefix", value_name = "NET", required_unless_present = "from", value_delimiter = ',', value_parser = parse_prefix)]
    pub a_prefixes: Vec<IpNet>,

    /// Net behind site B, IPv4 or IPv6; repeat for each. With --from, replaces the `AllowedIPs` of the files.
    #[arg(long = "b-prefix", value_name = "NET", required_unless_present = "from", value_delimiter = ',', value_parser = parse_prefix)]
    pub b_prefixes: Vec<IpNet>,

    /// Number of tunnels.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = tunnel_count)]
    pub tunnels: u8,

    /// Interfaces that site A should bond, as `eno1,eno2`; or the number of members of its existing bond.
    ///
    /// If it is left out, the ports are planned for as many members as there are tunnels.
    #[arg(long, value_name = "NAMES|COUNT")]
    pub a_members: Option<Members>,

    /// Interfaces that site B should bond, as `eno1,eno2`; or the number of members of its existing bond.
    #[arg(long, value_name = "NAMES|COUNT")]
    pub b_members: Option<Members>,

    /// Address of site A's bond with its prefix length, as `10.2.3.4/24`; needed with --a-members NAMES.
    #[arg(long = "a-bond-address", value_name = "ADDRESS/LENGTH", requires = "a_members", value_delimiter = ',')]
    pub a_bond_addresses: Vec<IpNet>,

    /// Address of site B's bond with its prefix length; needed with --b-members NAMES.
    #[arg(long = "b-bond-address", value_name = "ADDRESS/LENGTH", requires = "b_members", value_delimiter = ',')]
    pub b_bond_addresses: Vec<IpNet>,

    /// Lowest UDP port to use, 1024 to 64511 [default: 51820; with --from, the lowest of the files].
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(i64::from(LOWEST_PORT)..=i64::from(HIGHEST_BASE_PORT)))]
    pub base_port: Option<u16>,

    /// MTU of the tunnels, bytes [default: 1420; with --from, that of the files].
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1280..=9000))]
    pub mtu: Option<u32>,

    /// Folder to write the two sites' folders into; created if it does not exist.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub output: PathBuf,
}

impl InitArgs {
    /// All options of `init` that the planner uses: all but the files and the output folder.
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

/// `run`
#[derive(Args, Clone, Copy, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn run -c site-a/ecmpvpn.toml",
    after_long_help = "Example, look first and then apply:\n  \
        sudo ecmpvpn run --dry-run -c site-a/ecmpvpn.toml\n  \
        sudo ecmpvpn run -c site-a/ecmpvpn.toml\n\n\
        Example, on a host far away, undone unless `ecmpvpn confirm` comes within a minute:\n  \
        sudo ecmpvpn run --confirm 60"
)]
pub struct RunArgs {
    /// Print what would change, and change nothing.
    #[arg(long)]
    pub dry_run: bool,

    /// Leave everything up on exit; the next `run` continues with it, `ecmpvpn down` removes it.
    #[arg(long, conflicts_with = "dry_run")]
    pub persist: bool,

    /// Undo everything, including the bond, unless `ecmpvpn confirm` comes within this many seconds.
    #[arg(long, value_name = "SECONDS", conflicts_with = "dry_run", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub confirm: Option<u32>,

    /// Also enslave the port that carries the default route or an SSH session, if the bond takes over its addresses.
    #[arg(long)]
    pub take_management_port: bool,
}

/// `reload`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn reload -c site-a/ecmpvpn.toml",
    after_long_help = "Example, in a deployment script:\n  \
        ecmpvpn check -c new.toml && install -m 644 new.toml /etc/ecmpvpn/ecmpvpn.toml && sudo ecmpvpn reload"
)]
pub struct ReloadArgs {
    /// Print what would be changed, and change nothing.
    #[arg(long, conflicts_with = "confirm")]
    pub dry_run: bool,

    /// Return to the former configuration unless `ecmpvpn confirm` is run within this many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub confirm: Option<u32>,

    #[command(flatten)]
    pub site: SiteArgs,
}

/// `confirm`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn confirm",
    after_long_help = "Example, on a host that is reached over the port to be bonded:\n  \
        sudo ecmpvpn run --take-management-port --confirm 60 &\n  \
        sudo ecmpvpn confirm        (in a new session, which shows that there is a way in)"
)]
pub struct ConfirmArgs {
    /// Set by `run --confirm`: undo everything of this site unless it is confirmed in time
    #[arg(long, value_name = "SITE", hide = true, requires = "within")]
    pub guard: Option<String>,
    /// Time limit of --guard, seconds
    #[arg(long, value_name = "SECONDS", hide = true, requires = "guard")]
    pub within: Option<u32>,

    #[command(flatten)]
    pub site: SiteArgs,
}

/// `down`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn down -c site-a/ecmpvpn.toml",
    after_long_help = "Example, after a crash or a `run --persist`:\n  sudo ecmpvpn down -c site-a/ecmpvpn.toml\n\n\
        Example, without a configuration that can be read:\n  sudo ecmpvpn down --site site-a"
)]
pub struct DownArgs {
    #[command(flatten)]
    pub site: SiteArgs,
}

/// `stats`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn stats --watch",
    after_long_help = "Example, the bytes that each tunnel has sent:\n  \
        sudo ecmpvpn stats --json | jq '.tunnels[] | {name, tx_bytes}'"
)]
pub struct StatsArgs {
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,

    /// Repeat every second until Ctrl-C, with rates; with --json, one JSON object a line.
    #[arg(long)]
    pub watch: bool,

    #[command(flatten)]
    pub site: SiteArgs,
}
