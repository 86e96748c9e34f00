//! Where tunnels really arrive, compared with the prediction, and what the other site can change.

use std::fmt::Write as _;
use std::time::Duration;

use super::peer::Peer;
use super::verdict::tunnels;
use crate::plan::bond_hash::{self, Member};
use crate::plan::measured::Measured;
use crate::plan::ports::PortPair;
use crate::plan::ports::replan::{Finding, Proposal, Replan, is_relabelling};

/// The age of a measurement is reported if it is above this.
const OLD: Duration = Duration::from_secs(60);

/// A setting that one of the two sites should change.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Setting {
    pub site: String,
    /// The tunnel, by its name at this site.
    pub tunnel: String,
    /// The key in that site's configuration.
    pub key: &'static str,
    /// The present value.
    pub from: u16,
    /// The new value.
    pub to: u16,
}

impl Peer {
    /// The position of the member that a tunnel arrives on (or positions, separated by commas), and its packets there.
    pub(super) fn arrival(&self, tunnel: usize) -> Option<(String, u64)> {
        let found = self.arrivals.as_ref()?.measured.tunnels.get(tunnel);
        let on: Vec<String> = found.map(|found| found.on.iter().map(u8::to_string).collect()).unwrap_or_default();
        Some((if on.is_empty() { "?".to_owned() } else { on.join(",") }, found.map_or(0, |found| found.packets)))
    }

    /// The verdict on the measurement, in one sentence without a full stop.
    pub fn arrival_verdict(&self) -> Option<String> {
        let measured = &self.arrivals.as_ref()?.measured;
        let names = |desired: fn(usize) -> bool| -> Vec<&str> {
            let all = self.names.iter().zip(&measured.tunnels);
            all.filter(|(_, tunnel)| desired(tunnel.on.len())).map(|(name, _)| name.as_str()).collect()
        };
        if measured.members() <= 1 {
            return Some(format!("measured: {} receives on one port, nothing is to be spread", self.here));
        }
        let packets: u64 = measured.tunnels.iter().map(|tunnel| tunnel.packets).sum();
        let (silent, several) = (names(|count| count == 0), names(|count| count > 1));
        if silent.len() == self.names.len() {
            return Some(format!(
                "measured: no packet of any tunnel has arrived since its members are followed: send some traffic from {}",
                self.there
            ));
        }
        let mut clauses = vec![format!("measured, of {packets} packets")];
        if !silent.is_empty() {
            clauses.push(format!("nothing of {} has arrived", silent.join(", ")));
        }
        if !several.is_empty() {
            clauses.push(format!(
                "{} arrive on several members each: the sender hashes what is inside the tunnel, or its hash has just \
                 changed",
                several.join(", ")
            ));
        }
        clauses.extend(self.compared(measured));
        clauses.extend(self.collapsed(measured));
        let oldest = measured.tunnels.iter().filter_map(|tunnel| tunnel.age).max().filter(|age| *age > OLD);
        clauses.extend(oldest.map(|age| format!("the oldest of it is {} s old", age.as_secs())));
        Some(clauses.join("; "))
    }

    /// Compares measured with predicted members, for the tunnels that arrive on one member.
    fn compared(&self, measured: &Measured) -> Option<String> {
        let one = |at: usize| match measured.tunnels.get(at)?.on[..] {
            [member] => Some(member),
            _ => None,
        };
        let known: Vec<(usize, u8)> = (0..self.names.len()).filter_map(|at| Some((at, one(at)?))).collect();
        let on: Vec<u8> = known.iter().map(|(_, member)| *member).collect();
        let view = &self.plan.views[2];
        let comparable = view.members == measured.members();
        let predicted: Option<Vec<u8>> = known.iter().map(|(at, _)| view.tunnels[*at].index()).collect();
        let (there, here) = (&self.there, &self.here);
        let policy = self.request.b.policy;
        match predicted.filter(|_| comparable && !known.is_empty()) {
            Some(predicted) if predicted == on => Some(format!("{there}'s tunnels arrive as predicted")),
            Some(predicted) if is_relabelling(&predicted, &on) => {
                Some(format!("{there}'s tunnels arrive as predicted, except for the order of the members"))
            }
            Some(predicted) => {
                let differ = |((at, member), predicted): (&(usize, u8), &u8)| {
                    let name = measured.names.get(usize::from(*member)).map_or("?", String::as_str);
                    (member != predicted).then(|| format!("{} on {member} ({name}), not {predicted}", self.names[*at]))
                };
                let differ: Vec<String> = known.iter().zip(&predicted).filter_map(differ).collect();
                let policy = policy.map_or("", |policy| policy.as_str());
                Some(format!(
                    "the switch before {here}, or {there}'s bond, hashes otherwise than {policy}: {}",
                    differ.join(", ")
                ))
            }
            None if policy.is_some_and(bond_hash::one_member_for_all) && on.windows(2).all(|two| two[0] == two[1]) => {
                Some(format!("{there}'s tunnels share one member, as its policy determines"))
            }
            None => None,
        }
    }

    /// Reports tunnels that share a member although they could have members of their own.
    fn collapsed(&self, measured: &Measured) -> Option<String> {
        let loads = measured.loads();
        let count: usize = loads.iter().sum();
        let fullest = *loads.iter().max()?;
        let even = count.div_ceil(loads.len());
        if count < 2 || fullest <= even {
            return None;
        }
        let member = loads.iter().position(|load| *load == fullest)?;
        let name = &measured.names[member];
        let hint = if self.arrivals.as_ref().is_some_and(|arrivals| arrivals.replan.is_none()) {
            ": `ecmpvpn plan --replan-rx` says what to do"
        } else {
            ""
        };
        Some(if fullest == count {
            format!("all {count} tunnels arrive on member {member} ({name}){hint}")
        } else {
            format!("{fullest} of {count} tunnels arrive on member {member} ({name}) where {even} would be even{hint}")
        })
    }

