//! `policy`: shows and changes how a running site steers.

mod batch;
mod drain;
mod rule;

use std::path::Path;

use anyhow::Context as _;

use crate::cli::policy::{JsonArgs, PolicyAction, PolicyArgs, SetArgs, UndrainArgs, WeightArgs};
use crate::commands::{Failure, print};
use crate::config::{self, Config, Edit, EditError, InterfaceName};
use crate::dataplane::{DataplaneError, Pins};
use crate::live::policy::{Live, PolicyError, show};

/// Does what the arguments say with the site of the configuration at `path`.
pub async fn run(path: &Path, args: PolicyArgs) -> Result<(), Failure> {
    act(path, args.action).await
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
        PolicyAction::Batch(args) => batch::run(path, &args).await,
    }
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Self {
        match error {
            error if error.is_usage() => Self::usage(error),
            PolicyError::Dataplane(error) => error.into(),
            error => anyhow::Error::new(error).into(),
        }
    }
}

impl From<DataplaneError> for Failure {
    fn from(error: DataplaneError) -> Self {
        if error.is_host_lacking() { Self::host(error) } else { anyhow::Error::new(error).into() }
    }
}

impl From<EditError> for Failure {
    fn from(error: EditError) -> Self {
        anyhow::Error::new(error).into()
    }
}

/// A site that is being changed: its maps, and its configuration if the change shall be saved.
struct Change {
    config: Config,
    live: Live,
    edit: Option<Edit>,
}

impl Change {
    /// Opens the site of the configuration at `path`; `tunnels` are those that the command names.
    fn open(path: &Path, save: bool, tunnels: &[InterfaceName]) -> Result<Self, Failure> {
        let config = config::load(path)?;
        let live = Live::open(&config.site.name, &Pins::of(&config.site.name));
        let live = live.map_err(|error| unknown(&config, tunnels).unwrap_or(error))?;
        // Once more: another command may have saved while the lock was waited for.
        let (config, text) = config::load_with_text(path)?;
        let edit = if save { Some(Edit::new(path, &text, &config)?) } else { None };
        Ok(Self { config, live, edit })
    }

    /// Saves, if that was asked for, what `edit` changes.
    fn save(self, edit: impl FnOnce(&mut Edit, &Live) -> Result<(), EditError>) -> Result<(), Failure> {
        let Some(mut file) = self.edit else { return Ok(()) };
        let saved = edit(&mut file, &self.live).and_then(|()| file.save());
        Ok(saved.context("the change is in force, but it is not saved")?)
    }
}

/// That a tunnel is not even configured says more than that nothing runs.
fn unknown(config: &Config, tunnels: &[InterfaceName]) -> Option<PolicyError> {
    let known: Vec<&InterfaceName> =
        config.peers.iter().flat_map(|peer| &peer.tunnels).map(|tunnel| &tunnel.name).collect();
    let unknown = tunnels.iter().find(|tunnel| !known.contains(tunnel))?;
    Some(PolicyError::NoSuchTunnel {
        name: unknown.to_string(),
        site: config.site.name.clone(),
        known: known.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", "),
    })
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
