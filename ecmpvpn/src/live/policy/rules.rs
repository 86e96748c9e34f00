//! Reads and changes the rules and pins in force.

use super::{Live, PolicyError};
use crate::config::{InterfaceName, Rule};
use crate::plan::rules::{Placed, canonical, steps};

impl Live {
    /// The rules in force, in order.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn rules(&self) -> Result<Vec<Placed>, PolicyError> {
        Ok(self.rule_maps.read(&self.view)?.rules(&self.names))
    }

    /// Puts `desired` in force. Every packet sees either the former rules or the new ones. The flows of a rule that
    /// stays do not move.
    ///
    /// # Errors
    /// There are too many, one names an unknown tunnel, or the maps cannot be written.
    pub fn set_rules(&mut self, desired: &[Rule]) -> Result<(), PolicyError> {
        let now = self.rules()?;
        self.replace_rules(now, desired)
    }

    /// As [`Self::set_rules`]; `now` are the rules in force.
    fn replace_rules(&mut self, mut now: Vec<Placed>, desired: &[Rule]) -> Result<(), PolicyError> {
        for tunnel in desired.iter().flat_map(|rule| &rule.tunnels) {
            self.ensure_known(tunnel)?;
        }
        let desired: Vec<Rule> = desired.iter().map(|rule| canonical(rule, &self.names)).collect();
        for step in steps(&now, &desired)? {
            self.rule_maps.change(&self.view, &self.names, &now, &step)?;
            now = step;
        }
        Ok(())
    }

    /// Puts a rule in force at a position counted from 0, by default after all others. Returns its position.
    ///
    /// # Errors
    /// As [`Live::set_rules`], or the rule exists already.
    pub fn add_rule(&mut self, rule: &Rule, at: Option<usize>) -> Result<usize, PolicyError> {
        for tunnel in &rule.tunnels {
            self.ensure_known(tunnel)?;
        }
        let now = self.rules()?;
        let mut rules = without_places(&now);
        let rule = canonical(rule, &self.names);
        if let Some(there) = rules.iter().position(|there| *there == rule) {
            return Err(PolicyError::There { number: there + 1 });
        }
        let at = at.unwrap_or(rules.len());
        if at > rules.len() {
            return Err(PolicyError::NoSuchRule { number: at + 1, count: rules.len() });
        }
        rules.insert(at, rule);
        self.replace_rules(now, &rules)?;
        Ok(at)
    }

    /// Deletes the rule at a position counted from 0 and returns it.
    ///
    /// # Errors
    /// There is no such rule, or the maps cannot be written.
    pub fn delete_rule(&mut self, at: usize) -> Result<Rule, PolicyError> {
        let now = self.rules()?;
        self.delete(now, at)
    }

    fn delete(&mut self, now: Vec<Placed>, at: usize) -> Result<Rule, PolicyError> {
        let mut rules = without_places(&now);
        if at >= rules.len() {
            return Err(PolicyError::NoSuchRule { number: at + 1, count: rules.len() });
        }
        let rule = rules.remove(at);
        self.replace_rules(now, &rules)?;
        Ok(rule)
    }

    /// Pins the flows that `pin` names to its tunnel, before all rules. Replaces an earlier pin for the same flows, and
    /// returns that pin.
    ///
    /// # Errors
    /// As [`Live::set_rules`].
    pub fn pin(&mut self, pin: &Rule) -> Result<Option<Rule>, PolicyError> {
        for tunnel in &pin.tunnels {
            self.ensure_known(tunnel)?;
        }
        let now = self.rules()?;
        let mut rules = without_places(&now);
        let pin = canonical(pin, &self.names);
        let former = rules.iter().position(|there| there.pin && is_for_same(there, &pin));
        let former = former.map(|at| rules.remove(at));
        rules.insert(0, pin);
        self.replace_rules(now, &rules)?;
        Ok(former)
    }

    /// Deletes the pin for the same flows and returns it.
    ///
    /// # Errors
    /// There is no such pin, or the maps cannot be written.
    pub fn unpin(&mut self, flows: &Rule) -> Result<Rule, PolicyError> {
        let flows = canonical(flows, &self.names);
        let now = self.rules()?;
        let at = now.iter().position(|there| there.rule.pin && is_for_same(&there.rule, &flows));
        self.delete(now, at.ok_or(PolicyError::NoSuchPin)?)
    }

    fn ensure_known(&self, tunnel: &InterfaceName) -> Result<(), PolicyError> {
        if self.names.iter().flatten().flatten().any(|name| name == tunnel) {
            return Ok(());
        }
        self.tunnel(tunnel).map(|_| ())
    }
}

/// The rules, in order.
fn without_places(rules: &[Placed]) -> Vec<Rule> {
    rules.iter().map(|placed| placed.rule.clone()).collect()
}

/// Whether two rules name the same flows.
fn is_for_same(a: &Rule, b: &Rule) -> bool {
    let flows = |rule: &Rule| Rule { policy: None, tunnels: Vec::new(), pin: false, ..rule.clone() };
    flows(a) == flows(b)
}
