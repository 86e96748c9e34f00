//! From the messages of nftables to [`crate::plan::firewall::ruleset`]. What is not understood becomes a step that is
//! not known to hold.

use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, Cmp, DataAttribute, ExpressionAttribute, Expressions, Hook as HookAttribute, HookNumber,
    Immediate, InetHookNumber, ListAttribute, Lookup, Meta, MetaKey, Operator as CmpOperator, Payload, Register,
    RuleAttribute, SetElementAttribute, SetElementFlags, SetElementList, Verdict as VerdictCode, VerdictAttribute,
};
use rtnetlink::packet_core::{DefaultNla, Nla as _, NlasIterator};

use super::xtables::{self, bytes};
use crate::plan::firewall::ruleset::{Base, Chain, Element, Family, Field, Hook, Operator, Step, Verdict};

/// `NF_DROP`, `NF_ACCEPT`. Source: include/uapi/linux/netfilter.h.
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
/// `NFT_PAYLOAD_NETWORK_HEADER`, `NFT_PAYLOAD_TRANSPORT_HEADER`. This and what follows:
/// `include/uapi/linux/netfilter/nf_tables.h`.
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// Attributes and values of `ct`, `fib` and `range`.
const CT_REGISTER: u16 = 1;
const CT_KEY: u16 = 2;
const CT_STATE: u32 = 0;
const FIB_REGISTER: u16 = 1;
const FIB_RESULT: u16 = 2;
const FIB_FLAGS: u16 = 3;
const FIB_RESULT_TYPE: u32 = 3;
/// Only the destination address, not the interface.
const FIB_DESTINATION: u32 = 1 << 1;
const RANGE_REGISTER: u16 = 1;
const RANGE_OPERATOR: u16 = 2;
const RANGE_FROM: u16 = 3;
const RANGE_TO: u16 = 4;
const RANGE_OUTSIDE: u32 = 1;
/// `NFTA_DATA_VALUE`
const DATA_VALUE: u16 = 1;

/// A chain without its rules. `None`: it has no name.
pub fn chain(family: Family, attributes: Vec<ChainAttribute>) -> Option<Chain> {
    let (mut table, mut name, mut policy, mut hook) = (None, None, NF_ACCEPT, None);
    for attribute in attributes {
        match attribute {
            ChainAttribute::Table(text) => table = Some(text),
            ChainAttribute::Name(text) => name = Some(text),
            ChainAttribute::Policy(value) => policy = value,
            ChainAttribute::Hook(attributes) => hook = Some(attributes),
            _ => {}
        }
    }
    let base = hook.and_then(|attributes| base(&attributes, policy == NF_DROP));
    Some(Chain { family, table: table?, name: name?, base, rules: Vec::new() })
}

/// `None`: a hook that is of no interest.
fn base(attributes: &[HookAttribute], drops: bool) -> Option<Base> {
    let hook = attributes.iter().find_map(|attribute| match attribute {
        HookAttribute::Number(HookNumber::Inet(InetHookNumber::LocalIn)) => Some(Hook::Input),
        HookAttribute::Number(HookNumber::Inet(InetHookNumber::Forward)) => Some(Hook::Forward),
        _ => None,
    })?;
    let priority = attributes.iter().find_map(|attribute| match attribute {
        HookAttribute::Priority(priority) => Some(priority.cast_signed()),
        _ => None,
    });
    Some(Base { hook, priority: priority.unwrap_or(0), drops })
}

/// A rule's table, chain and steps.
pub fn rule(attributes: Vec<RuleAttribute>) -> (String, String, Vec<Step>) {
    let (mut table, mut chain, mut steps) = (String::new(), String::new(), Vec::new());
    for attribute in attributes {
        match attribute {
            RuleAttribute::Table(text) => table = text,
            RuleAttribute::Chain(text) => chain = text,
            RuleAttribute::Expressions(list) => {
                for entry in list {
                    let ListAttribute::Element(parts) = entry else { continue };
                    let data = parts.into_iter().find_map(|part| match part {
                        ExpressionAttribute::Data(data) => Some(data),
                        _ => None,
                    });
                    steps.extend(
                        data.map_or(vec![Step::Unknown], |data| expression(&data).unwrap_or(vec![Step::Unknown])),
                    );
                }
            }
            _ => {}
        }
    }
    (table, chain, steps)
}

