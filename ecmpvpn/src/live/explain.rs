//! Where a flow goes and why: the very decision of the programs, made on a copy of the maps. Changes nothing.

use std::net::IpAddr;

use ecmpvpn_common::decide::{Verdict, decide, is_sprayed};
use ecmpvpn_common::flow::{FlowKey, mix};
use ecmpvpn_common::layout::{
    Bucket, MAX_TUNNELS_PER_PEER, Policy, Reason, how, rule_flags::PREFER, settings_flags, tunnel_id,
};
use ecmpvpn_common::packet::{Packet, parse};
use ecmpvpn_common::rules::{NONE, first, marks};
use ecmpvpn_common::tables::Tables as _;

use crate::dataplane::{DataplaneError, Pins, RuleMaps, Snapshot, View};

/// A packet of the flow that is asked about.
#[derive(Clone, Debug)]
pub struct Probe {
    bytes: Vec<u8>,
    mark: u32,
}

/// A flow.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address, of the same family.
    pub dst: IpAddr,
    /// IP protocol number.
    pub proto: u8,
    /// Source and destination port, where the protocol has them.
    pub ports: (u16, u16),
    /// SPI, GRE key or echo identifier, where the protocol has one.
    pub id: u32,
    /// Differentiated services code point.
    pub dscp: u8,
    /// Firewall mark.
    pub mark: u32,
}

/// Where the flow's next packet goes.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What the flow is told by.
    pub key: FlowKey,
    /// The peer that its destination leads to.
    pub peer: Option<u32>,
    /// The bit of the rule that it meets.
    pub rule: Option<u32>,
    /// Of the rule if it has one, else of the peer.
    pub policy: Policy,
    /// The flow hash.
    pub hash: u64,
    /// The tunnel, or why there is none.
    pub verdict: Result<Found, Reason>,
}

/// The tunnel of the flow's next packet.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its id.
    pub tunnel: u32,
    /// The bucket, by its place among all peers' buckets.
    pub bucket: u32,
    /// The tunnel whose id the bucket had before that packet.
    pub current: u32,
    /// Since the bucket's last packet, nanoseconds; `None`: it had none.
    pub idle_ns: Option<u64>,
    /// Why this tunnel.
    pub why: Why,
    /// The tunnel that would be taken were this one down, by its id.
    pub next: Option<u32>,
}

/// Why a flow's next packet takes its tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A pin says so.
    Pinned,
    /// It is chosen for each packet.
    Sprayed,
    /// The bucket belongs there.
    Home,
    /// The rule does not allow the bucket's home.
    Rule,
    /// The bucket's home is down.
    Failover,
    /// The bucket's home is being drained.
    Drained,
    /// The bucket stays where an earlier choice has put it, until it pauses.
    Stays,
    /// The bucket pauses, and this link is the least loaded.
    Flowlet,
}

impl Probe {
    /// A packet of `flow`.
    pub fn of(flow: &Flow) -> Self {
        const ECHO: [u8; 2] = [8, 128];
        let transport = match flow.proto {
            // Echo requests; IPv4's and IPv6's kinds differ.
            1 | 58 => {
                let [high, low, ..] = (flow.id << 16).to_be_bytes();
                vec![ECHO[usize::from(flow.proto == 58)], 0, 0, 0, high, low, 0, 0]
            }
            // With a key where one is asked for.
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
                let head = [0x45, flow.dscp << 2, high, low, 0, 0, 0, 0, 64, flow.proto, 0, 0];
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

    /// From its network header on.
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

/// Where the packet would go now.
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
    answer.rule = Some(first(&tables, &parsed.key, marks(probe), record.rules.get())).filter(|rule| *rule != NONE);
    if let Some(rule) = answer.rule {
        answer.hash = mix(answer.hash ^ u64::from(rule + 1));
        let own = tables.rule(rule).and_then(|rule| Policy::of(rule.policy.get()));
        answer.policy = own.unwrap_or(answer.policy);
    }
    answer.verdict = match decide(probe, &tables) {
        Verdict::NotSteered(reason) | Verdict::Dropped(reason) => Err(reason),
        Verdict::Steer(steer) => {
            let bucket = view.bucket_record(steer.bucket).cloned().unwrap_or_default();
            let (peer, slot) = (steer.tunnel / MAX_TUNNELS_PER_PEER, steer.tunnel % MAX_TUNNELS_PER_PEER);
            let last = bucket.last_ns.get();
            let without = Snapshot::take(pins, view, rules)?;
            let why = why(&without, &answer, (peer, slot), &bucket, steer.how);
            without.kill(peer, slot);
            let next = match decide(probe, &without) {
                Verdict::Steer(next) => Some(next.tunnel),
                Verdict::NotSteered(_) | Verdict::Dropped(_) => None,
            };
            Ok(Found {
                tunnel: steer.tunnel,
                bucket: steer.bucket,
                current: tunnel_id(peer, u32::from(bucket.tunnel.get())),
                idle_ns: (last != 0).then(|| tables.now_ns().saturating_sub(last)),
                why,
                next,
            })
        }
    };
    Ok(answer)
}

fn why(tables: &Snapshot<'_>, answer: &Answer, (peer, slot): (u32, u32), bucket: &Bucket, how: u32) -> Why {
    let has = |mask: u32, slot: u32| mask.checked_shr(slot).unwrap_or(0) & 1 == 1;
    let (live, open) = tables.peer(peer).map_or((0, 0), |record| (record.live.get(), record.open.get()));
    let allowed = answer.rule.map_or(u32::MAX, |rule| tables.rule_tunnels(rule, peer));
    let pins = answer.rule.and_then(|rule| tables.rule(rule)).is_some_and(|rule| rule.flags.get() & PREFER != 0);
    let (home, current) = (u32::from(bucket.home.get()), u32::from(bucket.tunnel.get()));
    let is_hash = answer.policy == Policy::Hash;
    if is_sprayed(answer.policy, bucket.flags.get()) {
        Why::Sprayed
    } else if pins && has(allowed, slot) {
        Why::Pinned
    } else if slot == home && (is_hash || bucket.last_ns.get() == 0) {
        Why::Home
    } else if !is_hash && how & how::FLOWLET != 0 {
        Why::Flowlet
    } else if is_hash && !has(live, home) || !is_hash && how & how::FAILOVER != 0 && !has(live, current) {
        Why::Failover
    } else if is_hash && !has(allowed, home) || how & how::FAILOVER != 0 && !has(allowed, current) {
        Why::Rule
    } else if is_hash && !has(open, home) {
        Why::Drained
    } else {
        Why::Stays
    }
}
