//! The Linux bonding driver's transmit hash: which bond member carries an outer packet.
//!
//! Bit exact with `bond_xmit_hash()` and its callees in `drivers/net/bonding/bond_main.c`. A member that cannot be
//! known before the packet exists is [`Unknown`]; it is never guessed. Pure functions: nothing here asks the host.

use std::net::IpAddr;

use crate::config::XmitHashPolicy;

/// An outer UDP packet as it leaves the bond: one direction of one tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OuterFlow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address; same family as `src`.
    pub dst: IpAddr,
    /// Source port: the sender's listen port, host byte order.
    pub sport: u16,
    /// Destination port: the receiver's listen port, host byte order.
    pub dport: u16,
    /// The Ethernet header, if it is known.
    pub macs: Option<Macs>,
}

/// What `layer2`, `layer2+3`, `encap2+3` and `vlan+srcmac` hash besides addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Macs {
    /// Source: the MAC address of the bond.
    pub src: [u8; 6],
    /// Destination: the MAC address of the next hop.
    pub dst: [u8; 6],
    /// The VLAN tag's 16 bits (priority and id) as returned by `skb_vlan_tag_get()`. 0: untagged. `None`: not known.
    pub vlan_tci: Option<u16>,
}

/// The member that carries a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Member {
    /// Position among the usable members, from 0, in enslave order.
    Index(u8),
    Unknown(Unknown),
}

impl Member {
    pub fn index(self) -> Option<u8> {
        match self {
            Self::Index(index) => Some(index),
            Self::Unknown(_) => None,
        }
    }
}

/// Why the member cannot be predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// The bond has no usable member.
    #[error("no member is left")]
    NoMember,
    /// One address is IPv4 and the other is IPv6: there is no such packet.
    #[error("the two endpoints are not of one address family")]
    MixedFamilies,
    /// The policy hashes MAC addresses.
    #[error("the policy hashes MAC addresses, which are not known here")]
    Macs,
    /// The policy hashes the VLAN tag.
    #[error("the policy hashes the VLAN tag, which is not known here")]
    Vlan,
    /// `encap3+4`: WireGuard keeps the inner flow's hash on the outer packet, so each inner flow has its own member.
    #[error("encap3+4 hashes each inner flow by itself")]
    InnerFlow,
    /// The sender's `xmit_hash_policy` is not known.
    #[error("the sender's transmit hash policy is not known")]
    Policy,
    /// NAT between the ends changes the addresses or ports that the sender hashes.
    #[error("addresses or ports are rewritten between the ends")]
    Rewritten,
}

/// Whether the policy hashes outer ports, so that the ports choose the member.
///
/// `encap2+3` does not: the flow dissector looks into IP-in-IP and GRE, but not into UDP payloads. `encap3+4` does not
/// for tunnelled data, which it hashes by inner flow.
pub fn reads_ports(policy: XmitHashPolicy) -> bool {
    policy == XmitHashPolicy::Layer34
}

/// Whether all packets between two fixed endpoints use one member, whatever their ports and contents.
pub fn one_member_for_all(policy: XmitHashPolicy) -> bool {
    match policy {
        XmitHashPolicy::Layer2 | XmitHashPolicy::Layer23 | XmitHashPolicy::Encap23 | XmitHashPolicy::VlanSrcmac => true,
        XmitHashPolicy::Layer34 | XmitHashPolicy::Encap34 => false,
    }
}

/// The member that carries `flow`, out of `count` usable ones: `usable[hash % count]`.
///
/// With one member the answer is this member, whatever the policy hashes.
pub fn member(policy: XmitHashPolicy, flow: &OuterFlow, count: u8) -> Member {
    match (count, hash(policy, flow)) {
        (0, _) => Member::Unknown(Unknown::NoMember),
        (_, Err(Unknown::MixedFamilies)) => Member::Unknown(Unknown::MixedFamilies),
        (1, _) => Member::Index(0),
        (_, Ok(hash)) => Member::Index(slot(hash, count)),
        (_, Err(why)) => Member::Unknown(why),
    }
}

/// `hash % count`; `count` must not be 0.
pub(super) fn slot(hash: u32, count: u8) -> u8 {
    u8::try_from(hash % u32::from(count)).expect("a remainder of a u8 fits a u8")
}

