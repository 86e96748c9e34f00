//! Reads the packet filter's rules (nftables) over netlink. Changes nothing. `plan::firewall` judges them.

mod translate;
mod xtables;

use std::io;
use std::time::Duration;

use futures_util::StreamExt as _;
use netlink_packet_netfilter::nftables::{
    ChainMessage, NfTablesMessage, RuleMessage, SetElementList, SetElementMessage,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::proto::{ConnectionHandle, new_connection};
use rtnetlink::sys::SocketAddr;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use crate::plan::Plan;
use crate::plan::firewall::ruleset::{Chain, Family, Ruleset, Set, Step};
use crate::plan::firewall::{Finding, findings};

/// How long reading may take. More than enough for ten thousands of rules.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Firewall {
    Rules(Ruleset),
    /// This process may not look: that needs `CAP_NET_ADMIN`.
    NotPermitted,
    /// This kernel has no nftables.
    Absent,
}

/// What the rules mean for a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judged {
    /// The chains that could drop what must pass.
    Findings(Vec<Finding>),
    /// Why the rules were not looked at, as a sentence.
    NotLookedAt(String),
}

/// Reads the rules of the calling thread's network namespace, and judges them. Must be called within a tokio runtime.
pub async fn judge(plan: &Plan) -> Judged {
    match look().await {
        Ok(Firewall::Rules(ruleset)) => Judged::Findings(findings(plan, &ruleset)),
        Ok(Firewall::Absent) => Judged::Findings(Vec::new()),
        Ok(Firewall::NotPermitted) => Judged::NotLookedAt(
            "the firewall of this host was not looked at: that needs CAP_NET_ADMIN, so run it with sudo".to_owned(),
        ),
        Err(error) => Judged::NotLookedAt(format!("the firewall of this host could not be looked at: {error}")),
    }
}

/// Reads the rules of the calling thread's network namespace. Must be called within a tokio runtime.
///
/// # Errors
/// The kernel refuses, or reading takes too long.
pub async fn look() -> io::Result<Firewall> {
    match tokio::time::timeout(PATIENCE, read()).await {
        Ok(Ok(ruleset)) => Ok(Firewall::Rules(ruleset)),
        Ok(Err(error)) => match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Ok(Firewall::NotPermitted),
            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT) => Ok(Firewall::Absent),
            _ => Err(error),
        },
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "reading its rules takes too long")),
    }
}

/// A connection to nftables.
struct Netfilter(ConnectionHandle<NetfilterMessage>);

impl Netfilter {
    /// Asks for a dump, and returns its messages with the families of their tables.
    async fn dump(
        &self,
        family: NetfilterProtoFamily,
        question: NfTablesMessage,
    ) -> io::Result<Vec<(Family, NfTablesMessage)>> {
        let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), question);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = self.0.request(message, SocketAddr::new(0, 0)).map_err(io::Error::other)?;
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(NetfilterMessage {
                    header,
                    inner: NetfilterMessageInner::NfTables(message),
                    ..
                }) => found.extend(family_of(header.family).map(|family| (family, message))),
                _ => {}
            }
        }
        Ok(found)
    }
}

const fn family_of(family: NetfilterProtoFamily) -> Option<Family> {
    match family {
        NetfilterProtoFamily::Inet => Some(Family::Inet),
        NetfilterProtoFamily::IPv4 => Some(Family::Ipv4),
        NetfilterProtoFamily::IPv6 => Some(Family::Ipv6),
        _ => None,
    }
}

const fn protocol_of(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::Inet => NetfilterProtoFamily::Inet,
        Family::Ipv4 => NetfilterProtoFamily::IPv4,
        Family::Ipv6 => NetfilterProtoFamily::IPv6,
    }
}

async fn read() -> io::Result<Ruleset> {
    let (connection, handle, _) = new_connection::<NetfilterMessage>(NETLINK_NETFILTER)?;
    let connection = tokio::spawn(connection);
    let netfilter = Netfilter(handle);
    let ruleset = read_from(&netfilter).await;
    connection.abort();
    ruleset
}

async fn read_from(netfilter: &Netfilter) -> io::Result<Ruleset> {
    let all = NetfilterProtoFamily::Unspec;
    let chains = netfilter.dump(all, NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() })).await?;
    let mut ruleset = Ruleset::default();
    for (family, message) in chains {
        if let NfTablesMessage::NewChain(message) = message {
            ruleset.chains.extend(translate::chain(family, message.attributes));
        }
    }
    if ruleset.chains.iter().all(|chain| chain.base.is_none()) {
        return Ok(ruleset);
    }
    for (family, message) in
        netfilter.dump(all, NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() })).await?
    {
        let NfTablesMessage::NewRule(message) = message else { continue };
        let (table, name, steps) = translate::rule(message.attributes);
        let is_it = |chain: &&mut Chain| chain.family == family && chain.table == table && chain.name == name;
        if let Some(chain) = ruleset.chains.iter_mut().find(is_it) {
            chain.rules.push(steps);
        }
    }
    for (family, table, name) in sets_of(&ruleset) {
        let attributes = vec![SetElementList::Table(table.clone()), SetElementList::Set(name.clone())];
        let question = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
        let mut elements = Some(Vec::new());
        for (_, message) in netfilter.dump(protocol_of(family), question).await? {
            let NfTablesMessage::NewSetElement(message) = message else { continue };
            match (translate::elements(message.attributes), elements.as_mut()) {
                (Some(more), Some(elements)) => elements.extend(more),
                _ => elements = None,
            }
        }
        ruleset.sets.push(Set { family, table, name, elements });
    }
    Ok(ruleset)
}

/// The sets that rules look in.
fn sets_of(ruleset: &Ruleset) -> Vec<(Family, String, String)> {
    let mut sets = Vec::new();
    for chain in &ruleset.chains {
        for step in chain.rules.iter().flatten() {
            if let Step::Lookup { set, .. } = step {
                let set = (chain.family, chain.table.clone(), set.clone());
                if !sets.contains(&set) {
                    sets.push(set);
                }
            }
        }
    }
    sets
}
