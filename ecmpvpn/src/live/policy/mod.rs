//! Changes how a running site steers, through its pinned maps. It needs no daemon, and its changes outlive the daemon.
//!
//! A lock on the pins' directory lets only one process change the site at a time.

pub mod drain;
pub mod keep;
pub mod lock;
pub mod rules;
pub mod show;

use ecmpvpn_common::layout::{Peer, peer_flags};

use crate::config::{InterfaceName, Policy};
use crate::dataplane::{DataplaneError, Pins, RuleMaps, TunnelView, View};
use crate::plan::rules::{TooManyRules, TunnelNames};
use lock::{LockError, MapsLock};

/// A change was not made.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// All bits for rules are in use.
    #[error(transparent)]
    TooMany(#[from] TooManyRules),
    #[error("{name} is no tunnel of {site}: tunnels are {known}")]
    NoSuchTunnel {
        name: String,
        site: String,
        /// The existing names, separated by commas.
        known: String,
    },
    #[error("{name} is no peer of {site}: peers are {known}")]
    NoSuchPeer {
        name: String,
        site: String,
        /// The existing names, separated by commas.
        known: String,
    },
    #[error("there is no rule {number}: there are {count}; `ecmpvpn policy rule list` numbers them")]
    NoSuchRule {
        number: usize,
        /// Number of existing rules.
        count: usize,
    },
    /// There is no pin for exactly these flows.
    #[error("no pin is for exactly these flows: `ecmpvpn policy rule list` shows the pins")]
    NoSuchPin,
    /// The rule is there already.
    #[error("rule {number} is identical: nothing to add")]
    There {
        /// Number of the identical rule.
        number: usize,
    },
    /// Draining would leave nothing.
    #[error("{tunnel} is the only tunnel of {peer} that is up and takes new flows: they would have nowhere to go")]
    LastOpen { tunnel: String, peer: String },
    #[error(transparent)]
    Lock(#[from] LockError),
}

impl PolicyError {
    /// Whether the request itself is wrong.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::TooMany(_)
            | Self::NoSuchTunnel { .. }
            | Self::NoSuchPeer { .. }
            | Self::NoSuchRule { .. }
            | Self::NoSuchPin
            | Self::There { .. } => true,
            Self::Dataplane(_) | Self::LastOpen { .. } | Self::Lock(_) => false,
        }
    }
}

/// A running site's policy, locked until dropped.
pub struct Live {
    site: String,
    pub view: View,
    pub rule_maps: RuleMaps,
    names: TunnelNames,
    _lock: MapsLock,
}

impl Live {
    /// Waits for the lock of `site` and opens its maps.
    ///
    /// # Errors
    /// The site is not steered, or its maps cannot be opened.
    pub fn open(site: &str, pins: &Pins) -> Result<Self, PolicyError> {
        // First of all: without pins this is the clearer error.
        View::open(pins)?;
        Self::with(site, pins, MapsLock::wait(pins)?)
    }

    /// Opens the maps of `site`, whose lock this process has.
    ///
    /// # Errors
    /// As [`Live::open`].
    pub fn with(site: &str, pins: &Pins, lock: MapsLock) -> Result<Self, PolicyError> {
        let view = View::open(pins)?;
        let names = view.tunnel_names()?;
        Ok(Self { site: site.to_owned(), rule_maps: RuleMaps::open(pins)?, view, names, _lock: lock })
    }

    /// By peer and slot.
    pub fn names(&self) -> &TunnelNames {
        &self.names
    }

    /// The tunnel of this name.
    ///
    /// # Errors
    /// There is no such tunnel.
    pub fn tunnel(&self, name: &InterfaceName) -> Result<TunnelView, PolicyError> {
        let tunnels = self.view.tunnels()?;
        let found = tunnels.iter().find(|tunnel| tunnel.name == name.as_str()).cloned();
        found.ok_or_else(|| PolicyError::NoSuchTunnel {
            name: name.to_string(),
            site: self.site.clone(),
            known: tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// Sets the policy of all peers, or of `peer` alone. Returns the names of these peers.
    ///
    /// # Errors
    /// There is no such peer.
    pub fn set_policy(&self, policy: Policy, peer: Option<&str>) -> Result<Vec<String>, PolicyError> {
        self.change_peers(peer, |record| record.policy.set(policy.number()))
    }

    /// Sets whether the order of sprayed flows is restored for all peers, or for `peer` alone. The process that probes
    /// the tunnels agrees on it with the far end. Returns the names of these peers.
    ///
    /// # Errors
    /// There is no such peer.
    pub fn set_order(&self, restored: bool, peer: Option<&str>) -> Result<Vec<String>, PolicyError> {
        self.change_peers(peer, |record| {
            record.flags.set_bits(peer_flags::UNRESTORED, !restored);
        })
    }

    fn change_peers(&self, peer: Option<&str>, change: impl Fn(&Peer)) -> Result<Vec<String>, PolicyError> {
        let peers = self.view.peers();
        let chosen = |name: &str| peer.is_none_or(|peer| peer == name);
        if !peers.iter().any(|peer| chosen(&peer.name)) {
            let known = peers.iter().map(|peer| peer.name.as_str()).collect::<Vec<_>>().join(", ");
            let name = peer.unwrap_or_default().to_owned();
            return Err(PolicyError::NoSuchPeer { name, site: self.site.clone(), known });
        }
        let mut changed = Vec::new();
        for (number, seen) in (0..).zip(peers).filter(|(_, seen)| chosen(&seen.name)) {
            if let Some(record) = self.view.peer(number) {
                change(record);
                changed.push(seen.name);
            }
        }
        Ok(changed)
    }

    /// Sets a tunnel's weight; `None`: the weight is learned from now on. Returns how many buckets have a new home.
    ///
    /// # Errors
    /// There is no such tunnel, or the maps cannot be written.
    pub fn set_weight(&mut self, name: &InterfaceName, weight: Option<u16>) -> Result<usize, PolicyError> {
        let tunnel = self.tunnel(name)?;
        let start = weight.unwrap_or(tunnel.weight);
        Ok(self.view.set_weight(tunnel.id, start, weight.is_none())?)
    }

    fn peer_name(&self, tunnel: &TunnelView) -> String {
        self.view.peers().into_iter().nth(tunnel.id.peer() as usize).map(|peer| peer.name).unwrap_or_default()
    }
}
