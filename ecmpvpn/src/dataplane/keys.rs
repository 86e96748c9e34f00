//! Addresses and prefixes as the maps hold them.

use std::net::IpAddr;

use aya::maps::lpm_trie::Key;
use ecmpvpn_common::layout::Address;
use ipnet::IpNet;

/// The longest-prefix key of `prefix`.
pub(super) fn prefix_key(prefix: IpNet) -> Key<Address> {
    Key::new(Address::FAMILY_BITS + u32::from(prefix.prefix_len()), destination(prefix.network()))
}

/// `address` as the maps hold it.
pub fn destination(address: IpAddr) -> Address {
    let (family, octets) = match address {
        IpAddr::V4(address) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&address.octets());
            (4, octets)
        }
        IpAddr::V6(address) => (6, address.octets()),
    };
    let word = |at: usize| u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
    Address { family, address: [word(0), word(4), word(8), word(12)] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_in_network_order() {
        let found = destination("10.20.30.40".parse().unwrap());
        assert_eq!((found.family, found.address[0].to_ne_bytes(), found.address[1]), (4, [10, 20, 30, 40], 0));
        let found = destination("fd00:20::1".parse().unwrap());
        assert_eq!((found.family, found.address[0].to_ne_bytes()), (6, [0xfd, 0, 0, 0x20]));
        assert_eq!(prefix_key("10.20.0.0/16".parse().unwrap()).prefix_len(), 48);
    }
}