/// `None`: an attribute is missing.
fn expression(data: &Expressions) -> Option<Vec<Step>> {
    Some(vec![match data {
        Expressions::Meta(parts) => {
            let register = parts.iter().find_map(|part| match part {
                Meta::DestinationRegister(register) => Some(number(*register)),
                _ => None,
            });
            // Without one, the expression sets a mark or the like.
            let Some(register) = register else { return Some(Vec::new()) };
            let field = parts.iter().find_map(|part| match part {
                Meta::Key(key) => Some(meta(*key)),
                _ => None,
            })?;
            Step::Load { register, field, length: None }
        }
        Expressions::Payload(parts) => payload(parts)?,
        Expressions::Bitwise(parts) => bitwise(parts)?,
        Expressions::Cmp(parts) => cmp(parts)?,
        Expressions::Lookup(parts) => lookup(parts)?,
        Expressions::Immediate(parts) => {
            let data = parts.iter().find_map(|part| match part {
                Immediate::Data(data) => Some(data),
                _ => None,
            })?;
            // Another value than a verdict is for a later expression, such as a translated address.
            match data {
                DataAttribute::Verdict(parts) => Step::Verdict(verdict(parts)),
                _ => return Some(Vec::new()),
            }
        }
        Expressions::Other { expression_type, attributes } => return other(expression_type, attributes),
        _ => Step::Unknown,
    }])
}

const fn meta(key: MetaKey) -> Field {
    match key {
        MetaKey::Nfproto => Field::Family,
        MetaKey::EtherTypeProtocol => Field::EtherType,
        MetaKey::L4Proto => Field::Protocol,
        MetaKey::Iifname => Field::InputDevice,
        MetaKey::Oifname => Field::OutputDevice,
        MetaKey::PacketType => Field::PacketType,
        _ => Field::Unknown,
    }
}

fn payload(parts: &[Payload]) -> Option<Step> {
    let (mut register, mut base, mut offset, mut length) = (None, None, None, None);
    for part in parts {
        match part {
            Payload::DestinationRegister(to) => register = Some(number(*to)),
            Payload::Base(value) => base = Some(*value),
            Payload::Offset(value) => offset = Some(*value),
            Payload::Len(value) => length = usize::try_from(*value).ok(),
            _ => {}
        }
    }
    let field = match base? {
        NETWORK_HEADER => Field::Network(offset?),
        TRANSPORT_HEADER => Field::Transport(offset?),
        _ => Field::Unknown,
    };
    Some(Step::Load { register: register?, field, length })
}

fn bitwise(parts: &[Bitwise]) -> Option<Step> {
    let (mut from, mut to, mut mask, mut xor) = (None, None, None, None);
    for part in parts {
        match part {
            Bitwise::SourceRegister(register) => from = Some(number(*register)),
            Bitwise::DestinationRegister(register) => to = Some(number(*register)),
            Bitwise::Mask(DataAttribute::Value(value)) => mask = Some(value.clone()),
            Bitwise::Xor(DataAttribute::Value(value)) => xor = Some(value.clone()),
            // 0 is the one with mask and xor; others shift.
            Bitwise::Op(operation) if *operation != 0 => {
                return Some(Step::Load { register: to?, field: Field::Unknown, length: None });
            }
            _ => {}
        }
    }
    Some(Step::Mask { from: from?, to: to?, mask: mask?, xor: xor? })
}

fn cmp(parts: &[Cmp]) -> Option<Step> {
    let (mut register, mut operator, mut data) = (None, None, None);
    for part in parts {
        match part {
            Cmp::SourceRegister(from) => register = Some(number(*from)),
            Cmp::Op(operation) => {
                operator = Some(match operation {
                    CmpOperator::Equal => Operator::Equal,
                    CmpOperator::NotEqual => Operator::NotEqual,
                    CmpOperator::LessThan => Operator::Less,
                    CmpOperator::LessThanEqual => Operator::LessOrEqual,
                    CmpOperator::GreaterThan => Operator::Greater,
                    CmpOperator::GreatherThanEqual => Operator::GreaterOrEqual,
                    _ => return None,
                });
            }
            Cmp::Data(DataAttribute::Value(value)) => data = Some(value.clone()),
            _ => {}
        }
    }
    Some(Step::Compare { register: register?, operator: operator?, data: data? })
}

fn lookup(parts: &[Lookup]) -> Option<Step> {
    let (mut register, mut set, mut is_inverted, mut is_map) = (None, None, false, false);
    for part in parts {
        match part {
            Lookup::SourceRegister(from) => register = Some(number(*from)),
            Lookup::Set(name) => set = Some(name.clone()),
            Lookup::Flags(flags) => is_inverted = flags & 1 != 0,
            // A verdict map. Another map gives a value for a later expression.
            Lookup::DestinationRegister(Register::Verdict) => is_map = true,
            Lookup::DestinationRegister(to) => {
                return Some(Step::Load { register: number(*to), field: Field::Unknown, length: None });
            }
            _ => {}
        }
    }
    Some(Step::Lookup { register: register?, set: set?, is_inverted, is_map })
}