/// The 32-bit transmit hash of `flow`. The kernel takes it modulo the number of members.
///
/// # Errors
/// The policy hashes something that is not known.
pub fn hash(policy: XmitHashPolicy, flow: &OuterFlow) -> Result<u32, Unknown> {
    let (ethertype, addresses) = match (flow.src, flow.dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) => (0x0800, address_word(flow.src) ^ address_word(flow.dst)),
        (IpAddr::V6(_), IpAddr::V6(_)) => (0x86dd, address_word(flow.src) ^ address_word(flow.dst)),
        _ => return Err(Unknown::MixedFamilies),
    };
    let ethernet = || flow.macs.map(|macs| ethernet_hash(&macs, ethertype)).ok_or(Unknown::Macs);
    match policy {
        XmitHashPolicy::Layer2 => ethernet(),
        XmitHashPolicy::Layer23 | XmitHashPolicy::Encap23 => Ok(fold(ethernet()? ^ addresses)),
        // The kernel drops the lowest bit "to deal with the common even ports pattern".
        XmitHashPolicy::Layer34 => Ok(fold(port_word(flow.sport, flow.dport) ^ addresses) >> 1),
        XmitHashPolicy::Encap34 => Err(Unknown::InnerFlow),
        XmitHashPolicy::VlanSrcmac => {
            let macs = flow.macs.ok_or(Unknown::Macs)?;
            Ok(u32::from(macs.vlan_tci.ok_or(Unknown::Vlan)?) ^ three(&macs.src[..3]) ^ three(&macs.src[3..]))
        }
    }
}

/// `bond_eth_hash()`
fn ethernet_hash(macs: &Macs, ethertype: u32) -> u32 {
    u32::from(macs.dst[5] ^ macs.src[5]) ^ ethertype
}

/// Three bytes as a big-endian number. `bond_vlan_srcmac_hash()` reads each half of the MAC address like this.
fn three(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

/// `flow_get_u32_src()` / `flow_get_u32_dst()`: the address's bytes in network order, read on a little-endian machine.
/// The four words of an IPv6 address are combined by XOR.
fn address_word(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(v4) => u32::from_le_bytes(v4.octets()),
        IpAddr::V6(v6) => {
            v6.octets().chunks_exact(4).fold(0, |word, c| word ^ u32::from_le_bytes([c[0], c[1], c[2], c[3]]))
        }
    }
}

/// The four bytes of the two ports in network order, read on a little-endian machine.
fn port_word(sport: u16, dport: u16) -> u32 {
    let ([s0, s1], [d0, d1]) = (sport.to_be_bytes(), dport.to_be_bytes());
    u32::from_le_bytes([s0, s1, d0, d1])
}

