//! The matches and targets of iptables that nftables runs as they are (`iptables-nft`, and so ufw). Their data are
//! structures of include/uapi/linux/netfilter, in the host's byte order.

use rtnetlink::packet_core::{DefaultNla, Nla as _};

use crate::plan::firewall::ruleset::{Field, Operator, Step, Verdict};

/// Attributes of both: name and data. Source: `NFTA_MATCH_*`, `NFTA_TARGET_*`, `nf_tables_compat.h`.
const NAME: u16 = 1;
const REVISION: u16 = 2;
const INFO: u16 = 3;
/// A register that no rule uses.
const SCRATCH: u32 = 0x100;
/// `RTN_LOCAL` as a bit of a mask of address types.
const LOCAL: u16 = 1 << 2;

/// The steps of a match. `None`: not understood.
pub fn matches(attributes: &[DefaultNla]) -> Option<Vec<Step>> {
    let (name, revision, info) = parts(attributes)?;
    match (name.as_str(), revision) {
        ("comment", _) => Some(Vec::new()),
        ("multiport", 1) => multiport(&info),
        ("udp", 0) => udp(&info),
        ("icmp", 0) => icmp(&info),
        ("conntrack", 1..=3) => conntrack(&info),
        ("addrtype", 1) => addrtype(&info),
        _ => None,
    }
}

/// The steps of a target. `None`: it decides nothing.
pub fn target(attributes: &[DefaultNla]) -> Option<Vec<Step>> {
    let (name, _, _) = parts(attributes)?;
    let verdict = match name.as_str() {
        "REJECT" => Verdict::Drop,
        "NFQUEUE" => Verdict::Other,
        _ => return None,
    };
    Some(vec![Step::Verdict(verdict)])
}

/// The value of an attribute.
pub fn bytes(attribute: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

fn parts(attributes: &[DefaultNla]) -> Option<(String, u32, Vec<u8>)> {
    let value = |kind: u16| attributes.iter().find(|attribute| attribute.kind() == kind).map(bytes);
    let name = String::from_utf8(value(NAME)?).ok()?.trim_end_matches('\0').to_owned();
    let revision = u32::from_be_bytes(value(REVISION)?.try_into().ok()?);
    Some((name, revision, value(INFO)?))
}

fn word(info: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(info.get(at..at + 2)?.try_into().ok()?))
}

fn load(field: Field, length: Option<usize>) -> Step {
    Step::Load { register: SCRATCH, field, length }
}

fn ports(ranges: &[(u16, u16)], is_inverted: bool) -> Vec<Step> {
    let ranges = ranges.iter().map(|(from, to)| (from.to_be_bytes().to_vec(), to.to_be_bytes().to_vec())).collect();
    vec![load(Field::Transport(2), Some(2)), Step::Within { register: SCRATCH, ranges, is_inverted }]
}

/// `struct xt_multiport_v1`: flags, count, 15 ports, 15 flags that say that a range begins, invert.
fn multiport(info: &[u8]) -> Option<Vec<Step>> {
    const DESTINATION: u8 = 1;
    let [flags, count, ..] = info else { return None };
    if *flags != DESTINATION {
        return None;
    }
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < usize::from(*count).min(15) {
        let begins = *info.get(32 + at)? != 0;
        let last = at + usize::from(begins);
        ranges.push((word(info, 2 + 2 * at)?, word(info, 2 + 2 * last)?));
        at = last + 1;
    }
    Some(ports(&ranges, *info.get(47)? != 0))
}

/// `struct xt_udp`: two ranges of ports, source first, and what is inverted.
fn udp(info: &[u8]) -> Option<Vec<Step>> {
    const DESTINATION: u8 = 2;
    let inverted = *info.get(8)?;
    let source = (word(info, 0)?, word(info, 2)?);
    if source != (0, u16::MAX) {
        return None;
    }
    Some(ports(&[(word(info, 4)?, word(info, 6)?)], inverted & DESTINATION != 0))
}

/// `struct ipt_icmp`: type, two codes, invert.
fn icmp(info: &[u8]) -> Option<Vec<Step>> {
    let [kind, 0, u8::MAX, 0, ..] = *info else { return None };
    let compare = Step::Compare { register: SCRATCH, operator: Operator::Equal, data: vec![kind] };
    Some(vec![load(Field::Transport(0), Some(1)), compare])
}

