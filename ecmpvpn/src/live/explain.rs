//! Explains where a flow goes and why. It makes the same decision as the programs, on a copy of the maps, and changes
//! nothing.

use std::net::IpAddr;

use ecmpvpn_common::decide::{Verdict, decide};
use ecmpvpn_common::flow::{FlowKey, mix};
use ecmpvpn_common::layout::{Bucket, Policy, Reason, TunnelId, how, peer_flags, rule_flags, settings_flags};
use ecmpvpn_common::order::carrier;
use ecmpvpn_common::packet::{Packet, parse, tolerates_reordering};
use ecmpvpn_common::rules::{NONE, first, marks};
use ecmpvpn_common::tables::Tables as _;

use crate::dataplane::{DataplaneError, Pins, RuleMaps, Snapshot, View};

/// A packet of the flow that is asked about.
#[derive(Clone, Debug)]
pub struct Probe {
    bytes: Vec<u8>,
    mark: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct Flow {
    pub src: IpAddr,
    /// Of the same family as `src`.
    pub dst: IpAddr,
    /// IP protocol number.
    pub proto: u8,
    /// Source and destination port, where the protocol has them.
    pub ports: (u16, u16),
    /// SPI, GRE key or echo identifier, where the protocol has one.
    pub id: u32,
    /// Differentiated services code point.
    pub dscp: u8,
    pub mark: u32,
}

/// Where the flow's next packet goes.
#[derive(Clone, Debug)]
pub struct Answer {
    pub key: FlowKey,
    /// Number of the peer that the destination belongs to.
    pub peer: Option<u32>,
    /// Bit of the rule that the flow matches.
    pub rule: Option<u32>,
    /// The rule's policy if it has one, else the peer's.
    pub policy: Policy,
    /// Whether the flow's packets must stay in order: they are not sprayed, whatever the policy.
    pub ordered: bool,
    /// Whether the far end restores the order of the flow's packets if they are sprayed.
    pub stamped: bool,
    /// Hash of the flow key and of the rule.
    pub hash: u64,
    /// The tunnel, or why there is none.
    pub verdict: Result<Found, Reason>,
}

/// The tunnel of the flow's next packet.
#[derive(Clone, Debug)]
pub struct Found {
    pub tunnel: TunnelId,
    /// Index of the bucket among all peers' buckets.
    pub bucket: u32,
    /// The bucket's tunnel before that packet.
    pub current: TunnelId,
    /// Time since the bucket's last packet, nanoseconds; `None` if it had none.
    pub idle_ns: Option<u64>,
    pub why: Why,
    /// The tunnel that the packet would take if this one were down.
    pub next: Option<TunnelId>,
}

/// Why a flow's next packet takes its tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A pin asks for the tunnel.
    Pinned,
    /// A tunnel is chosen for each packet.
    Sprayed,
    /// The tunnel is the bucket's home.
    Home,
    /// The rule does not allow the bucket's home.
    Rule,
    /// The bucket's home is down.
    Failover,
    /// The bucket's home is being drained.
    Drained,
    /// The bucket stays on the tunnel of an earlier choice until it pauses.
    Stays,
    /// The bucket pauses, and this link is the least loaded.
    Flowlet,
}

impl Probe {
    /// A packet of `flow`.
    pub fn of(flow: &Flow) -> Self {
        const ECHO: [u8; 2] = [8, 128];
        let transport = match flow.proto {
            // Echo requests. The ICMP types of IPv4 and IPv6 differ.
            1 | 58 => {
                let [high, low, ..] = (flow.id << 16).to_be_bytes();
                vec![ECHO[usize::from(flow.proto == 58)], 0, 0, 0, high, low, 0, 0]
            }
            // GRE, with a key if one is given.
            47 => [&[if flow.id == 0 { 0 } else { 0x20 }, 0, 8, 0][..], &flow.id.to_be_bytes()].concat(),
            50 => [flow.id.to_be_bytes(), [0; 4]].concat(),
            51 => [[0; 4], flow.id.to_be_bytes()].concat(),
            _ => [flow.ports.0.to_be_bytes(), flow.ports.1.to_be_bytes()].concat(),
        };
        let payload = [transport, vec![0; 32]].concat();
        let length = u16::try_from(payload.len()).unwrap_or_default();
        let bytes = match (flow.src, flow.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let [high, low] = (length + 20).to_be_bytes();
                // It must not be fragmented, as what most hosts send.
                let head = [0x45, flow.dscp << 2, high, low, 0, 0, 0x40, 0, 64, flow.proto, 0, 0];
                [&head[..], &src.octets(), &dst.octets(), &payload].concat()
            }
            (src, dst) => {
                let octets = |address: IpAddr| match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                    IpAddr::V6(address) => address.octets(),
                };
                let [high, low] = length.to_be_bytes();
                let head = [0x60 | flow.dscp >> 2, (flow.dscp & 3) << 6, 0, 0, high, low, flow.proto, 64];
                [&head[..], &octets(src), &octets(dst), &payload].concat()
            }
        };
        Self { bytes, mark: flow.mark }
    }

    /// The packet from its network header on.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Packet for Probe {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        self.bytes[..].load(offset)
    }

    fn length(&self) -> u32 {
        self.bytes[..].length()
    }

    fn mark(&self) -> u32 {
        self.mark
    }
}

