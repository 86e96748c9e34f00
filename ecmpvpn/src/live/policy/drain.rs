//! Draining a tunnel: it takes no new flows, and those that it has leave it when they pause.

use super::{Live, PolicyError};
use crate::config::InterfaceName;
use crate::dataplane::{DataplaneError, Pins, View, monotonic_ns};

/// A tunnel on its way to carry nothing.
pub struct Draining {
    view: View,
    peer: u32,
    slot: u32,
}

impl Live {
    /// Says whether a tunnel takes new flows; returns whether it did.
    ///
    /// # Errors
    /// There is no such tunnel, or it is the last one that does.
    pub fn set_open(&self, name: &InterfaceName, open: bool) -> Result<bool, PolicyError> {
        let tunnel = self.tunnel(name)?;
        let Some(peer) = self.view.peer(tunnel.peer) else { return Ok(false) };
        let bit = 1 << tunnel.slot;
        if !open && peer.open.get() & peer.live.get() & !bit == 0 {
            return Err(PolicyError::LastOpen { tunnel: name.to_string(), peer: self.peer_name(&tunnel) });
        }
        Ok(peer.open.set_bits(bit, open) & bit != 0)
    }

    /// Numbers of the rules whose flows cannot leave a tunnel: they allow no other that is up and open.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn bound_to(&self, name: &InterfaceName) -> Result<Vec<usize>, PolicyError> {
        let tunnels = self.view.tunnels()?;
        let takes = |other: &InterfaceName| {
            let found = tunnels.iter().find(|tunnel| tunnel.name == other.as_str());
            found.is_some_and(|tunnel| {
                let open = self.view.peer(tunnel.peer).is_some_and(|peer| peer.open.get() >> tunnel.slot & 1 == 1);
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
    /// Of a tunnel that takes no new flows any more; holds no lock.
    ///
    /// # Errors
    /// The maps cannot be opened.
    pub fn new(live: &Live, pins: &Pins, name: &InterfaceName) -> Result<Self, PolicyError> {
        let tunnel = live.tunnel(name)?;
        Ok(Self { view: View::open(pins)?, peer: tunnel.peer, slot: tunnel.slot })
    }

    /// Moves the buckets that pause; returns how many are left.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn move_idle(&self) -> Result<usize, DataplaneError> {
        let gap = self.view.peer(self.peer).map_or(0, |peer| peer.gap_ns.get());
        self.view.move_off(self.peer, self.slot, monotonic_ns().saturating_sub(u64::from(gap)))
    }

    /// Moves all buckets, also those whose packets may overtake others; returns how many are left.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn move_all(&self) -> Result<usize, DataplaneError> {
        self.view.move_off(self.peer, self.slot, u64::MAX)
    }

    /// Whether the tunnel was given new flows again meanwhile.
    pub fn is_called_off(&self) -> bool {
        self.view.peer(self.peer).is_some_and(|peer| peer.open.get() >> self.slot & 1 == 1)
    }
}