    /// What the two sites must change for a proposal: the other site its listen ports, this site its remote ports.
    pub fn settings(&self, proposal: &Proposal) -> Vec<Setting> {
        let tunnels = || self.names.iter().zip(self.plan.pairs.iter().zip(&proposal.plan.pairs));
        let setting = |site: &str, key, (name, (old, new)): (&String, (&PortPair, &PortPair))| {
            let (site, tunnel) = (site.to_owned(), name.clone());
            (old.b != new.b).then_some(Setting { site, tunnel, key, from: old.b, to: new.b })
        };
        let there = tunnels().filter_map(|tunnel| setting(&self.there, "listen_port", tunnel));
        there.chain(tunnels().filter_map(|tunnel| setting(&self.here, "remote_port", tunnel))).collect()
    }

    /// What to do about the arrivals, in one paragraph, followed by the settings to change.
    pub fn replan_text(&self) -> Option<String> {
        let replan = self.arrivals.as_ref()?.replan.as_ref()?;
        let mut text = self.finding(replan);
        if let Some(proposal) = &replan.proposal {
            let settings = self.settings(proposal);
            for site in [&self.there, &self.here] {
                let _ = write!(text, "\n  at {site}:");
                for setting in settings.iter().filter(|setting| setting.site == *site) {
                    let Setting { tunnel, key, from, to, .. } = setting;
                    let _ = write!(text, "\n    {tunnel}: {key} = {to}    (now {from})");
                }
            }
            let misses = match proposal.plan.misses() {
                0 => String::new(),
                misses => {
                    format!(" (but for {} on a wrong member, at full strength or with one down)", tunnels(misses))
                }
            };
            let _ = write!(text, "\n  what the two bonds send stays as even as can be{misses}");
            if proposal.trial {
                let _ = write!(
                    text,
                    "; this is a trial: change both sites, restart both, and measure again with `ecmpvpn plan --replan-rx`"
                );
            } else {
                let loads: Vec<String> = proposal.loads.iter().map(usize::to_string).collect();
                let _ = write!(text, "; tunnels then arrive {} a member", loads.join("/"));
            }
        }
        Some(text)
    }

    fn finding(&self, replan: &Replan) -> String {
        const REMEDY: &str = "set the switch's hash policy to one that reads UDP ports (`layer3+4`, `src-dst-ip-port`), or \
             give the sites several addresses, one a tunnel";
        let names = |at: &[usize]| at.iter().map(|at| self.names[*at].as_str()).collect::<Vec<_>>().join(", ");
        let count = self.names.len();
        let there = &self.there;
        let loads: Vec<String> = replan.loads.iter().map(usize::to_string).collect();
        let loads = loads.join("/");
        // If the two bonds are cabled to each other, the far bond itself is the switch.
        let own = match self.request.b.policy {
            Some(policy) if !bond_hash::reads_ports(policy) => {
                format!(
                    "; with cables from bond to bond: set {there}'s own xmit_hash_policy {} to layer3+4",
                    policy.as_str()
                )
            }
            _ => String::new(),
        };
        match &replan.finding {
            Finding::OneMember => "replan: there is one member here, any ports do".to_owned(),
            Finding::Unmeasured(silent) => format!(
                "replan: nothing of {} has arrived yet, so nothing can be said: send traffic through every tunnel from \
                 {there} and ask again",
                names(silent)
            ),
            Finding::Several(several) => format!(
                "replan: {} arrive on several members each, whatever the ports are: if that lasts, {there} or its switch \
                 hashes the flows inside, and no ports are needed",
                names(several)
            ),
            Finding::Even => format!("replan: tunnels arrive {loads} a member, as even as can be: change nothing"),
            Finding::Layer34 => format!(
                "replan: tunnels arrive {loads} a member, as a layer3+4 hash like Linux's has it; with it, these ports spread"
            ),
            Finding::Layer34OrBlind => format!(
                "replan: all {count} tunnels arrive on one member. With these ports a layer3+4 hash like Linux's does that, \
                 and so does a switch that hashes addresses only. These ports show which: if the tunnels still share one \
                 member with them, no ports help: {REMEDY}{own}"
            ),
            Finding::Blind { one_in } => {
                let chance = if replan.proposal.is_some() {
                    format!("; one that reads ports would do it by chance once in {one_in}: these ports show which")
                } else {
                    String::new()
                };
                format!(
                    "replan: all {count} tunnels arrive on one member where a layer3+4 hash would spread them: the switch \
                     hashes addresses only, and no ports help: {REMEDY}{own}{chance}"
                )
            }
            Finding::Unknown => format!(
                "replan: tunnels arrive {loads} a member, by a hash that is not known here; ports that differ in other bits \
                 may spread"
            ),
        }
    }

    /// The member that a tunnel was measured to arrive on, if it is only one.
    pub(super) fn rx_member_measured(&self, tunnel: usize) -> Option<Member> {
        match self.arrivals.as_ref()?.measured.tunnels.get(tunnel)?.on[..] {
            [member] => Some(Member::Index(member)),
            _ => None,
        }
    }
}
