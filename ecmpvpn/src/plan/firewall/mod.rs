//! What a firewall must let pass, and whether the packet filter's rules could drop it. Pure: `host::firewall` reads the
//! rules.

mod evaluate;
mod need;
mod packet;
mod remedy;
pub mod ruleset;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use evaluate::fates;
use need::{Need, list, plural};
use packet::{Content, ESTABLISHED, NEW, Packet};
use remedy::Remedy;
use ruleset::{Base, Chain, Hook, Ruleset};

use super::{Plan, Tunnel, far_address};
use crate::config::InterfaceName;

/// A base chain that could drop what must pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The chain, for example `input of table inet filter (hook input, priority 0, policy drop)`.
    pub chain: String,
    /// What it could drop.
    pub what: String,
    /// How to let it pass.
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the firewall's chain {} could drop {}: {}", self.chain, self.what, self.remedy)
    }
}

/// Says in a sentence what a firewall of this host must let pass.
pub fn needed(plan: &Plan) -> String {
    let mut ports: BTreeMap<(IpAddr, IpAddr), Vec<u16>> = BTreeMap::new();
    for tunnel in &plan.tunnels {
        ports.entry((tunnel.local_endpoint, tunnel.remote_endpoint.ip())).or_default().push(tunnel.listen_port);
    }
    let udp: Vec<String> = ports
        .iter()
        .map(|((local, remote), ports)| {
            let from = if remote.is_unspecified() { String::new() } else { format!(" from {remote}") };
            let too_big = if local.is_ipv4() { "ICMP fragmentation-needed" } else { "ICMPv6 packet-too-big" };
            format!("UDP{from} to {local} {} {}, {too_big} to {local}", plural(ports, "port"), list(ports))
        })
        .collect();
    let tunnels: Vec<&InterfaceName> = plan.tunnels.iter().map(|tunnel| &tunnel.name).collect();
    format!(
        "a firewall must let pass: {}, ICMP echo on {}, and what is forwarded to {} or comes from the tunnels",
        udp.join(", "),
        list(&tunnels),
        plan.steering.name
    )
}

/// The base chains that could drop what `plan` needs, and what to add to them.
pub fn findings(plan: &Plan, ruleset: &Ruleset) -> Vec<Finding> {
    let finding = |chain: &Chain| {
        let base = chain.base?;
        let (needs, by_rule) = match base.hook {
            Hook::Input => input_needs(plan, ruleset, chain, base),
            Hook::Forward => forward_needs(plan, ruleset, chain, base),
        };
        let what: Vec<String> = needs.iter().map(ToString::to_string).collect();
        (!needs.is_empty()).then(|| Finding {
            chain: describe(chain, base),
            what: what.join(" and "),
            remedy: Remedy { ruleset, chain, base, by_rule }.text(&needs),
        })
    };
    ruleset.chains.iter().filter_map(finding).collect()
}

fn describe(chain: &Chain, base: Base) -> String {
    let policy = if base.drops { "policy drop" } else { "policy accept, but a rule drops" };
    let (family, table, hook) = (chain.family.word(), &chain.table, base.hook.word());
    format!("{} of table {family} {table} (hook {hook}, priority {}, {policy})", chain.name, base.priority)
}

/// What a chain does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Passage {
    /// Whether it could drop the first packet of a connection; if so, whether a rule does that.
    first: Option<bool>,
    /// Whether it could drop a packet of a known connection.
    later: bool,
}

impl Passage {
    const OPEN: Self = Self { first: None, later: false };

    const fn is_open(self) -> bool {
        self.first.is_none()
    }

    const fn is_closed(self) -> bool {
        self.first.is_some() && self.later
    }

    const fn is_by_rule(self) -> bool {
        matches!(self.first, Some(true))
    }
}

fn passage(ruleset: &Ruleset, chain: &Chain, base: Base, packet: Packet<'_>) -> Passage {
    if !chain.family.sees(packet.is_ipv4) {
        return Passage::OPEN;
    }
    let dropped = |state| {
        let fates = fates(ruleset, chain, &Packet { state, ..packet });
        (fates.drops || fates.falls && base.drops).then_some(fates.drops)
    };
    Passage { first: dropped(NEW), later: dropped(ESTABLISHED).is_some() }
}

