//! `policy`: shows and changes how a running site steers flows.

mod batch;
mod change;
mod drain;
mod rule;

use std::path::Path;

use anyhow::Context as _;

use batch::Lines;
use change::Change;

use crate::cli::policy::{JsonArgs, PolicyAction, PolicyArgs, SetArgs, UndrainArgs, WeightArgs};
use crate::commands::{Failure, print};
use crate::live::policy::show;

/// Carries out `policy` for the site of the configuration at `path`.
pub async fn run(path: &Path, args: PolicyArgs) -> Result<(), Failure> {
    let PolicyAction::Batch(args) = args.action else { return act(path, args.action).await };
    let mut lines = Lines::open(&args)?;
    while let Some(action) = lines.next()? {
        act(path, action).await.map_err(|failure| lines.place(failure))?;
    }
    Ok(())
}

async fn act(path: &Path, action: PolicyAction) -> Result<(), Failure> {
    match action {
        PolicyAction::Show(args) => show(path, args),
        PolicyAction::Set(args) => set(path, &args),
        PolicyAction::Weight(args) => weight(path, &args),
        PolicyAction::Drain(args) => drain::run(path, &args).await,
        PolicyAction::Undrain(args) => undrain(path, &args),
        PolicyAction::Rule(args) => rule::run(path, args.action),
        PolicyAction::Pin(args) => rule::pin(path, args),
        PolicyAction::Unpin(args) => rule::unpin(path, args),
        PolicyAction::Batch(_) => Err(batch::nested()),
    }
}

fn show(path: &Path, args: JsonArgs) -> Result<(), Failure> {
    let change = Change::open(path, false, &[])?;
    let report = show::report(&change.live, &change.config)?;
    if args.json {
        return print(serde_json::to_string_pretty(&report).context("writing JSON")?);
    }
    print(report)
}

fn set(path: &Path, args: &SetArgs) -> Result<(), Failure> {
    let change = Change::open(path, args.save.save, &[])?;
    let peers = change.live.set_policy(args.policy, args.peer.as_deref())?;
    change.save(|file, _| file.set_policy(args.policy, args.peer.as_deref()))?;
    tracing::info!("flows to {} are steered by {} now", peers.join(", "), args.policy.as_str());
    Ok(())
}

fn weight(path: &Path, args: &WeightArgs) -> Result<(), Failure> {
    let mut change = Change::open(path, args.save.save, std::slice::from_ref(&args.tunnel))?;
    let moved = change.live.set_weight(&args.tunnel, args.weight.0)?;
    change.save(|file, _| file.set_weight(args.tunnel.as_str(), args.weight.0))?;
    if let Some(weight) = args.weight.0 {
        tracing::info!("{} has weight {weight} now; {moved} buckets have another home", args.tunnel);
    } else {
        tracing::info!("the weight of {} is learned from now on", args.tunnel);
    }
    Ok(())
}

fn undrain(path: &Path, args: &UndrainArgs) -> Result<(), Failure> {
    let change = Change::open(path, false, std::slice::from_ref(&args.tunnel))?;
    let was_open = change.live.set_open(&args.tunnel, true)?;
    let already = if was_open { "took new flows already" } else { "takes new flows again" };
    tracing::info!("{} {already}", args.tunnel);
    Ok(())
}
