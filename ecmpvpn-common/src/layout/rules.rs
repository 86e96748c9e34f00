//! Records of steering rules.

use super::records::Policy;
use crate::shared::Shared;

/// Value of [`Rule::policy`] for a rule without a policy: the peer's policy applies.
pub const PEERS_OWN: u32 = u32::MAX;

/// What a rule does with the packets that match it.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Rule {
    /// Number of a [`Policy`], or [`PEERS_OWN`].
    pub policy: Shared<u32>,
    /// Bits of [`rule_flags`].
    pub flags: Shared<u32>,
}

impl Rule {
    /// The policy of the packets that match the rule; `peers_own` is the policy of their peer.
    #[must_use]
    #[inline(always)]
    pub fn policy(&self, peers_own: Policy) -> Policy {
        let number = self.policy.get();
        Policy::of_bits(if number == PEERS_OWN { peers_own.number() } else { number })
    }
}

/// Bits of [`Rule::flags`].
pub mod rule_flags {
    /// If no allowed tunnel is up, the peer's other tunnels are used. Without this flag the packet is dropped then.
    pub const PREFER: u32 = 1 << 0;
    /// The rule's policy is `spray`, and the rule names a protocol: its packets are sprayed whether or not the protocol
    /// tolerates reordering.
    pub const SPRAY_ANY: u32 = 1 << 1;
}

/// Tunnels that a rule allows for one peer's packets.
#[repr(C)]
#[derive(Debug, Default)]
pub struct TunnelSet {
    /// One bit per slot.
    pub tunnels: Shared<u32>,
    /// Zero. It is needed because the kernel places the entries of an array 8 bytes apart.
    pub padding: u32,
}

/// A set of rules, one bit per rule.
#[repr(C)]
#[derive(Debug, Default)]
pub struct RuleSet {
    /// Rule 0 is the lowest bit.
    pub rules: Shared<u64>,
}

/// Indexes of [`super::maps::RULE_FIELDS`]. Each entry holds the rules that one value of a field matches.
pub mod rule_fields {
    /// First entry for IP protocol numbers.
    pub const PROTOCOL: u32 = 0;
    /// First entry for differentiated services code points (DSCP).
    pub const DSCP: u32 = 256;
    /// Rules that name no mark.
    pub const NO_MARK: u32 = 320;
    /// Rules that name no ports: a packet without ports can match only these.
    pub const NO_PORTS: u32 = 321;
    /// First entry for source ports.
    pub const SOURCE_PORT: u32 = 1 << 16;
    /// First entry for destination ports.
    pub const DESTINATION_PORT: u32 = 2 << 16;
    /// Number of entries.
    pub const COUNT: u32 = 3 << 16;
}
