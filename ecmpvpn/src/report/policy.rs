//! What `ecmpvpn policy` shows. The JSON is a contract: fields are only ever added.

use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::config::{self, Policy, port_range, protocol_name};

/// How a site steers.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The site's name.
    pub site: String,
    /// The remote sites.
    pub peers: Vec<Peer>,
    /// Rules and pins; the first that a packet meets counts.
    pub rules: Vec<Rule>,
}

/// One remote site.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// The policy of flows that meet no rule.
    pub policy: String,
    /// Whether the configuration says the same.
    pub saved: bool,
    /// Its tunnels.
    pub tunnels: Vec<Tunnel>,
}

/// One tunnel.
#[expect(clippy::struct_excessive_bools, reason = "each is a field of the output")]
#[derive(Clone, Debug, Serialize)]
pub struct Tunnel {
    /// Interface name.
    pub name: String,
    /// Share relative to the peer's other tunnels.
    pub weight: u16,
    /// Whether the weight is learned from what the tunnel delivers.
    pub weight_is_learned: bool,
    /// Whether it carries traffic.
    pub live: bool,
    /// Whether it takes new flows; false while it is drained.
    pub open: bool,
    /// Flow buckets whose packets go to it now.
    pub buckets: u64,
    /// The tunnel whose load counts for this one: another one where both leave by the same port.
    pub link: String,
    /// Whether the configuration says the same weight.
    pub saved: bool,
}

/// One rule or pin.
#[derive(Clone, Debug, Serialize)]
pub struct Rule {
    /// Counted from 1; `rule del` takes it.
    pub number: usize,
    /// Whether it pins flows to its one tunnel, and lets them go elsewhere only while that is down.
    pub pin: bool,
    /// Source prefix.
    pub src: Option<String>,
    /// Destination prefix.
    pub dst: Option<String>,
    /// IP protocol by name, or by number where it has none here.
    pub proto: Option<String>,
    /// Ports and ranges; empty: any.
    pub src_ports: Vec<String>,
    /// Ports and ranges; empty: any.
    pub dst_ports: Vec<String>,
    /// Differentiated services code point.
    pub dscp: Option<u8>,
    /// Firewall mark.
    pub fwmark: Option<u32>,
    /// What matching flows get; none: the peer's policy.
    pub policy: Option<String>,
    /// Tunnels allowed; empty: all.
    pub tunnels: Vec<String>,
    /// Whether the configuration has it.
    pub saved: bool,
}

impl Rule {
    /// Of a rule in force.
    pub fn of(number: usize, rule: &config::Rule, saved: bool) -> Self {
        let ports = |ranges: &[(u16, u16)]| ranges.iter().map(|range| port_range(*range)).collect();
        Self {
            number,
            pin: rule.pin,
            src: rule.src.map(|net| net.to_string()),
            dst: rule.dst.map(|net| net.to_string()),
            proto: rule.proto.map(protocol_name),
            src_ports: ports(&rule.src_ports),
            dst_ports: ports(&rule.dst_ports),
            dscp: rule.dscp,
            fwmark: rule.fwmark,
            policy: rule.policy.map(|policy| Policy::as_str(policy).to_owned()),
            tunnels: rule.tunnels.iter().map(ToString::to_string).collect(),
            saved,
        }
    }

    /// The flows that it asks for, in words.
    pub fn flows(&self) -> String {
        let mut words = Vec::new();
        let mut add = |name: &str, value: Option<String>| words.extend(value.map(|value| format!("{name} {value}")));
        let ports = |ports: &[String]| (!ports.is_empty()).then(|| ports.join(","));
        add("from", self.src.clone());
        add("to", self.dst.clone());
        add("proto", self.proto.clone());
        add("sports", ports(&self.src_ports));
        add("dports", ports(&self.dst_ports));
        add("dscp", self.dscp.map(|dscp| dscp.to_string()));
        add("fwmark", self.fwmark.map(|mark| format!("{mark:#x}")));
        if words.is_empty() { "all flows".to_owned() } else { words.join(" ") }
    }

    /// What is done with them, in words.
    pub fn action(&self) -> String {
        if self.pin {
            return format!("pinned to {}", self.tunnels.join(", "));
        }
        let policy = self.policy.clone().unwrap_or_else(|| "as the peer".to_owned());
        if self.tunnels.is_empty() { policy } else { format!("{policy}, only by {}", self.tunnels.join(", ")) }
    }
}

/// Marks what a restart would not bring back.
const UNSAVED: &str = "*";

impl Report {
    fn tunnel_table(&self) -> Table {
        let mut table = new_table(&["peer", "policy", "tunnel", "weight", "state", "new flows", "buckets", "link"]);
        for peer in &self.peers {
            for tunnel in &peer.tunnels {
                let auto = if tunnel.weight_is_learned { " (auto)" } else { "" };
                table.add_row([
                    Cell::new(&peer.name),
                    Cell::new(marked(&peer.policy, peer.saved)),
                    Cell::new(&tunnel.name),
                    right(marked(&format!("{}{auto}", tunnel.weight), tunnel.saved)),
                    Cell::new(if tunnel.live { "up" } else { "down" }),
                    Cell::new(if tunnel.open { "yes" } else { "no: drained" }),
                    right(tunnel.buckets),
                    Cell::new(&tunnel.link),
                ]);
            }
        }
        table
    }

    /// The rules alone.
    pub fn rule_table(&self) -> Table {
        let mut table = new_table(&["rule", "flows", "go"]);
        for rule in &self.rules {
            table.add_row([
                right(marked(&rule.number.to_string(), rule.saved)),
                Cell::new(rule.flows()),
                Cell::new(rule.action()),
            ]);
        }
        table
    }

    /// What the marks mean, where there are any.
    pub fn legend(&self) -> Option<&'static str> {
        let saved = self.peers.iter().all(|peer| peer.saved && peer.tunnels.iter().all(|tunnel| tunnel.saved))
            && self.rules.iter().all(|rule| rule.saved);
        (!saved).then_some("* is in force, but the configuration says otherwise; --save would have written it there")
    }
}

fn marked(text: &str, saved: bool) -> String {
    if saved { text.to_owned() } else { format!("{text}{UNSAVED}") }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.tunnel_table())?;
        if self.rules.is_empty() {
            write!(f, "\nno rules: every flow is steered by its peer's policy")?;
        } else {
            write!(f, "\n{}", self.rule_table())?;
        }
        self.legend().map_or(Ok(()), |legend| write!(f, "\n{legend}"))
    }
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header.iter().copied());
    table
}

fn right(value: impl fmt::Display) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}
