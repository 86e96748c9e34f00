//! The output of `ecmpvpn policy`. The JSON is a contract: fields are only ever added.

use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::config::{self, Policy, port_range, protocol_name};

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub site: String,
    pub peers: Vec<Peer>,
    /// Rules and pins, in order; the first match applies.
    pub rules: Vec<Rule>,
    /// Whether there is a configuration to compare with. If there is none, nothing is saved, and nothing is marked.
    #[serde(skip)]
    pub is_compared: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    pub name: String,
    /// The policy of flows that no rule matches.
    pub policy: String,
    /// Whether the configuration has the same policy.
    pub saved: bool,
    /// Whether the order of sprayed flows may be restored: `policy order`.
    pub restore_order: bool,
    /// Whether the configuration has the same.
    pub restore_order_saved: bool,
    pub tunnels: Vec<Tunnel>,
}

#[expect(clippy::struct_excessive_bools, reason = "each is a field of the output")]
#[derive(Clone, Debug, Serialize)]
pub struct Tunnel {
    pub name: String,
    /// Share relative to the peer's other tunnels.
    pub weight: u16,
    /// Whether the weight is learned from what the tunnel delivers.
    pub weight_is_learned: bool,
    /// Whether it is up.
    pub live: bool,
    /// Whether it takes new flows; false while it is drained.
    pub open: bool,
    /// Number of flow buckets that are on it now.
    pub buckets: u64,
    /// The tunnel whose load counts for this one. It is another tunnel if both leave by the same port.
    pub link: String,
    /// Whether the configuration has the same weight.
    pub saved: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Rule {
    /// Counted from 1; the number for `rule del`.
    pub number: usize,
    /// Whether it pins flows to its only tunnel. They use other tunnels only while this one is down.
    pub pin: bool,
    pub src: Option<String>,
    pub dst: Option<String>,
    /// IP protocol by name, or by number if ecmpvpn has no name for it.
    pub proto: Option<String>,
    /// Ports and ranges; empty: any.
    pub src_ports: Vec<String>,
    /// Ports and ranges; empty: any.
    pub dst_ports: Vec<String>,
    /// Differentiated services code point.
    pub dscp: Option<u8>,
    pub fwmark: Option<u32>,
    /// Policy of matching flows. `null`: the peer's policy.
    pub policy: Option<String>,
    /// Allowed tunnels; empty: all.
    pub tunnels: Vec<String>,
    /// Whether the configuration has this rule.
    pub saved: bool,
}

impl Rule {
    /// The output for a rule in force.
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

    /// Describes the flows that it matches.
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

    /// Describes what happens to these flows.
    pub fn action(&self) -> String {
        if self.pin {
            return format!("pinned to {}", self.tunnels.join(", "));
        }
        let policy = self.policy.clone().unwrap_or_else(|| "as the peer".to_owned());
        if self.tunnels.is_empty() { policy } else { format!("{policy}, only by {}", self.tunnels.join(", ")) }
    }
}

/// Marks a setting that is lost at a restart.
const UNSAVED: &str = "*";

impl Report {
    fn tunnel_table(&self) -> Table {
        let mut table = new_table(&["peer", "policy", "tunnel", "weight", "state", "new flows", "buckets", "link"]);
        for peer in &self.peers {
            for tunnel in &peer.tunnels {
                let auto = if tunnel.weight_is_learned { " (auto)" } else { "" };
                table.add_row([
                    Cell::new(&peer.name),
                    Cell::new(self.marked(&peer.policy, peer.saved)),
                    Cell::new(&tunnel.name),
                    right_aligned(self.marked(&format!("{}{auto}", tunnel.weight), tunnel.saved)),
                    Cell::new(if tunnel.live { "up" } else { "down" }),
                    Cell::new(if tunnel.open { "yes" } else { "no: drained" }),
                    right_aligned(tunnel.buckets),
                    Cell::new(&tunnel.link),
                ]);
            }
        }
        table
    }

    fn marked(&self, text: &str, saved: bool) -> String {
        if saved || !self.is_compared { text.to_owned() } else { format!("{text}{UNSAVED}") }
    }

    /// The table of rules only.
    pub fn rule_table(&self) -> Table {
        let mut table = new_table(&["rule", "flows", "go"]);
        for rule in &self.rules {
            table.add_row([
                right_aligned(self.marked(&rule.number.to_string(), rule.saved)),
                Cell::new(rule.flows()),
                Cell::new(rule.action()),
            ]);
        }
        table
    }

    /// Explains the mark `*`, if the report has one.
    pub fn legend(&self) -> Option<&'static str> {
        let saved = self.peers.iter().all(|peer| peer.saved && peer.tunnels.iter().all(|tunnel| tunnel.saved))
            && self.rules.iter().all(|rule| rule.saved);
        (self.is_compared && !saved)
            .then_some("* is in force, but the configuration says otherwise; --save would have written it there")
    }
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

fn right_aligned(value: impl fmt::Display) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}
