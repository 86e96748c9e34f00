//! How an existing tunnel or steering device differs from the plan, and in which order it is changed. Pure.

use std::fmt;

use ipnet::IpNet;

/// How an existing tunnel or steering device differs from the plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alteration {
    /// Settings of WireGuard and of the link that differ.
    pub parts: Vec<Part>,
    pub add: Vec<IpNet>,
    pub remove: Vec<IpNet>,
}

/// A setting that can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// This site's private key.
    Key,
    /// UDP port at this end.
    Port,
    /// The peer's public key.
    Peer,
    /// The key that both ends share.
    PresharedKey,
    /// The far end's address and port.
    Endpoint,
    /// Inner addresses that the peer may send from.
    AllowedIps,
    Mtu,
    /// The device is down, but must be up.
    Down,
}

impl Alteration {
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    /// Whether only addresses are removed.
    pub fn is_removal(&self) -> bool {
        self.parts.is_empty() && self.add.is_empty() && !self.remove.is_empty()
    }

    /// Splits this into a first part, and the addresses to remove last, when nothing uses them any more: with an
    /// address the kernel also removes the IPv4 routes that have it as their source. An address whose network overlaps
    /// that of an added one is removed first: otherwise the kernel would remove both.
    pub fn split_removals(self) -> (Self, Self) {
        let Self { parts, add, remove } = self;
        let overlaps = |old: &IpNet| add.iter().any(|new| new.contains(&old.addr()) || old.contains(&new.addr()));
        let (first, last) = remove.iter().partition(|old| overlaps(old));
        (Self { parts, add, remove: first }, Self { remove: last, ..Self::default() })
    }

    /// The settings of WireGuard that differ, in words: "private key and UDP port".
    pub fn changed_settings(&self) -> String {
        let words: Vec<String> = self.parts.iter().map(ToString::to_string).collect();
        match words.split_last() {
            Some((last, others)) if !others.is_empty() => format!("{} and {last}", others.join(", ")),
            _ => words.concat(),
        }
    }

    /// Whether packets may be lost until both ends have matching settings again.
    pub fn interrupts(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Key | Part::Port | Part::Peer | Part::Endpoint))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "private key",
            Self::Port => "UDP port",
            Self::Peer => "public key of the peer",
            Self::PresharedKey => "pre-shared key",
            Self::Endpoint => "remote endpoint",
            Self::AllowedIps => "prefixes",
            Self::Mtu => "MTU",
            Self::Down => "state",
        })
    }
}

impl fmt::Display for Alteration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words: Vec<String> = self.parts.iter().map(ToString::to_string).collect();
        words.extend(self.add.iter().map(|address| format!("address {address} added")));
        words.extend(self.remove.iter().map(|address| format!("address {address} removed")));
        f.write_str(&words.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_removals(add: &[&str], remove: &[&str]) -> [Vec<String>; 2] {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let (first, last) =
            Alteration { parts: vec![Part::Mtu], add: nets(add), remove: nets(remove) }.split_removals();
        assert_eq!((first.parts, first.add), (vec![Part::Mtu], nets(add)));
        assert!(last.parts.is_empty() && last.add.is_empty());
        [first.remove, last.remove].map(|nets| nets.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn an_address_goes_last_unless_the_new_one_is_in_its_net() {
        assert_eq!(split_removals(&["10.100.0.9/32"], &["10.100.0.1/32"]), [vec![], vec!["10.100.0.1/32".to_owned()]]);
        assert_eq!(split_removals(&["10.100.0.9/24"], &["10.100.0.1/24"]), [vec!["10.100.0.1/24".to_owned()], vec![]]);
        assert_eq!(split_removals(&["fd00::1/64"], &["fd00::1/128"]), [vec!["fd00::1/128".to_owned()], vec![]]);
        assert_eq!(split_removals(&[], &["10.100.0.1/32"]), [vec![], vec!["10.100.0.1/32".to_owned()]]);
    }

    #[test]
    fn only_what_merely_takes_away_is_a_removal() {
        let net: IpNet = "10.100.0.1/32".parse().unwrap();
        let change =
            |add: &[IpNet], remove: &[IpNet]| Alteration { parts: vec![], add: add.into(), remove: remove.into() };
        assert!(change(&[], &[net]).is_removal());
        assert!(!change(&[net], &[net]).is_removal() && !change(&[], &[]).is_removal());
    }
}
