//! `policy`: shows and changes how a running site steers flows.

mod batch;
mod change;
mod drain;
mod rule;

use anyhow::Context as _;

use batch::Lines;
use change::Change;

use crate::cli::policy::{JsonArgs, Order, OrderArgs, PolicyAction, SetArgs, UndrainArgs, WeightArgs};
use crate::commands::{Failure, Invocation, count_of, print};

/// Carries out `policy` for the site.
pub async fn run(invocation: Invocation<'_>, action: PolicyAction) -> Result<(), Failure> {
    let PolicyAction::Batch(args) = action else { return act(invocation, action).await };
    let invocation = Invocation { is_batch: true, ..invocation };
    let mut lines = Lines::open(&args)?;
    while let Some(action) = lines.next()? {
        act(invocation, action).await.map_err(|failure| lines.place(failure))?;
    }
    Ok(())
}

async fn act(invocation: Invocation<'_>, action: PolicyAction) -> Result<(), Failure> {
    match action {
        PolicyAction::Show(args) => show(invocation, args),
        PolicyAction::Set(args) => set(invocation, &args),
        PolicyAction::Order(args) => order(invocation, &args),
        PolicyAction::Weight(args) => weight(invocation, &args),
        PolicyAction::Drain(args) => drain::run(invocation, &args).await,
        PolicyAction::Undrain(args) => undrain(invocation, &args),
        PolicyAction::Rule(args) => rule::run(invocation, args.action),
        PolicyAction::Pin(args) => rule::pin(invocation, args),
        PolicyAction::Unpin(args) => rule::unpin(invocation, args),
        PolicyAction::Batch(_) => Err(batch::nested()),
    }
}

fn show(invocation: Invocation<'_>, args: JsonArgs) -> Result<(), Failure> {
    let change = Change::open(invocation, false, &[])?;
    let report = change.report()?;
    if args.json {
        return print(serde_json::to_string_pretty(&report).context("writing JSON")?);
    }
    print(report)
}

fn set(invocation: Invocation<'_>, args: &SetArgs) -> Result<(), Failure> {
    let change = Change::open(invocation, args.save.save, &[])?;
    let peers = change.live.set_policy(args.policy, args.peer.as_deref())?;
    change.save(|file, _| file.set_policy(args.policy, args.peer.as_deref()))?;
    invocation.say(format_args!("flows to {} are steered by {} now", peers.join(", "), args.policy.as_str()))
}

fn order(invocation: Invocation<'_>, args: &OrderArgs) -> Result<(), Failure> {
    let change = Change::open(invocation, args.save.save, &[])?;
    let restored = args.order == Order::On;
    let peers = change.live.set_order(restored, args.peer.as_deref())?;
    let is_off = change.site.config().is_some_and(|config| !config.steering.restore_order);
    change.save(|file, _| file.set_order(restored, args.peer.as_deref()))?;
    let peers = peers.join(", ");
    match (restored, is_off) {
        (true, true) => invocation.say(format_args!(
            "the order of sprayed flows of {peers} would be restored, but restore_order in [steering] is false: set it, \
             and run `ecmpvpn reload`"
        )),
        (true, false) => invocation.say(format_args!("the order of sprayed flows of {peers} is restored if they restore it too")),
        (false, _) => invocation.say(format_args!("the order of sprayed flows of {peers} is not restored: only TCP is sprayed")),
    }
}

fn weight(invocation: Invocation<'_>, args: &WeightArgs) -> Result<(), Failure> {
    let mut change = Change::open(invocation, args.save.save, std::slice::from_ref(&args.tunnel))?;
    let moved = change.live.set_weight(&args.tunnel, args.weight.0)?;
    change.save(|file, _| file.set_weight(args.tunnel.as_str(), args.weight.0))?;
    if let Some(weight) = args.weight.0 {
        let moved = count_of(moved, "bucket has another home", "buckets have another home");
        invocation.say(format_args!("{} has weight {weight} now; {moved}", args.tunnel))
    } else {
        invocation.say(format_args!("the weight of {} is learned from now on", args.tunnel))
    }
}

fn undrain(invocation: Invocation<'_>, args: &UndrainArgs) -> Result<(), Failure> {
    let change = Change::open(invocation, false, std::slice::from_ref(&args.tunnel))?;
    let was_open = change.live.set_open(&args.tunnel, true)?;
    let already = if was_open { "took new flows already" } else { "takes new flows again" };
    invocation.say(format_args!("{} {already}", args.tunnel))
}
