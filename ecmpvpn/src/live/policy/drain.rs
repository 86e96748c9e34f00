//! Drains a tunnel: it takes no new flows, and its present flows leave it when they pause.

use ecmpvpn_common::layout::TunnelId;

use super::{Live, PolicyError};
use crate::config::InterfaceName;
use crate::dataplane::{DataplaneError, Pins, View, monotonic_ns};

/// A tunnel that is being drained.
pub struct Draining {
    view: View,
    id: TunnelId,
}

impl Live {
    /// Sets whether a tunnel takes new flows. Returns whether it did before.
    ///
    /// # Errors
    /// There is no such tunnel, or it is the last tunnel of its peer that is up and takes new flows.
    pub fn set_open(&self, name: &InterfaceName, open: bool) -> Result<bool, PolicyError> {
        let tunnel = self.tunnel(name)?;
        let Some(peer) = self.view.peer(tunnel.id.peer()) else { return Ok(false) };
        let bit = 1 << tunnel.id.slot();
        if !open && peer.open.get() & peer.live.get() & !bit == 0 {
            return Err(PolicyError::LastOpen { tunnel: name.to_string(), peer: self.peer_name(&tunnel) });
        }
        Ok(peer.open.set_bits(bit, open) & bit != 0)
    }

    /// Numbers of the rules whose flows cannot leave a tunnel: the rules allow no other tunnel that is up and takes new
    /// flows.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn bound_to(&self, name: &InterfaceName) -> Result<Vec<usize>, PolicyError> {
        let tunnels = self.view.tunnels()?;
        let takes = |other: &InterfaceName| {
            let found = tunnels.iter().find(|tunnel| tunnel.name == other.as_str());
            found.is_some_and(|tunnel| {
                let open = self.view.is_open(tunnel.id);
                tunnel.live && open && other != name
            })
        };
        let is_bound =
            |rule: &crate::config::Rule| rule.tunnels.contains(name) && !rule.pin && !rule.tunnels.iter().any(takes);
        let rules = self.rules()?;
        Ok((1..).zip(&rules).filter(|(_, placed)| is_bound(&placed.rule)).map(|(number, _)| number).collect())
    }
}

impl Draining {
    /// For a tunnel that no longer takes new flows. Holds no lock.
    ///
    /// # Errors
    /// The maps cannot be opened.
    pub fn new(live: &Live, pins: &Pins, name: &InterfaceName) -> Result<Self, PolicyError> {
        let tunnel = live.tunnel(name)?;
        Ok(Self { view: View::open(pins)?, id: tunnel.id })
    }

    /// Moves the buckets that have paused. Returns how many are left.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn move_idle(&self) -> Result<usize, DataplaneError> {
        let gap = self.view.peer(self.id.peer()).map_or(0, |peer| peer.gap_ns.get());
        self.view.move_off(self.id, monotonic_ns().saturating_sub(u64::from(gap)))
    }

    /// Moves all buckets, including those whose packets may overtake others. Returns how many are left.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn move_all(&self) -> Result<usize, DataplaneError> {
        self.view.move_off(self.id, u64::MAX)
    }

    /// Whether the tunnel takes new flows again, so that the drain must end.
    pub fn is_called_off(&self) -> bool {
        self.view.is_open(self.id)
    }
}