/// The needs that an input chain does not meet, and whether a rule drops one of them.
fn input_needs(plan: &Plan, ruleset: &Ruleset, chain: &Chain, base: Base) -> (Vec<Need>, bool) {
    let bond = plan.bond.as_ref().map(|bond| bond.name.as_str());
    let known = |address: IpAddr| Some(address).filter(|address| !address.is_unspecified());
    let udp: Vec<(u16, Passage)> = plan
        .tunnels
        .iter()
        .map(|tunnel| {
            let packet = Packet {
                is_ipv4: tunnel.local_endpoint.is_ipv4(),
                source: known(tunnel.remote_endpoint.ip()),
                destination: known(tunnel.local_endpoint),
                content: Content::Udp(tunnel.listen_port),
                input: bond,
                output: None,
                is_local: true,
                state: NEW,
            };
            (tunnel.listen_port, passage(ruleset, chain, base, packet))
        })
        .collect();
    let echo = |tunnel: &Tunnel, content| {
        let packet = Packet {
            is_ipv4: true,
            source: far_address(tunnel.address).map(IpAddr::from),
            destination: Some(tunnel.address.addr().into()),
            content,
            input: Some(tunnel.name.as_str()),
            output: None,
            is_local: true,
            state: NEW,
        };
        passage(ruleset, chain, base, packet)
    };
    // This end sends to the other all the time, so what comes back belongs to a known connection. The other end's echo
    // requests never do.
    let closed_to = |tunnel: &&Tunnel| {
        !echo(tunnel, Content::EchoRequest).is_open() || echo(tunnel, Content::EchoReply).is_closed()
    };
    let closed: Vec<&Tunnel> = plan.tunnels.iter().filter(closed_to).collect();
    let silent: Vec<InterfaceName> = closed.iter().map(|tunnel| tunnel.name.clone()).collect();
    let is_named = !silent.is_empty() || udp.iter().any(|(_, passage)| passage.is_closed());
    let by_rule = udp.iter().any(|(_, passage)| passage.is_by_rule())
        || closed.iter().any(|tunnel| echo(tunnel, Content::EchoRequest).is_by_rule())
        || closed.iter().any(|tunnel| echo(tunnel, Content::EchoReply).is_by_rule());
    let closed: Vec<u16> =
        udp.iter().filter(|(_, passage)| is_named && !passage.is_open()).map(|(port, _)| *port).collect();
    let udp = (!closed.is_empty()).then_some(Need::Udp(closed));
    let echo = (!silent.is_empty()).then_some(Need::Echo(silent));
    (udp.into_iter().chain(echo).collect(), by_rule)
}

/// The need that a forward chain does not meet, and whether a rule drops it.
fn forward_needs(plan: &Plan, ruleset: &Ruleset, chain: &Chain, base: Base) -> (Vec<Need>, bool) {
    let steered = |is_ipv4: bool| plan.routes.iter().any(|route| route.prefix.addr().is_ipv4() == is_ipv4);
    let device = plan.steering.name.as_str();
    let mut by_rule = false;
    let mut is_closed = false;
    for is_ipv4 in [true, false].into_iter().filter(|is_ipv4| steered(*is_ipv4)) {
        let any = Packet {
            is_ipv4,
            source: None,
            destination: None,
            content: Content::Any,
            input: None,
            output: None,
            is_local: false,
            state: NEW,
        };
        let out = passage(ruleset, chain, base, Packet { output: Some(device), ..any });
        let into = plan.tunnels.iter().map(|tunnel| Packet { input: Some(tunnel.name.as_str()), ..any });
        let into: Vec<Passage> = into.map(|packet| passage(ruleset, chain, base, packet)).collect();
        let all = || into.iter().copied().chain([out]);
        // One direction may be open for answers alone: that may be what the operator wants.
        is_closed |= all().any(Passage::is_closed) || !all().any(Passage::is_open);
        by_rule |= all().any(Passage::is_by_rule);
    }
    let tunnels = plan.tunnels.iter().map(|tunnel| tunnel.name.clone()).collect();
    (is_closed.then(|| Need::Forward(tunnels, plan.steering.name.clone())).into_iter().collect(), by_rule)
}
