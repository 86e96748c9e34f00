//! The seal of probes: a message authentication code that only the two ends of a tunnel can compute. Pure.
//!
//! Any user of a gateway may send echo requests through its tunnels, so a report that is not sealed shows nothing about
//! the far end. The key is derived from the tunnel's WireGuard keys, as both ends know them: X25519 of the own private
//! and the other end's public key. It needs no configuration, and changes with these keys.

use std::fmt;
use std::net::Ipv4Addr;

use blake2::Blake2sMac;
use blake2::digest::Mac;
use blake2::digest::consts::{U12, U32};
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize as _, Zeroizing};

use crate::config::{PrivateKey, PublicKey};
use crate::plan::{Tunnel, far_address};

/// Bytes of a tag: a code is cut to 96 bits, as in RFC 2404 (see RFC 2104, section 5).
pub const TAG: usize = 12;
/// Keeps these keys apart from any other use of the same X25519 secret.
const PURPOSE: &[u8] = b"ecmpvpn probes 3";

/// The keys of one tunnel, one for each direction, so that no message counts at the end that sent it. Wiped on drop.
#[derive(Clone)]
pub struct Keys {
    to_far: Zeroizing<[u8; 32]>,
    to_near: Zeroizing<[u8; 32]>,
}

impl Keys {
    /// The keys of a tunnel of the plan. `None` if its address has no far end.
    pub fn of(tunnel: &Tunnel) -> Option<Self> {
        let addresses = [tunnel.address.addr(), far_address(tunnel.address)?];
        Some(Self::derive(&tunnel.private_key, &tunnel.public_key, addresses))
    }

    /// The keys of the end with `private_key` and the first of the two inner `addresses`. Tunnels with the same
    /// WireGuard keys differ by their addresses.
    pub fn derive(private_key: &PrivateKey, public_key: &PublicKey, addresses: [Ipv4Addr; 2]) -> Self {
        let secret = StaticSecret::from(*private_key.as_bytes());
        let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(*public_key.as_bytes()));
        let near = (private_key.public_key(), addresses[0]);
        let far = (*public_key, addresses[1]);
        let direction = |[from, to]: [&(PublicKey, Ipv4Addr); 2]| {
            let mut code = <Blake2sMac<U32> as Mac>::new(shared.as_bytes().into());
            code.update(PURPOSE);
            for (key, address) in [from, to] {
                code.update(key.as_bytes());
                code.update(&address.octets());
            }
            let mut key = code.finalize().into_bytes();
            let kept = Zeroizing::new(key.into());
            key.zeroize();
            kept
        };
        Self { to_far: direction([&near, &far]), to_near: direction([&far, &near]) }
    }

    /// The tag of a message to the far end. `secret`: the far end's; 0: not known.
    pub fn seal(&self, message: &[u8], secret: u64) -> [u8; TAG] {
        code(&self.to_far, message, secret).finalize().into_bytes().into()
    }

    /// Whether the far end sealed `message` with `tag`, for the end with `secret`. Takes the same time for every tag.
    pub fn is_sealed(&self, message: &[u8], secret: u64, tag: &[u8; TAG]) -> bool {
        code(&self.to_near, message, secret).verify(tag.into()).is_ok()
    }
}

fn code(key: &[u8; 32], message: &[u8], secret: u64) -> Blake2sMac<U12> {
    let mut code = <Blake2sMac<U12> as Mac>::new(key.into());
    code.update(&secret.to_be_bytes());
    code.update(message);
    code
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEAR: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 0);
    const FAR: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);

    #[test]
    fn what_one_end_seals_the_other_accepts_and_nobody_else() {
        let (a, b, other) = (PrivateKey::generate(), PrivateKey::generate(), PrivateKey::generate());
        let ours = Keys::derive(&a, &b.public_key(), [NEAR, FAR]);
        let theirs = Keys::derive(&b, &a.public_key(), [FAR, NEAR]);
        let tag = ours.seal(b"message", 7);
        assert!(theirs.is_sealed(b"message", 7, &tag));
        assert!(!theirs.is_sealed(b"massage", 7, &tag) && !theirs.is_sealed(b"message", 8, &tag));
        assert!(!ours.is_sealed(b"message", 7, &tag), "sent back to where it came from");
        let mut wrong = tag;
        wrong[TAG - 1] ^= 1;
        assert!(!theirs.is_sealed(b"message", 7, &wrong) && !theirs.is_sealed(b"message", 7, &[0; TAG]));
        for stranger in [
            Keys::derive(&b, &other.public_key(), [FAR, NEAR]),
            Keys::derive(&other, &a.public_key(), [FAR, NEAR]),
            // Another tunnel between the same two sites, with the same keys.
            Keys::derive(&b, &a.public_key(), [FAR, Ipv4Addr::new(169, 254, 77, 2)]),
        ] {
            assert!(!stranger.is_sealed(b"message", 7, &tag));
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let keys = Keys::derive(&PrivateKey::generate(), &PrivateKey::generate().public_key(), [NEAR, FAR]);
        assert_eq!(format!("{keys:?}"), "Keys(..)");
    }
}
