//! The bond members that tunnels really arrive on, from counters. Pure: the counts come from elsewhere.

use std::time::Duration;

/// A member still carries a tunnel if its last packet is at most this much older than the tunnel's latest packet.
const RECENT: Duration = Duration::from_secs(10);

/// Which members a tunnel arrives on now. `ages` has the time since the last packet on each member; `None`: there was
/// no packet. For an idle tunnel: the members that it arrived on last.
pub fn current(ages: impl Iterator<Item = Option<Duration>> + Clone) -> Vec<bool> {
    let latest = ages.clone().flatten().min();
    ages.map(|age| age.zip(latest).is_some_and(|(age, latest)| age <= latest + RECENT)).collect()
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// The members of this site's bond that are in use, in enslave order.
    pub names: Vec<String>,
    /// In the configuration's order.
    pub tunnels: Vec<Tunnel>,
}

/// Arrivals of one tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// Positions of the members that it arrives on now, ascending. Empty if nothing has arrived.
    pub on: Vec<u8>,
    /// Number of outer packets that arrived on these members.
    pub packets: u64,
    /// Time since the last packet.
    pub age: Option<Duration>,
}

impl Measured {
    pub fn members(&self) -> u8 {
        u8::try_from(self.names.len()).unwrap_or(u8::MAX)
    }

    /// Names of the members that the tunnel at this position arrives on.
    pub fn names_of(&self, tunnel: usize) -> Vec<String> {
        let on = self.tunnels.get(tunnel).map(|tunnel| tunnel.on.as_slice()).unwrap_or_default();
        on.iter().filter_map(|member| self.names.get(usize::from(*member)).cloned()).collect()
    }

    /// How many tunnels arrive on each member. A tunnel that arrives on several members is not counted.
    pub fn loads(&self) -> Vec<usize> {
        let mut loads = vec![0; self.names.len()];
        for tunnel in &self.tunnels {
            if let [member] = tunnel.on[..]
                && let Some(load) = loads.get_mut(usize::from(member))
            {
                *load += 1;
            }
        }
        loads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_was_left_is_not_current() {
        let current = |ages: &[Option<u64>]| super::current(ages.iter().map(|age| age.map(Duration::from_secs)));
        assert_eq!(current(&[]), [false; 0]);
        assert_eq!(current(&[None, None]), [false, false]);
        assert_eq!(current(&[Some(0), None, Some(11)]), [true, false, false]);
        assert_eq!(current(&[Some(3), Some(9)]), [true, true]);
        assert_eq!(current(&[Some(5000), Some(4000)]), [false, true], "idle: the last one counts");
    }
}
