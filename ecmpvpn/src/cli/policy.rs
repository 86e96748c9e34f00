//! The flags of `policy` and `explain`.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use ipnet::IpNet;

use super::site::{SiteArgs, site_name};
use crate::config::{InterfaceName, MAX_WEIGHT, Policy, parse_ports, parse_prefix, parse_protocol};

/// `policy`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn policy show",
    after_long_help = "Example, bulk copies over all tunnels at once, and one host kept on one tunnel:\n  \
        sudo ecmpvpn policy rule add --proto tcp --dports 873 --policy spray --save\n  \
        sudo ecmpvpn policy pin wg1 --dst 10.20.0.7\n  \
        sudo ecmpvpn policy show"
)]
pub struct PolicyArgs {
    #[command(subcommand)]
    pub action: PolicyAction,

    /// The site, if its configuration cannot be read [default: the name in the configuration].
    #[arg(long, global = true, value_name = "NAME", value_parser = site_name)]
    pub site: Option<String>,
}

#[derive(Clone, Debug, Subcommand)]
pub enum PolicyAction {
    /// Show the policies, weights, tunnels, rules and pins that are in force.
    #[command(
        after_help = "Example: sudo ecmpvpn policy show --json",
        after_long_help = "Example, the tunnels that are being drained:\n  \
            sudo ecmpvpn policy show --json | jq '.peers[].tunnels[] | select(.open | not).name'"
    )]
    Show(JsonArgs),

    /// Set the policy of all peers, or of one.
    ///
    /// One of hash, flowlet, adaptive or spray. It applies to flows that no rule gives another policy.
    #[command(
        after_help = "Example: sudo ecmpvpn policy set adaptive",
        after_long_help = "Example, one remote site by hash alone, for good:\n  \
            sudo ecmpvpn policy set hash --peer site-b --save"
    )]
    Set(SetArgs),

    /// Restore the order of sprayed flows, or leave it, for all peers or for one.
    ///
    /// Applies to both directions within a second. With `off` only TCP is sprayed, unless a rule names another protocol.
    /// To keep single flows in order without holding them, give them a rule with the policy flowlet or hash. What
    /// [steering] says of `restore_order` comes first: where it is false, `on` changes nothing.
    #[command(
        after_help = "Example: sudo ecmpvpn policy order off --peer site-b",
        after_long_help = "Example, one remote site's packets as they arrive, for good:\n  \
            sudo ecmpvpn policy order off --peer site-b --save"
    )]
    Order(OrderArgs),

    /// Set a tunnel's share of the flows.
    ///
    /// Relative to the peer's other tunnels, 1 to 1000. With `auto` the weight is learned from what the tunnel
    /// delivers. Only as many flows move as the new shares need, each when it pauses.
    #[command(
        after_help = "Example: sudo ecmpvpn policy weight wg0 2",
        after_long_help = "Example, a tunnel over a port of half the rate:\n  sudo ecmpvpn policy weight wg2 1\n  \
            sudo ecmpvpn policy weight wg0 2\n  sudo ecmpvpn policy weight wg1 2"
    )]
    Weight(WeightArgs),

    /// Take a tunnel out of use without losing a packet.
    ///
    /// The tunnel takes no new flows from now on, and its flows leave it when they pause. The command waits until none
    /// is left. At the deadline the remaining flows are moved too, which may reorder some of their packets. Ctrl-C ends
    /// the waiting and leaves the tunnel closed to new flows; `undrain` opens it again.
    #[command(
        after_help = "Example: sudo ecmpvpn policy drain wg1",
        after_long_help = "Example, before maintenance of a path, within ten seconds:\n  \
            sudo ecmpvpn policy drain wg1 --deadline 10 && ip link set wg1 down"
    )]
    Drain(DrainArgs),

    /// Let a drained tunnel take flows again.
    #[command(
        after_help = "Example: sudo ecmpvpn policy undrain wg1",
        after_long_help = "Example, after maintenance:\n  sudo ecmpvpn policy undrain wg1 && sudo ecmpvpn policy show"
    )]
    Undrain(UndrainArgs),

    /// Add, delete or list rules.
    #[command(
        after_help = "Example: sudo ecmpvpn policy rule list",
        after_long_help = "Example, voice by hash on two tunnels, before all other rules:\n  \
            sudo ecmpvpn policy rule add --dscp 46 --policy hash --tunnels wg0,wg1 --at 1"
    )]
    Rule(RuleArgs),

    /// Keep flows on one tunnel.
    ///
    /// Other tunnels are used only while this one is down. A pin comes before all rules. Name the flows, or give --all.
    #[command(
        after_help = "Example: sudo ecmpvpn policy pin wg1 --dst 10.20.0.7",
        after_long_help = "Example, one connection:\n  sudo ecmpvpn policy pin wg1 --src 10.10.0.5 --dst 10.20.0.7 \
            --proto tcp --sports 40000 --dports 443"
    )]
    Pin(PinArgs),

    /// Remove a pin; name the same flows as for `pin`.
    #[command(
        after_help = "Example: sudo ecmpvpn policy unpin --dst 10.20.0.7",
        after_long_help = "Example, one connection:\n  sudo ecmpvpn policy unpin --src 10.10.0.5 --dst 10.20.0.7 \
            --proto tcp --sports 40000 --dports 443"
    )]
    Unpin(UnpinArgs),

    /// Carry out commands from a file or standard input, one a line.
    ///
    /// A line is what would follow `ecmpvpn policy`. Empty lines and lines that begin with # are skipped. Each command
    /// is in force before the next line is read, so another program can steer through a pipe. Stops at the first
    /// command that fails; the earlier ones stay in force.
    #[command(
        after_help = "Example: sudo ecmpvpn policy batch night.policy",
        after_long_help = "Example, two changes and what came of them:\n  \
            printf '%s\\n' 'set spray' 'weight wg0 2' 'show --json' | sudo ecmpvpn policy batch -"
    )]
    Batch(BatchArgs),
}

