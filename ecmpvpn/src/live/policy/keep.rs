//! Decides which of the changes that were made at run time stay when `reload` or the next `run` reads the configuration
//! again. All of them stay, except where the configuration's own value has changed since it was last read.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Live, PolicyError};
use crate::config::{Policy, Rule};
use crate::file;
use crate::plan::SteeringTable;
use crate::plan::rules::canonical;

/// What the configuration said when it was last applied; kept beside the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    flowlet_gap_us: Option<u32>,
    peers: Vec<Peer>,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Peer {
    name: String,
    policy: Policy,
    /// Former versions do not write it.
    #[serde(default = "yes")]
    restore_order: bool,
    tunnels: Vec<(String, Option<u16>)>,
}

const fn yes() -> bool {
    true
}

impl Applied {
    /// The record of a table that was just applied.
    pub fn of(table: &SteeringTable) -> Self {
        let peer = |peer: &crate::plan::PeerTable| Peer {
            name: peer.name.clone(),
            policy: peer.policy,
            restore_order: peer.restore_order,
            tunnels: peer.tunnels.iter().map(|(name, weight)| (name.to_string(), *weight)).collect(),
        };
        Self {
            flowlet_gap_us: table.flowlet_gap_us,
            peers: table.peers.iter().map(peer).collect(),
            rules: table.rules.clone(),
        }
    }

    /// Reads the record of an earlier process; `None` if there is no valid one.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes the record for the next process.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        file::replace(path, &serde_json::to_vec(self)?)
    }

    /// `table` with the values that were last applied. Peers and tunnels that are new in `table` keep their values.
    pub fn table(&self, table: &SteeringTable) -> SteeringTable {
        let mut former = table.clone();
        former.flowlet_gap_us = self.flowlet_gap_us;
        former.rules.clone_from(&self.rules);
        for peer in &mut former.peers {
            let Some(applied) = self.peers.iter().find(|applied| applied.name == peer.name) else { continue };
            peer.policy = applied.policy;
            peer.restore_order = applied.restore_order;
            for (name, weight) in &mut peer.tunnels {
                if let Some((_, applied)) = applied.tunnels.iter().find(|(applied, _)| applied == name.as_str()) {
                    *weight = *applied;
                }
            }
        }
        former
    }
}

impl Live {
    /// Applies a change of the configuration's rules from `before` to `now` to the rules in force.
    ///
    /// # Errors
    /// As [`Live::set_rules`].
    pub fn follow_rules(&mut self, before: &[Rule], now: &[Rule]) -> Result<(), PolicyError> {
        if before == now {
            return Ok(());
        }
        let same = |rules: &[Rule]| rules.iter().map(|rule| canonical(rule, &self.names)).collect::<Vec<_>>();
        let live: Vec<Rule> = self.rules()?.into_iter().map(|placed| placed.rule).collect();
        let desired = merged(&live, &same(before), &same(now));
        if desired == live { Ok(()) } else { self.set_rules(&desired) }
    }
}

/// The rules of the changed configuration, `now`, together with the rules that are in force but not configured. Each of
/// those stays in front of the rule that it is in front of. A rule that was deleted at run time but is still configured
/// stays deleted.
fn merged(live: &[Rule], before: &[Rule], now: &[Rule]) -> Vec<Rule> {
    let mut desired = Vec::new();
    let is_own = |rule: &&Rule| !before.contains(rule) && !now.contains(rule);
    let next = |at: usize| live[at..].iter().find(|rule| now.contains(rule));
    let own = |anchor: Option<&Rule>| -> Vec<Rule> {
        let at_anchor = live.iter().enumerate().filter(|(at, rule)| is_own(rule) && next(*at) == anchor);
        at_anchor.map(|(_, rule)| rule.clone()).collect()
    };
    for rule in now {
        desired.extend(own(Some(rule)));
        if live.contains(rule) || !before.contains(rule) {
            desired.push(rule.clone());
        }
    }
    desired.extend(own(None));
    desired
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::config;
    use crate::plan::{Backend, Plan};

    fn rules(marks: &[u32]) -> Vec<Rule> {
        let rule = |mark: &u32| Rule { fwmark: Some(*mark), policy: Some(Policy::Hash), ..Rule::default() };
        marks.iter().map(rule).collect()
    }

    fn marks(live: &[u32], before: &[u32], now: &[u32]) -> Vec<u32> {
        merged(&rules(live), &rules(before), &rules(now)).iter().filter_map(|rule| rule.fwmark).collect()
    }

    #[test]
    fn the_configurations_rules_change_and_those_beside_it_stay_where_they_are() {
        assert_eq!(marks(&[1, 2], &[1, 2], &[2, 3]), [2, 3]);
        assert_eq!(marks(&[9, 1, 8, 2, 7], &[1, 2], &[1, 2, 3]), [9, 1, 8, 2, 3, 7]);
        // Its neighbour is removed: the rule stays in front of the next one.
        assert_eq!(marks(&[9, 1, 2], &[1, 2], &[2]), [9, 2]);
        assert_eq!(marks(&[9, 1], &[1], &[]), [9]);
        // Deleted by hand, but still configured.
        assert_eq!(marks(&[2], &[1, 2], &[1, 2, 3]), [2, 3]);
        // Added by hand, and configured now.
        assert_eq!(marks(&[1, 5], &[1], &[5, 1]), [5, 1]);
        assert_eq!(marks(&[], &[], &[4]), [4]);
    }

    #[test]
    fn only_what_the_configuration_changed_differs_from_what_was_applied() {
        let mut config = config(2);
        config.rules = rules(&[3]);
        let applied = Applied::of(&Plan::new(&config, Backend::Kernel).table);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("applied.json");
        assert_eq!(Applied::read(&path), None);
        applied.write(&path).unwrap();
        assert_eq!(Applied::read(&path).as_ref(), Some(&applied));

        config.peers[0].tunnels[1].weight = None;
        config.peers[0].policy = Some(Policy::Spray);
        config.rules.clear();
        let table = Plan::new(&config, Backend::Kernel).table;
        let former = applied.table(&table);
        assert_eq!(former.peers[0].policy, Policy::Hash);
        assert_eq!(former.peers[0].tunnels[1].1, Some(1));
        assert_eq!(former.peers[0].tunnels[0], table.peers[0].tunnels[0]);
        assert_eq!(former.rules, rules(&[3]));
        fs::write(&path, "{").unwrap();
        assert_eq!(Applied::read(&path), None);
    }
}
