//! `policy rule`, `policy pin` and `policy unpin`.

use anyhow::{Context as _, anyhow};

use super::change::Change;
use crate::cli::policy::{FlowArgs, JsonArgs, PinArgs, RuleAction, RuleAddArgs, RuleDelArgs, UnpinArgs};
use crate::commands::{Failure, Invocation, print};
use crate::config::{MAX_PORT_RANGES, Policy, Rule, check_rule};
use crate::plan::rules::canonical;
use crate::report::policy;

pub fn run(invocation: Invocation<'_>, action: RuleAction) -> Result<(), Failure> {
    match action {
        RuleAction::Add(args) => add(invocation, args),
        RuleAction::Del(args) => delete(invocation, &args),
        RuleAction::List(args) => list(invocation, args),
    }
}

fn list(invocation: Invocation<'_>, args: JsonArgs) -> Result<(), Failure> {
    let change = Change::open(invocation, false, &[])?;
    let report = change.report()?;
    if args.json {
        return print(serde_json::to_string_pretty(&report.rules).context("writing JSON")?);
    }
    if report.rules.is_empty() {
        return print("no rules: every flow is steered by its peer's policy");
    }
    print(report.rule_table())
}

fn add(invocation: Invocation<'_>, args: RuleAddArgs) -> Result<(), Failure> {
    let rule = Rule { policy: args.policy, tunnels: args.tunnels, ..rule_of(args.flows) };
    ensure_valid(&rule)?;
    let mut change = Change::open(invocation, args.save.save, &rule.tunnels)?;
    let at = change.live.add_rule(&rule, args.at.map(|number| number - 1))?;
    save_added(change, &rule, at)?;
    invocation.say(format_args!("rule {}: {}", at + 1, describe(&rule)))
}

fn delete(invocation: Invocation<'_>, args: &RuleDelArgs) -> Result<(), Failure> {
    let mut change = Change::open(invocation, args.save.save, &[])?;
    let rule = change.live.delete_rule(args.number - 1)?;
    save_removed(change, &rule)?;
    invocation.say(format_args!("deleted: {}", describe(&rule)))
}

/// Pins flows to a tunnel.
pub fn pin(invocation: Invocation<'_>, args: PinArgs) -> Result<(), Failure> {
    let flows = rule_of(args.flows);
    if flows == Rule::default() && !args.all {
        let tunnel = args.tunnel;
        return Err(Failure::usage(anyhow!(
            "name the flows to pin, for example `ecmpvpn policy pin {tunnel} --dst 10.20.0.7`, or give --all to pin every flow"
        )));
    }
    let rule = Rule { policy: Some(Policy::Hash), tunnels: vec![args.tunnel], pin: true, ..flows };
    ensure_valid(&rule)?;
    let mut change = Change::open(invocation, args.save.save, &rule.tunnels)?;
    let former = change.live.pin(&rule)?;
    if let (Some(file), Some(former)) = (&mut change.edit, &former) {
        let names = change.live.names();
        file.remove_rule(former, |a, b| canonical(a, names) == canonical(b, names))?;
    }
    save_added(change, &rule, 0)?;
    invocation.say(format_args!("{}", describe(&rule)))
}

/// Removes a pin.
pub fn unpin(invocation: Invocation<'_>, args: UnpinArgs) -> Result<(), Failure> {
    let mut change = Change::open(invocation, args.save.save, &[])?;
    let rule = change.live.unpin(&rule_of(args.flows))?;
    save_removed(change, &rule)?;
    invocation.say(format_args!("no longer {}", describe(&rule)))
}

fn save_added(change: Change, rule: &Rule, at: usize) -> Result<(), Failure> {
    let behind: Vec<Rule> = change.live.rules()?.into_iter().skip(at + 1).map(|placed| placed.rule).collect();
    change.save(|file, live| {
        file.add_rule(rule, &behind, |a, b| canonical(a, live.names()) == canonical(b, live.names()))
    })
}

fn save_removed(change: Change, rule: &Rule) -> Result<(), Failure> {
    change.save(|file, live| file.remove_rule(rule, |a, b| canonical(a, live.names()) == canonical(b, live.names())))
}

/// A rule that matches the given flows, without an action yet.
fn rule_of(flows: FlowArgs) -> Rule {
    Rule {
        src: flows.src,
        dst: flows.dst,
        proto: flows.proto,
        src_ports: flows.sports,
        dst_ports: flows.dports,
        dscp: flows.dscp,
        fwmark: flows.fwmark,
        ..Rule::default()
    }
}

fn ensure_valid(rule: &Rule) -> Result<(), Failure> {
    if rule.src_ports.len().max(rule.dst_ports.len()) > MAX_PORT_RANGES {
        return Err(Failure::usage(anyhow!("give at most {MAX_PORT_RANGES} ports and ranges in one list")));
    }
    check_rule(rule).map_err(|why| Failure::usage(anyhow!(why)))
}

fn describe(rule: &Rule) -> String {
    let rule = policy::Rule::of(0, rule, true);
    format!("{}: {}", rule.flows(), rule.action())
}