/// `policy batch`
#[derive(Args, Clone, Debug)]
pub struct BatchArgs {
    /// File with the commands; - is standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Of commands that print a report.
#[derive(Args, Clone, Copy, Debug)]
pub struct JsonArgs {
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Of commands that change something.
#[derive(Args, Clone, Copy, Debug)]
pub struct SaveArgs {
    /// Also write the change to the configuration; its comments are kept.
    #[arg(long)]
    pub save: bool,
}

/// `policy set`
#[derive(Args, Clone, Debug)]
pub struct SetArgs {
    /// hash, flowlet, adaptive or spray.
    #[arg(value_parser = policy)]
    pub policy: Policy,

    /// Only for this remote site.
    #[arg(long, value_name = "NAME")]
    pub peer: Option<String>,

    #[command(flatten)]
    pub save: SaveArgs,
}

/// `policy order`
#[derive(Args, Clone, Debug)]
pub struct OrderArgs {
    /// on or off.
    pub order: Order,

    /// Only for this remote site.
    #[arg(long, value_name = "NAME")]
    pub peer: Option<String>,

    #[command(flatten)]
    pub save: SaveArgs,
}

/// Whether the order of sprayed flows is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// Packets are held until their turn.
    On,
    /// Packets go on as they arrive.
    Off,
}

/// `policy weight`
#[derive(Args, Clone, Debug)]
pub struct WeightArgs {
    /// The tunnel's interface.
    #[arg(value_parser = tunnel)]
    pub tunnel: InterfaceName,

    /// 1 to 1000, or auto.
    #[arg(value_parser = weight)]
    pub weight: Weight,

    #[command(flatten)]
    pub save: SaveArgs,
}

/// `None`: to be learned.
#[derive(Clone, Copy, Debug)]
pub struct Weight(pub Option<u16>);

/// `policy drain`
#[derive(Args, Clone, Debug)]
pub struct DrainArgs {
    /// The tunnel's interface.
    #[arg(value_parser = tunnel)]
    pub tunnel: InterfaceName,

