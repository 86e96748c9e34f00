//! Where tunnels truly arrive, told by counters. Pure: the counts come from elsewhere.

use std::time::Duration;

/// A member that had packets no longer than this before the tunnel's latest one still carries it.
const RECENT: Duration = Duration::from_secs(10);

/// Which members a tunnel arrives on now, of those with these times since the last packet; `None`: none ever came.
/// Where it is idle, those that it arrived on last.
pub fn current(ages: impl Iterator<Item = Option<Duration>> + Clone) -> Vec<bool> {
    let latest = ages.clone().flatten().min();
    ages.map(|age| age.zip(latest).is_some_and(|(age, latest)| age <= latest + RECENT)).collect()
}

/// Where the tunnels to one peer arrive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// The members of this site's bond that are in use, in the order of enslavement.
    pub names: Vec<String>,
    /// The tunnels, in the configuration's order.
    pub tunnels: Vec<Tunnel>,
}

/// Where one tunnel arrives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// Positions of the members that it arrives on now, ascending; none while nothing has come.
    pub on: Vec<u8>,
    /// Outer packets that these members have had of it.
    pub packets: u64,
    /// Time since the last one.
    pub age: Option<Duration>,
}

impl Measured {
    /// Number of members.
    pub fn members(&self) -> u8 {
        u8::try_from(self.names.len()).unwrap_or(u8::MAX)
    }

    /// Names of the members that a tunnel arrives on.
    pub fn names_of(&self, tunnel: usize) -> Vec<String> {
        let on = self.tunnels.get(tunnel).map(|tunnel| tunnel.on.as_slice()).unwrap_or_default();
        on.iter().filter_map(|member| self.names.get(usize::from(*member)).cloned()).collect()
    }

    /// How many tunnels arrive on each member; those on several count on none.
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
