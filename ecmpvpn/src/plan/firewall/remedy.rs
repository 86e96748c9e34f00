//! Commands that let through what a chain could drop, for the program that manages the chain.

use super::need::{Need, list};
use super::ruleset::{Base, Chain, Family, Hook, Ruleset};
use crate::config::InterfaceName;

/// Who writes a chain's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manager {
    Firewalld,
    Ufw,
    Iptables,
    Nft,
}

/// What is to be mended.
#[derive(Clone, Copy, Debug)]
pub struct Remedy<'a> {
    pub ruleset: &'a Ruleset,
    pub chain: &'a Chain,
    pub base: Base,
    /// Whether a rule drops: then a rule behind it would be too late.
    pub by_rule: bool,
}

impl Remedy<'_> {
    /// What to do so that the chain lets `needs` pass.
    pub fn text(self, needs: &[Need]) -> String {
        let mut commands: Vec<String> = needs.iter().flat_map(|need| self.commands(need)).collect();
        if self.manager() == Manager::Firewalld {
            commands.push("firewall-cmd --reload".to_owned());
        }
        let commands: Vec<String> = commands.iter().map(|command| format!("`{command}`")).collect();
        format!("let it pass with {} (docs/firewall.md)", commands.join(" and "))
    }

    fn manager(self) -> Manager {
        let has = |name: &str| self.ruleset.chains.iter().any(|chain| chain.name == name);
        let is_iptables = self.chain.table == "filter" && self.chain.family != Family::Inet;
        match self.chain.name.as_str() {
            _ if self.chain.table == "firewalld" => Manager::Firewalld,
            "INPUT" | "FORWARD" if is_iptables && (has("ufw-user-input") || has("ufw6-user-input")) => Manager::Ufw,
            "INPUT" | "FORWARD" if is_iptables => Manager::Iptables,
            _ => Manager::Nft,
        }
    }

    fn commands(self, need: &Need) -> Vec<String> {
        match (self.manager(), need) {
            (Manager::Nft, need) => self.nft(need),
            (Manager::Iptables, need) => self.iptables(need),
            (Manager::Ufw, Need::Udp(ports)) => vec![format!("ufw allow proto udp to any port {}", commas(ports))],
            (Manager::Ufw, Need::Echo(tunnels)) => each(tunnels, |tunnel| format!("ufw allow in on {tunnel}")),
            (Manager::Ufw, Need::Forward(tunnels, device)) => {
                let mut commands = each(tunnels, |tunnel| format!("ufw route allow in on {tunnel}"));
                commands.push(format!("ufw route allow out on {device}"));
                commands
            }
            (Manager::Firewalld, Need::Udp(ports)) => {
                let ports: Vec<String> = ports.iter().map(|port| format!("--add-port={port}/udp")).collect();
                vec![format!("firewall-cmd --permanent {}", ports.join(" "))]
            }
            (Manager::Firewalld, Need::Echo(tunnels)) => vec![trusted(tunnels.iter())],
            // Between zones firewalld forwards only what a policy allows.
            (Manager::Firewalld, Need::Forward(tunnels, device)) => {
                let policy = |words: &str| format!("firewall-cmd --permanent {words}");
                vec![
                    trusted(tunnels.iter().chain([device])),
                    policy("--new-policy=to-vpn"),
                    policy("--policy=to-vpn --add-ingress-zone=ANY"),
                    policy("--policy=to-vpn --add-egress-zone=trusted"),
                    policy("--policy=to-vpn --set-target=ACCEPT"),
                ]
            }
        }
    }

    fn nft(self, need: &Need) -> Vec<String> {
        let verb = if self.by_rule { "insert" } else { "add" };
        let Chain { family, table, name, .. } = self.chain;
        let rule = |words: &str| format!("nft {verb} rule {} {table} {name} {words} accept", family.word());
        match need {
            Need::Udp(ports) => vec![rule(&format!("udp dport {}", set(ports)))],
            Need::Echo(tunnels) => {
                vec![rule(&format!("iifname {} icmp type {{ echo-request, echo-reply }}", set(tunnels)))]
            }
            Need::Forward(tunnels, device) => {
                vec![rule(&format!("iifname {}", set(tunnels))), rule(&format!("oifname {device}"))]
            }
        }
    }

    fn iptables(self, need: &Need) -> Vec<String> {
        let program = if self.chain.family == Family::Ipv6 { "ip6tables" } else { "iptables" };
        let chain = match self.base.hook {
            Hook::Input => "INPUT",
            Hook::Forward => "FORWARD",
        };
        let rule = |words: &str| format!("{program} -I {chain} {words} -j ACCEPT");
        match need {
            Need::Udp(ports) => vec![rule(&format!("-p udp -m multiport --dports {}", commas(ports)))],
            Need::Echo(tunnels) => each(tunnels, |tunnel| rule(&format!("-i {tunnel} -p icmp"))),
            Need::Forward(tunnels, device) => {
                let mut commands = each(tunnels, |tunnel| rule(&format!("-i {tunnel}")));
                commands.push(rule(&format!("-o {device}")));
                commands
            }
        }
    }
}

fn trusted<'a>(devices: impl Iterator<Item = &'a InterfaceName>) -> String {
    let devices: Vec<String> = devices.map(|device| format!("--add-interface={device}")).collect();
    format!("firewall-cmd --permanent --zone=trusted {}", devices.join(" "))
}

fn each(tunnels: &[InterfaceName], command: impl Fn(&InterfaceName) -> String) -> Vec<String> {
    tunnels.iter().map(command).collect()
}

/// As a set of nft; a single item needs no braces.
fn set<T: ToString>(items: &[T]) -> String {
    match items {
        [item] => item.to_string(),
        items => format!("{{ {} }}", list(items)),
    }
}

fn commas<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
