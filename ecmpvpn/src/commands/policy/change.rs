//! A change of a running site. It takes effect at once, and is saved if requested.

use anyhow::Context as _;

use crate::commands::{Failure, Invocation, Known};
use crate::config::{self, Config, Edit, EditError, InterfaceName};
use crate::dataplane::Pins;
use crate::live::policy::{Live, PolicyError, show};
use crate::report::policy::Report;

/// A site that is being changed: its maps, and its configuration if the change is to be saved.
pub struct Change {
    pub site: Known,
    pub live: Live,
    pub edit: Option<Edit>,
}

impl Change {
    /// Opens the site. `tunnels` are the tunnels that the command names. Only to `save` needs the configuration.
    pub fn open(invocation: Invocation<'_>, save: bool, tunnels: &[InterfaceName]) -> Result<Self, Failure> {
        let site = invocation.find()?;
        let live = Live::open(&site.name, &Pins::of(&site.name));
        let live = live.map_err(|error| site.config().and_then(|config| unknown(config, tunnels)).unwrap_or(error))?;
        let edit = if save {
            site.into_config()?;
            // Load again: another command may have saved while this one waited for the lock.
            let (config, text) = config::load_with_text(invocation.file)?;
            Some(Edit::new(invocation.file, &text, &config)?)
        } else {
            None
        };
        Ok(Self { site: invocation.find()?, live, edit })
    }

    /// The policy in force. Warns if there is no configuration to compare with.
    pub fn report(&self) -> Result<Report, Failure> {
        self.site.warn("what is saved is unknown");
        Ok(show::report(&self.live, self.site.config())?)
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