/// The last steps of `bond_ip_hash()`.
fn fold(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash ^= hash >> 8;
    hash
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::MAX_MEMBERS;

    fn flow(src: &str, dst: &str, sport: u16, dport: u16) -> OuterFlow {
        OuterFlow { src: src.parse().unwrap(), dst: dst.parse().unwrap(), sport, dport, macs: None }
    }

    const MACS: Macs = Macs {
        src: [0x02, 0x11, 0x22, 0x33, 0x44, 0x55],
        dst: [0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee],
        vlan_tci: Some(0),
    };

    const V4: (&str, &str) = ("10.2.3.4", "10.5.6.7");
    const V6: (&str, &str) = ("2001:db8:1::a", "2001:db8:2::b");

    /// The ports of both ends. Then hash and member (of 2, 3 and 4 members) for this direction, and the same for the
    /// opposite direction.
    type Case = ((u16, u16), (u32, [u8; 3]), (u32, [u8; 3]));

    /// Measured: the members that real 802.3ad bonds used.
    const LAYER34_V4: [Case; 5] = [
        ((5000, 5000), (0x45ce_8900, [0, 1, 0]), (0x45ce_8900, [0, 1, 0])),
        ((5001, 5001), (0x454e_0900, [0, 0, 0]), (0x454e_0900, [0, 0, 0])),
        ((5002, 5002), (0x44cf_8900, [0, 1, 0]), (0x44cf_8900, [0, 1, 0])),
        ((5000, 5002), (0x44cf_8801, [1, 1, 1]), (0x45ce_8801, [1, 1, 1])),
        ((5000, 5001), (0x454e_0980, [0, 2, 0]), (0x45ce_8980, [0, 0, 0])),
    ];

    /// Calculated with an independent transcription of the kernel's C code.
    const LAYER34_V6: [Case; 4] = [
        ((51820, 51820), (0x36d3_e401, [1, 2, 1]), (0x36d3_e401, [1, 2, 1])),
        ((51820, 51822), (0x37d2_e500, [0, 2, 0]), (0x36d3_e500, [0, 2, 0])),
        ((51821, 51820), (0x36d3_e481, [1, 1, 1]), (0x3653_6481, [1, 0, 1])),
        ((51825, 51821), (0x3653_6a0f, [1, 0, 3]), (0x385d_6a0f, [1, 0, 3])),
    ];

    #[test]
    fn layer34_is_the_kernels() {
        for ((a, b), cases) in [(V4, &LAYER34_V4[..]), (V6, &LAYER34_V6[..])] {
            for &((sport, dport), there, back) in cases {
                for (outer, (expected, members)) in
                    [(flow(a, b, sport, dport), there), (flow(b, a, dport, sport), back)]
                {
                    assert_eq!(hash(XmitHashPolicy::Layer34, &outer), Ok(expected), "{outer:?}");
                    for (count, index) in [2, 3, 4].into_iter().zip(members) {
                        let predicted = member(XmitHashPolicy::Layer34, &outer, count);
                        assert_eq!(predicted, Member::Index(index), "{outer:?} of {count}");
                    }
                }
            }
        }
    }

    /// Measured in the lab: three tunnels with equal ports all use one member.
    #[test]
    fn equal_ports_share_one_member() {
        for port in [5000, 5001, 5002] {
            for count in [2, 3, 4] {
                let outer = flow("10.2.3.4", "10.2.3.5", port, port);
                assert_eq!(member(XmitHashPolicy::Layer34, &outer, count), Member::Index(0), "{port} of {count}");
            }
        }
    }

    #[test]
    fn policies_that_read_the_ethernet_header() {
        let tagged = Macs { vlan_tci: Some(0x6064), ..MACS };
        let cases = [
            (XmitHashPolicy::Layer2, V4, MACS, 0x08bb),
            (XmitHashPolicy::Layer2, V6, MACS, 0x8666),
            (XmitHashPolicy::Layer23, V4, MACS, 0x0306_09b2),
            (XmitHashPolicy::Layer23, V6, MACS, 0x0101_84e2),
            (XmitHashPolicy::Encap23, V4, MACS, 0x0306_09b2),
            (XmitHashPolicy::Encap23, V6, MACS, 0x0101_84e2),
            (XmitHashPolicy::VlanSrcmac, V4, MACS, 0x0031_5577),
            (XmitHashPolicy::VlanSrcmac, V4, tagged, 0x0031_3513),
        ];
        for (policy, (src, dst), macs, expected) in cases {
            for (sport, dport) in [(5000, 5000), (5000, 5001)] {
                let outer = OuterFlow { macs: Some(macs), ..flow(src, dst, sport, dport) };
                assert_eq!(hash(policy, &outer), Ok(expected), "{policy:?} {outer:?}");
                for count in 1..=MAX_MEMBERS {
                    let index = u8::try_from(expected % u32::from(count)).unwrap();
                    assert_eq!(member(policy, &outer, count), Member::Index(index), "{policy:?} of {count}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_known_is_said() {
        let bare = flow(V4.0, V4.1, 5000, 5001);
        let untold = OuterFlow { macs: Some(Macs { vlan_tci: None, ..MACS }), ..bare };
        let full = OuterFlow { macs: Some(MACS), ..bare };
        let mixed = flow(V4.0, V6.1, 5000, 5001);
        let cases = [
            (XmitHashPolicy::Layer2, bare, 2, Unknown::Macs),
            (XmitHashPolicy::Layer23, bare, 2, Unknown::Macs),
            (XmitHashPolicy::Encap23, bare, 2, Unknown::Macs),
            (XmitHashPolicy::VlanSrcmac, bare, 2, Unknown::Macs),
            (XmitHashPolicy::VlanSrcmac, untold, 2, Unknown::Vlan),
            (XmitHashPolicy::Encap34, full, 2, Unknown::InnerFlow),
            (XmitHashPolicy::Layer34, full, 0, Unknown::NoMember),
            (XmitHashPolicy::Encap34, full, 0, Unknown::NoMember),
            (XmitHashPolicy::Layer34, mixed, 2, Unknown::MixedFamilies),
            (XmitHashPolicy::Layer2, mixed, 1, Unknown::MixedFamilies),
        ];
        for (policy, outer, count, why) in cases {
            assert_eq!(member(policy, &outer, count), Member::Unknown(why), "{policy:?} {outer:?} of {count}");
        }
        for policy in XmitHashPolicy::ALL {
            assert_eq!(member(policy, &bare, 1), Member::Index(0), "{policy:?}: one member carries everything");
        }
    }

    proptest! {
        /// If `n` is a power of two, the member is `(X >> 1) & (n - 1)`. X is the XOR of all address and port bytes.
        #[test]
        fn powers_of_two_see_only_the_xor_of_all_bytes(
            v4: bool, a: [u8; 16], b: [u8; 16], sport: u16, dport: u16, log in 0_u32..=5,
        ) {
            let address = |bytes: [u8; 16]| {
                if v4 { IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]) } else { IpAddr::from(bytes) }
            };
            let length = if v4 { 4 } else { 16 };
            let ports = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
            let xor = a[..length].iter().chain(&b[..length]).chain(&ports).fold(0, |x, byte| x ^ byte);
            let count = 1_u8 << log;
            let out = OuterFlow { src: address(a), dst: address(b), sport, dport, macs: None };
            let back = OuterFlow { src: address(b), dst: address(a), sport: dport, dport: sport, macs: None };
            prop_assert_eq!(member(XmitHashPolicy::Layer34, &out, count), Member::Index((xor >> 1) & (count - 1)));
            prop_assert_eq!(
                member(XmitHashPolicy::Layer34, &out, count),
                member(XmitHashPolicy::Layer34, &back, count)
            );
        }
    }
}
