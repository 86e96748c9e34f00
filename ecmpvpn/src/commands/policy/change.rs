//! A change of a running site. It takes effect at once, and is saved if requested.

use std::path::Path;

use anyhow::Context as _;

use crate::commands::Failure;
use crate::config::{self, Config, Edit, EditError, InterfaceName};
use crate::dataplane::Pins;
use crate::live::policy::{Live, PolicyError};

/// A site that is being changed: its maps, and its configuration if the change is to be saved.
pub struct Change {
    pub config: Config,
    pub live: Live,
    pub edit: Option<Edit>,
}

impl Change {
    /// Opens the site of the configuration at `path`. `tunnels` are the tunnels that the command names.
    pub fn open(path: &Path, save: bool, tunnels: &[InterfaceName]) -> Result<Self, Failure> {
        let config = config::load(path)?;
        let live = Live::open(&config.site.name, &Pins::of(&config.site.name));
        let live = live.map_err(|error| unknown(&config, tunnels).unwrap_or(error))?;
        // Load again: another command may have saved while this one waited for the lock.
        let (config, text) = config::load_with_text(path)?;
        let edit = if save { Some(Edit::new(path, &text, &config)?) } else { None };
        Ok(Self { config, live, edit })
    }

    /// Saves the changes that `edit` makes, if the user requested it.
    pub fn save(self, edit: impl FnOnce(&mut Edit, &Live) -> Result<(), EditError>) -> Result<(), Failure> {
        let Some(mut file) = self.edit else { return Ok(()) };
        let saved = edit(&mut file, &self.live).and_then(|()| file.save());
        Ok(saved.context("the change is in force, but it is not saved")?)
    }
}

/// The error for a tunnel that is not configured: it says more than that nothing is running.
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
