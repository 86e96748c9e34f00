//! The verdict on a set of ports, in one sentence.

use super::peer::Peer;
use crate::plan::bond_hash::{self, Unknown};
use crate::plan::ports::{End, PortPair, Side, Spread, View};

/// How one end spreads the tunnels that it sends.
enum Sending {
    /// One member, so there is nothing to spread over.
    Plain,
    /// As even as possible, with all members and with one fewer.
    Even,
    /// Every tunnel is on this member.
    AllOn(usize),
    /// The number of tunnels on the fullest member, and the number that would be even. `degraded`: only with one member
    /// down.
    Uneven { fullest: usize, even: usize, degraded: bool },
    /// Its policy does not read ports, so all tunnels share one member.
    Blind,
    /// The spread cannot be known.
    Unknown(Unknown),
}

impl Peer {
    /// The verdict on the ports, in one sentence without a full stop.
    pub fn verdict(&self) -> String {
        let count = self.plan.pairs.len();
        let [out, out_less, back, back_less] = &self.plan.views;
        let ends = [
            (&self.here, &self.request.a, sending(&self.request.a, out, out_less)),
            (&self.there, &self.request.b, sending(&self.request.b, back, back_less)),
        ];
        let mut clauses = Vec::new();
        match &ends {
            [(_, _, Sending::Plain), (_, _, Sending::Plain)] => {
                clauses.push("neither end has a bond of several members, so any ports do".to_owned());
            }
            [(_, _, Sending::Even | Sending::Plain), (_, _, Sending::Even | Sending::Plain)] if count > 1 => {
                clauses
                    .push(format!("the {count} tunnels spread evenly in both directions, also with one member down"));
            }
            [(_, _, Sending::AllOn(a)), (_, _, Sending::AllOn(b))] if a == b => {
                clauses.push(format!("all {count} tunnels share member {a}: bonding gains nothing"));
            }
            _ => clauses.extend(ends.iter().filter_map(|(name, end, sending)| {
                let policy = end.policy.map_or("", |policy| policy.as_str());
                clause(name, policy, sending, count)
            })),
        }
        clauses.extend(self.too_few());
        clauses.extend(self.remedy());
        clauses.join("; ")
    }

    /// With fewer tunnels than members, some members stay unused, however well the tunnels are spread.
    fn too_few(&self) -> Option<String> {
        let count = self.plan.pairs.len();
        let ends = [&self.request.a, &self.request.b];
        let most =
            ends.iter().filter(|end| end.policy.is_some_and(bond_hash::reads_ports)).map(|end| end.members).max();
        let most = usize::from(most.filter(|most| usize::from(*most) > count)?);
        let tunnels = if count == 1 {
            "one tunnel uses one member".to_owned()
        } else {
            format!("{count} tunnels use at most {count} members")
        };
        Some(format!("{tunnels} of {most}: plan {most} tunnels or more"))
    }

    fn remedy(&self) -> Option<String> {
        if let Some(better) = &self.better {
            let ports: Vec<String> = better.plan.pairs.iter().map(|PortPair { a, b }| format!("{a}:{b}")).collect();
            let assumed = match better.assumed {
                Some(Side::A) => format!(", if {}'s bond is like {}'s", self.here, self.there),
                Some(Side::B) => format!(", if {}'s bond is like {}'s", self.there, self.here),
                None => String::new(),
            };
            let left = match better.plan.misses() {
                0 => String::new(),
                misses => format!(" (still {} on a wrong member)", tunnels(misses)),
            };
            return Some(format!("use {}{left}{assumed}", ports.join(", ")));
        }
        let by_ports =
            |view: &View, policy: Option<_>| view.miss() > Some(0) && policy.is_some_and(bond_hash::reads_ports);
        let [out, out_less, back, back_less] = &self.plan.views;
        let (a, b) = (self.request.a.policy, self.request.b.policy);
        let uneven = by_ports(out, a) || by_ports(out_less, a) || by_ports(back, b) || by_ports(back_less, b);
        uneven.then(|| {
            let misses = tunnels(self.plan.misses());
            format!("no better ports were found near {}: the four views miss by {misses}", self.request.base_port)
        })
    }
}

pub(super) fn tunnels(count: usize) -> String {
    if count == 1 { "1 tunnel".to_owned() } else { format!("{count} tunnels") }
}

fn sending(end: &End, full: &View, degraded: &View) -> Sending {
    if full.members == 1 && end.policy.is_some() {
        return Sending::Plain;
    }
    let loads = match &full.spread {
        Spread::Known(loads) if !end.policy.is_some_and(bond_hash::one_member_for_all) => loads,
        Spread::Known(_) | Spread::OneOfThem(_) => return Sending::Blind,
        Spread::Unknown(why) => return Sending::Unknown(*why),
    };
    let uneven = |view: &View, degraded| {
        let fullest = view.max_min().map_or(0, |(max, _)| max);
        Sending::Uneven { fullest, even: view.tunnels.len().div_ceil(usize::from(view.members)), degraded }
    };
    match loads.iter().position(|load| *load == full.tunnels.len()) {
        Some(member) if full.tunnels.len() > 1 => Sending::AllOn(member),
        _ if full.miss() > Some(0) => uneven(full, false),
        _ if degraded.miss() > Some(0) => uneven(degraded, true),
        _ => Sending::Even,
    }
}

fn clause(name: &str, policy: &str, sending: &Sending, count: usize) -> Option<String> {
    let all = if count == 1 { "the tunnel uses".to_owned() } else { format!("all {count} tunnels share") };
    Some(match sending {
        Sending::Plain => return None,
        Sending::Even if count == 1 => return None,
        Sending::Even => format!("{name} spreads the {count} tunnels evenly, also with one member down"),
        Sending::AllOn(member) => format!("{name} sends all {count} tunnels on member {member}"),
        Sending::Uneven { fullest, even, degraded: false } => {
            format!("{name} sends {fullest} of {count} tunnels on one member where {even} would be even")
        }
        Sending::Uneven { fullest, even, degraded: true } => format!(
            "with one member down {name} sends {fullest} of {count} tunnels on one member where {even} would be even"
        ),
        Sending::Blind => format!(
            "{name}'s {policy} does not read ports: {all} one member whatever the ports are; set xmit_hash_policy \
             layer3+4 there"
        ),
        Sending::Unknown(Unknown::InnerFlow) => format!(
            "{name}'s {policy} spreads the inner flows of every tunnel over all members by itself, whatever the ports are"
        ),
        Sending::Unknown(Unknown::Policy) => format!(
            "which members {name} sends on cannot be predicted: nothing is known of its bond; describe it in the \
             configuration, under [bond] for this site and as remote_bond for a peer"
        ),
        Sending::Unknown(why) => format!("which members {name} sends on cannot be predicted: {why}"),
    })
}