/// Says where the packet would go now, and why.
///
/// # Errors
/// The maps cannot be read.
pub fn ask(pins: &Pins, view: &View, rules: &RuleMaps, probe: &Probe) -> Result<Answer, DataplaneError> {
    let tables = Snapshot::take(pins, view, rules)?;
    let mut answer = Answer {
        key: FlowKey::default(),
        peer: None,
        rule: None,
        policy: Policy::Hash,
        ordered: false,
        stamped: false,
        hash: 0,
        verdict: Err(Reason::NotIp),
    };
    let parsed = match parse(probe) {
        Ok(parsed) => parsed,
        Err(reason) => return Ok(Answer { verdict: Err(reason), ..answer }),
    };
    answer.key = parsed.key;
    let settings = view.settings();
    answer.hash = parsed.key.hash(settings.seed, settings.hash_fields, settings.flags & settings_flags::SYMMETRIC != 0);
    answer.peer = tables.peer_of(&parsed.destination);
    let Some(record) = answer.peer.and_then(|peer| view.peer(peer)) else {
        return Ok(Answer { verdict: Err(Reason::NoPeer), ..answer });
    };
    answer.policy = record.policy();
    answer.rule = Some(first(&tables, &parsed.outer(), marks(probe), record.rules.get())).filter(|rule| *rule != NONE);
    answer.stamped = record.flags.get() & peer_flags::STAMP != 0 && carrier(probe).is_some();
    answer.ordered = !answer.stamped && !tolerates_reordering(parsed.transport.protocol, &parsed.key);
    if let Some(rule) = answer.rule {
        answer.hash = mix(answer.hash ^ u64::from(rule + 1));
        if let Some(record) = tables.rule(rule) {
            answer.policy = record.policy(answer.policy);
            answer.ordered &= record.flags.get() & rule_flags::SPRAY_ANY == 0;
        }
    }
    answer.verdict = match decide(probe, &tables) {
        Verdict::NotSteered(reason) | Verdict::Dropped(reason) => Err(reason),
        Verdict::Steer(steer) => {
            let bucket = view.bucket_record(steer.bucket).cloned().unwrap_or_default();
            let last = bucket.last_ns.get();
            let without = Snapshot::take(pins, view, rules)?;
            let why = why(&without, &answer, steer.tunnel, &bucket, steer.how);
            without.mark_down(steer.tunnel);
            let next = match decide(probe, &without) {
                Verdict::Steer(next) => Some(next.tunnel),
                Verdict::NotSteered(_) | Verdict::Dropped(_) => None,
            };
            Ok(Found {
                tunnel: steer.tunnel,
                bucket: steer.bucket,
                current: TunnelId::new(steer.tunnel.peer(), u32::from(bucket.tunnel.get())),
                idle_ns: (last != 0).then(|| tables.now_ns().saturating_sub(last)),
                why,
                next,
            })
        }
    };
    Ok(answer)
}

fn why(tables: &Snapshot<'_>, answer: &Answer, tunnel: TunnelId, bucket: &Bucket, how: u32) -> Why {
    let has = |mask: u32, slot: u32| mask.checked_shr(slot).unwrap_or(0) & 1 == 1;
    let (peer, slot) = (tunnel.peer(), tunnel.slot());
    let (live, open) = tables.peer(peer).map_or((0, 0), |record| (record.live.get(), record.open.get()));
    let allowed = answer.rule.map_or(u32::MAX, |rule| tables.rule_tunnels(rule, peer));
    let pins =
        answer.rule.and_then(|rule| tables.rule(rule)).is_some_and(|rule| rule.flags.get() & rule_flags::PREFER != 0);
    let (home, current) = (u32::from(bucket.home.get()), u32::from(bucket.tunnel.get()));
    let is_ranked = answer.policy.is_by_rank();
    if how & how::SPRAYED != 0 {
        Why::Sprayed
    } else if pins && has(allowed, slot) {
        Why::Pinned
    } else if slot == home && (is_ranked || bucket.last_ns.get() == 0) {
        Why::Home
    } else if !is_ranked && how & how::FLOWLET != 0 {
        Why::Flowlet
    } else if is_ranked && !has(live, home) || !is_ranked && how & how::FAILOVER != 0 && !has(live, current) {
        Why::Failover
    } else if is_ranked && !has(allowed, home) || how & how::FAILOVER != 0 && !has(allowed, current) {
        Why::Rule
    } else if is_ranked && !has(open, home) {
        Why::Drained
    } else {
        Why::Stays
    }
}