/// `struct xt_conntrack_mtinfo3`, if it asks for nothing but the state. Its bits are those of `ct state`.
fn conntrack(info: &[u8]) -> Option<Vec<Step>> {
    const STATE: u16 = 1;
    let (asks, inverts, states) = (word(info, 146)?, word(info, 148)?, word(info, 150)?);
    if asks != STATE {
        return None;
    }
    let operator = if inverts & STATE == 0 { Operator::NotEqual } else { Operator::Equal };
    Some(vec![
        load(Field::ConnectionState, None),
        Step::Mask { from: SCRATCH, to: SCRATCH, mask: u32::from(states).to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Step::Compare { register: SCRATCH, operator, data: vec![0; 4] },
    ])
}

/// `struct xt_addrtype_info_v1`, if it asks for the destination alone.
fn addrtype(info: &[u8]) -> Option<Vec<Step>> {
    const INVERTS_DESTINATION: u8 = 2;
    let (source, destination, flags) = (word(info, 0)?, word(info, 2)?, *info.get(4)?);
    if source != 0 || flags & !INVERTS_DESTINATION != 0 {
        return None;
    }
    let local = 2_u32.to_ne_bytes().to_vec();
    let ranges = if destination & LOCAL == 0 { Vec::new() } else { vec![(local.clone(), local)] };
    let is_inverted = flags & INVERTS_DESTINATION != 0;
    Some(vec![load(Field::DestinationType, None), Step::Within { register: SCRATCH, ranges, is_inverted }])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(name: &str, revision: u32, info: Vec<u8>) -> Vec<DefaultNla> {
        let name = [name.as_bytes(), &[0]].concat();
        let parts = [(NAME, name), (REVISION, revision.to_be_bytes().to_vec()), (INFO, info)];
        parts.into_iter().map(|(kind, value)| DefaultNla::new(kind, value)).collect()
    }

    fn ranges(steps: &[Step]) -> (Vec<(u16, u16)>, bool) {
        let [Step::Load { field: Field::Transport(2), .. }, Step::Within { ranges, is_inverted, .. }] = steps else {
            panic!("{steps:?}")
        };
        let number = |bytes: &[u8]| u16::from_be_bytes(bytes.try_into().unwrap());
        (ranges.iter().map(|(from, to)| (number(from), number(to))).collect(), *is_inverted)
    }

    #[test]
    fn ports_are_read_in_both_forms() {
        let words = |words: &[u16]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        // 22, 51820:51829, 53
        let mut list = vec![1, 4];
        list.extend(words(&[22, 51820, 51829, 53, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        list.extend([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let multiport = |list: Vec<u8>| matches(&attributes("multiport", 1, list));
        assert_eq!(ranges(&multiport(list.clone()).unwrap()), (vec![(22, 22), (51820, 51829), (53, 53)], false));
        list[47] = 1;
        assert!(ranges(&multiport(list.clone()).unwrap()).1);
        list[0] = 0;
        assert_eq!(multiport(list.clone()), None, "source ports");
        assert_eq!(multiport(list[..20].to_vec()), None, "cut off");
        let mut one = words(&[0, u16::MAX, 51820, 51821]);
        one.extend([2, 0]);
        assert_eq!(ranges(&matches(&attributes("udp", 0, one)).unwrap()), (vec![(51820, 51821)], true));
    }

    #[test]
    fn states_and_types_are_read_and_the_rest_is_unknown() {
        let mut info = vec![0; 160];
        info[146..148].copy_from_slice(&1_u16.to_ne_bytes());
        info[150..152].copy_from_slice(&6_u16.to_ne_bytes());
        let Some(steps) = matches(&attributes("conntrack", 3, info.clone())) else { panic!("it is known") };
        assert!(matches!(&steps[1], Step::Mask { mask, .. } if *mask == 6_u32.to_ne_bytes()), "{steps:?}");
        info[146..148].copy_from_slice(&3_u16.to_ne_bytes());
        assert_eq!(matches(&attributes("conntrack", 3, info)), None, "it asks for more than the state");
        let local = [[0, 0], LOCAL.to_ne_bytes(), [0, 0], [0, 0]].concat();
        assert!(matches(&attributes("addrtype", 1, local)).is_some());
        assert_eq!(matches(&attributes("recent", 0, Vec::new())), None);
        assert_eq!(target(&attributes("REJECT", 0, vec![0; 4])), Some(vec![Step::Verdict(Verdict::Drop)]));
        assert_eq!(target(&attributes("LOG", 0, vec![0; 4])), None);
    }
}