    /// Move flows that have not paused after this many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub deadline: u32,
}

/// `policy undrain`
#[derive(Args, Clone, Debug)]
pub struct UndrainArgs {
    /// The tunnel's interface.
    #[arg(value_parser = tunnel)]
    pub tunnel: InterfaceName,
}

/// `policy rule`
#[derive(Args, Clone, Debug)]
pub struct RuleArgs {
    #[command(subcommand)]
    pub action: RuleAction,
}

#[derive(Clone, Debug, Subcommand)]
pub enum RuleAction {
    /// Add a rule, by default after all others.
    #[command(
        after_help = "Example: sudo ecmpvpn policy rule add --proto tcp --dports 873 --policy spray",
        after_long_help = "Example, before all other rules:\n  \
            sudo ecmpvpn policy rule add --dscp 46 --policy hash --tunnels wg0,wg1 --at 1 --save"
    )]
    Add(RuleAddArgs),

    /// Delete a rule or pin by its number.
    #[command(
        visible_alias = "delete",
        after_help = "Example: sudo ecmpvpn policy rule del 2",
        after_long_help = "Example, from the configuration too:\n  sudo ecmpvpn policy rule del 2 --save"
    )]
    Del(RuleDelArgs),

    /// List rules and pins with their numbers; the first rule that matches a packet applies.
    #[command(
        after_help = "Example: sudo ecmpvpn policy rule list",
        after_long_help = "Example, the rules that a restart would not bring back:\n  \
            sudo ecmpvpn policy rule list --json | jq '.[] | select(.saved | not)'"
    )]
    List(JsonArgs),
}

/// The flows that a rule or pin matches; what is left out matches everything.
#[derive(Args, Clone, Debug)]
pub struct FlowArgs {
    /// Source net or address, inside the VPN.
    #[arg(long, value_name = "NET", value_parser = net)]
    pub src: Option<IpNet>,

    /// Destination net or address.
    #[arg(long, value_name = "NET", value_parser = net)]
    pub dst: Option<IpNet>,

    /// Protocol by name or number.
    #[arg(long, value_name = "PROTO", value_parser = parse_protocol)]
    pub proto: Option<u8>,

    /// Source ports and ranges, as `873,8000-8999`.
    #[arg(long, visible_alias = "sport", value_name = "PORTS", value_delimiter = ',', value_parser = parse_ports)]
    pub sports: Vec<(u16, u16)>,

    /// Destination ports and ranges.
    #[arg(long, visible_alias = "dport", value_name = "PORTS", value_delimiter = ',', value_parser = parse_ports)]
    pub dports: Vec<(u16, u16)>,

    /// Differentiated services code point.
    #[arg(long, value_name = "0-63", value_parser = clap::value_parser!(u8).range(0..=63))]
    pub dscp: Option<u8>,

    /// Firewall mark, decimal or with 0x.
    #[arg(long, value_name = "MARK", value_parser = mark)]
    pub fwmark: Option<u32>,
}

/// `policy rule add`
#[derive(Args, Clone, Debug)]
pub struct RuleAddArgs {
    #[command(flatten)]
    pub flows: FlowArgs,

    /// hash, flowlet, adaptive or spray; if left out, the peer's policy.
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    pub policy: Option<Policy>,

    /// Tunnels allowed, as `wg0,wg1`; while none of them is up, the flows are dropped.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = tunnel)]
    pub tunnels: Vec<InterfaceName>,

    /// Number of the new rule; the rules from this number on move back by one.
    #[arg(long, value_name = "NUMBER", value_parser = number)]
    pub at: Option<usize>,

    #[command(flatten)]
    pub save: SaveArgs,
}