fn other(name: &str, attributes: &[DefaultNla]) -> Option<Vec<Step>> {
    let value = |kind: u16| attributes.iter().find(|attribute| attribute.kind() == kind).map(bytes);
    let word = |kind: u16| Some(u32::from_be_bytes(value(kind)?.try_into().ok()?));
    Some(vec![match name {
        // None of these decides.
        "counter" | "log" | "notrack" | "objref" => return Some(Vec::new()),
        "reject" => Step::Verdict(Verdict::Drop),
        "ct" => {
            let Some(register) = word(CT_REGISTER) else { return Some(Vec::new()) };
            let field = if word(CT_KEY)? == CT_STATE { Field::ConnectionState } else { Field::Unknown };
            Step::Load { register: number(register.into()), field, length: None }
        }
        "fib" => {
            let is_type = word(FIB_RESULT)? == FIB_RESULT_TYPE && word(FIB_FLAGS)? == FIB_DESTINATION;
            let field = if is_type { Field::DestinationType } else { Field::Unknown };
            Step::Load { register: number(word(FIB_REGISTER)?.into()), field, length: None }
        }
        "range" => Step::Within {
            register: number(word(RANGE_REGISTER)?.into()),
            ranges: vec![(nested(&value(RANGE_FROM)?)?, nested(&value(RANGE_TO)?)?)],
            is_inverted: word(RANGE_OPERATOR)? == RANGE_OUTSIDE,
        },
        "match" => return Some(xtables::matches(attributes).unwrap_or(vec![Step::Unknown])),
        "target" => return Some(xtables::target(attributes).unwrap_or_default()),
        _ => Step::Unknown,
    }])
}

/// The value in a nested `NFTA_DATA_VALUE`.
fn nested(data: &[u8]) -> Option<Vec<u8>> {
    NlasIterator::new(data).flatten().find(|nla| nla.kind() == DATA_VALUE).map(|nla| nla.value().to_vec())
}

fn verdict(parts: &[VerdictAttribute]) -> Verdict {
    let chain = parts.iter().find_map(|part| match part {
        VerdictAttribute::Chain(name) => Some(name.clone()),
        _ => None,
    });
    let code = parts.iter().find_map(|part| match part {
        VerdictAttribute::Code(code) => Some(*code),
        _ => None,
    });
    match (code, chain) {
        (Some(VerdictCode::Jump), Some(chain)) => Verdict::Jump(chain),
        (Some(VerdictCode::Goto), Some(chain)) => Verdict::Goto(chain),
        (Some(VerdictCode::Return), _) => Verdict::Return,
        (Some(VerdictCode::Continue | VerdictCode::Break), _) => Verdict::Continue,
        (Some(VerdictCode::Other(NF_ACCEPT)), _) => Verdict::Accept,
        (Some(VerdictCode::Other(NF_DROP)), _) => Verdict::Drop,
        _ => Verdict::Other,
    }
}

/// The elements of one message. `None`: of a kind that is not understood.
pub fn elements(attributes: Vec<SetElementList>) -> Option<Vec<Element>> {
    let mut elements = Vec::new();
    for attribute in attributes {
        let SetElementList::Elements(list) = attribute else { continue };
        for entry in list {
            let ListAttribute::Element(parts) = entry else { continue };
            let (mut key, mut is_end, mut found) = (None, false, None);
            for part in parts {
                match part {
                    SetElementAttribute::Key(DataAttribute::Value(value)) => key = Some(value),
                    SetElementAttribute::Flags(flags) if flags.contains(SetElementFlags::CatchAll) => return None,
                    SetElementAttribute::Flags(flags) => is_end = flags.contains(SetElementFlags::IntervalEnd),
                    SetElementAttribute::Data(DataAttribute::Verdict(parts)) => found = Some(verdict(&parts)),
                    // Among them the end of a concatenated range.
                    SetElementAttribute::Other(_) => return None,
                    _ => {}
                }
            }
            elements.push(Element { key: key?, is_end, verdict: found });
        }
    }
    Some(elements)
}

/// The number of a register in units of 4 bytes, as `NFT_REG32_*` are numbered: a register of 16 bytes is four of them.
fn number(register: Register) -> u32 {
    match u32::from(register) {
        wide @ 1..=4 => 8 + 4 * (wide - 1),
        narrow => narrow,
    }
}
