//! Finds the rule that a packet matches: the first of up to 64. The number of look-ups does not depend on the number of
//! rules.
//!
//! For each field there is a table from its value to the set of rules that this value matches. The packet matches the
//! rules that are in the sets of all its fields. Source: Lakshman, Stiliadis, "High-speed policy-based packet
//! forwarding using efficient multi-dimensional range matching", SIGCOMM 1998.

use crate::flow::{FlowKey, IPV4};
use crate::layout::{Address, rule_fields};
use crate::packet::Packet;
use crate::tables::Tables;

/// No rule matches.
pub const NONE: u32 = u32::MAX;

/// The number of the first of `candidates` (one bit per rule) that a packet matches, or [`NONE`]. `key` is the packet's
/// own ([`crate::packet::Parsed::outer`]): an ICMP error matches by itself, and not by what it quotes. Fragments and packets without ports match no rule that names ports.
/// `marks` is the result of [`marks`].
#[inline(always)]
pub fn first<T: Tables + ?Sized>(tables: &T, key: &FlowKey, marks: u64, candidates: u64) -> u32 {
    let (mark, dscp) = (marks as u32, (marks >> 32) as u32 & 63);
    let mut rules = candidates & field(tables, rule_fields::PROTOCOL + u32::from(key.protocol));
    rules &= field(tables, rule_fields::DSCP + dscp);
    if key.sport | key.dport == 0 {
        rules &= field(tables, rule_fields::NO_PORTS);
    } else {
        rules &= field(tables, rule_fields::SOURCE_PORT + u32::from(u16::from_be(key.sport)));
        rules &= field(tables, rule_fields::DESTINATION_PORT + u32::from(u16::from_be(key.dport)));
    }
    rules &= tables.rules_of_mark(mark).unwrap_or_else(|| field(tables, rule_fields::NO_MARK));
    let family = u32::from(key.family);
    rules &= tables.rules_of_source(&Address { family, address: key.src });
    rules &= tables.rules_of_destination(&Address { family, address: key.dst });
    if rules == 0 { NONE } else { rules.trailing_zeros() }
}

#[inline(always)]
fn field<T: Tables + ?Sized>(tables: &T, at: u32) -> u64 {
    tables.rule_field(at).map_or(0, |set| set.rules.get())
}

/// A packet's firewall mark in the low word, and its differentiated services code point (DSCP) in the high word.
/// Source: RFC 2474.
#[inline(always)]
pub fn marks<P: Packet + ?Sized>(packet: &P) -> u64 {
    let [word] = packet.load(0).unwrap_or([0]);
    let [first, second, ..] = word.to_ne_bytes();
    let dscp = if first >> 4 == IPV4 { second >> 2 } else { (first & 0x0f) << 2 | second >> 6 };
    u64::from(dscp) << 32 | u64::from(packet.mark())
}