/// `policy rule del`
#[derive(Args, Clone, Debug)]
pub struct RuleDelArgs {
    /// The number that `list` shows.
    #[arg(value_parser = number)]
    pub number: usize,

    #[command(flatten)]
    pub save: SaveArgs,
}

/// `policy pin`
#[derive(Args, Clone, Debug)]
pub struct PinArgs {
    /// The tunnel's interface.
    #[arg(value_parser = tunnel)]
    pub tunnel: InterfaceName,

    #[command(flatten)]
    pub flows: FlowArgs,

    /// Pin every flow.
    #[arg(long, conflicts_with_all = ["src", "dst", "proto", "sports", "dports", "dscp", "fwmark"])]
    pub all: bool,

    #[command(flatten)]
    pub save: SaveArgs,
}

/// `policy unpin`
#[derive(Args, Clone, Debug)]
pub struct UnpinArgs {
    #[command(flatten)]
    pub flows: FlowArgs,

    /// Remove the pin of every flow, as without any flow.
    #[arg(long, conflicts_with_all = ["src", "dst", "proto", "sports", "dports", "dscp", "fwmark"])]
    pub all: bool,

    #[command(flatten)]
    pub save: SaveArgs,
}

/// `explain`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: sudo ecmpvpn explain 10.10.0.5 10.20.0.7 --sport 40000 --dport 443",
    after_long_help = "Example, the tunnel alone:\n  \
        sudo ecmpvpn explain 10.10.0.5 10.20.0.7 --sport 40000 --dport 443 --json | jq -r .tunnel"
)]
pub struct ExplainArgs {
    /// Source address, inside the VPN.
    #[arg(value_name = "SRC")]
    pub src: IpAddr,

    /// Destination address.
    #[arg(value_name = "DST")]
    pub dst: IpAddr,

    /// Protocol by name or number.
    #[arg(long, value_name = "PROTO", default_value = "tcp", value_parser = parse_protocol)]
    pub proto: u8,

    /// Source port; needed for a protocol that has ports.
    #[arg(long, value_name = "PORT")]
    pub sport: Option<u16>,

    /// Destination port; needed for a protocol that has ports.
    #[arg(long, value_name = "PORT")]
    pub dport: Option<u16>,

    /// SPI, GRE key, or identifier of ICMP echo.
    #[arg(long, value_name = "ID", default_value = "0", value_parser = mark)]
    pub id: u32,

    /// Differentiated services code point.
    #[arg(long, value_name = "0-63", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=63))]
    pub dscp: u8,

    /// Firewall mark, decimal or with 0x.
    #[arg(long, visible_alias = "fwmark", value_name = "MARK", default_value = "0", value_parser = mark)]
    pub mark: u32,

    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub site: SiteArgs,
}

fn policy(text: &str) -> Result<Policy, String> {
    let known = Policy::ALL.iter().copied().find(|policy| policy.as_str() == text);
    known.ok_or_else(|| {
        let words: Vec<&str> = Policy::ALL.iter().map(|policy| policy.as_str()).collect();
        format!("give one of {}", words.join(", "))
    })
}

fn weight(text: &str) -> Result<Weight, String> {
    if text == "auto" {
        return Ok(Weight(None));
    }
    let number = text.parse().ok().filter(|number| (1..=MAX_WEIGHT).contains(number));
    number.map(|number| Weight(Some(number))).ok_or_else(|| format!("give 1 to {MAX_WEIGHT}, or auto"))
}

fn tunnel(text: &str) -> Result<InterfaceName, String> {
    InterfaceName::new(text).map_err(|why| format!("{text:?} {why}: give a tunnel's interface name"))
}

/// Parses a net, or an address as a net of this one host.
fn net(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => parse_prefix(&IpNet::from(address).to_string()),
        Err(_) => parse_prefix(text),
    }
}

fn mark(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("{text:?}: give 0 to {}, decimal or hexadecimal with 0x", u32::MAX))
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "give a number from 1 on".to_owned())
}
