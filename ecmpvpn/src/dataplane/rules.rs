//! The maps of the rules: reads them, and changes them while packets use them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData, MapError};
use ecmpvpn_common::layout::{Address, MAX_TUNNELS_PER_PEER, Rule, RuleSet, TunnelId, TunnelSet, maps};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::keys::prefix_key;
use super::mapped::Mapped;
use super::view::text;
use super::{DataplaneError, Pins, View, enomem};
use crate::config::InterfaceName;
use crate::plan::rules::{Placed, RuleTables, TunnelNames};

/// A site's rules.
pub struct RuleMaps {
    fields: Mapped<RuleSet>,
    records: Mapped<Rule>,
    tunnels: Mapped<TunnelSet>,
    sources: LpmTrie<MapData, Address, u64>,
    destinations: LpmTrie<MapData, Address, u64>,
    marks: HashMap<MapData, u32, u64>,
}

impl RuleMaps {
    /// Opens a site's rules.
    ///
    /// # Errors
    /// [`DataplaneError::NotRunning`] if there are none.
    pub fn open(pins: &Pins) -> Result<Self, DataplaneError> {
        pins.require()?;
        Self::new(|name| pins.map(name))
    }

    pub(super) fn new(data: impl Fn(&str) -> Result<MapData, DataplaneError>) -> Result<Self, DataplaneError> {
        let trie = |name: &'static str| Map::LpmTrie(data(name)?).try_into().map_err(failed("looking at", name));
        Ok(Self {
            fields: Mapped::new(maps::RULE_FIELDS, &data(maps::RULE_FIELDS)?)?,
            records: Mapped::new(maps::RULES, &data(maps::RULES)?)?,
            tunnels: Mapped::new(maps::RULE_TUNNELS, &data(maps::RULE_TUNNELS)?)?,
            sources: trie(maps::RULE_SOURCES)?,
            destinations: trie(maps::RULE_DESTS)?,
            marks: Map::HashMap(data(maps::RULE_MARKS)?).try_into().map_err(failed("looking at", maps::RULE_MARKS))?,
        })
    }

    /// Reads all maps.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn read(&self, view: &View) -> Result<RuleTables, DataplaneError> {
        let peers: Vec<u64> = (0..).map_while(|peer| view.peer(peer)).map(|peer| peer.rules.get()).collect();
        if peers.iter().all(|rules| *rules == 0) {
            // Entries of the other maps belong to no rule then.
            return Ok(RuleTables::empty(peers.len()));
        }
        let marks = self.marks.iter().collect::<Result<_, _>>().map_err(failed("reading", maps::RULE_MARKS))?;
        Ok(RuleTables {
            fields: self.fields.entries().iter().map(|set| set.rules.get()).collect(),
            sources: prefixes(&self.sources, maps::RULE_SOURCES)?,
            destinations: prefixes(&self.destinations, maps::RULE_DESTS)?,
            marks,
            records: self.records.entries().iter().map(|rule| (rule.policy.get(), rule.flags.get())).collect(),
            tunnels: self.tunnels.entries().iter().map(|set| set.tunnels.get()).collect(),
            peers,
        })
    }

    /// Changes the rules in force from `from` to `to`. Every packet sees either the former rules or the new ones. For
    /// this, no bit may stand for one rule in `from` and for another in `to`.
    ///
    /// # Errors
    /// A map cannot be written. The former rules stay in force then, unless only the clean-up after the change failed.
    pub fn change(
        &mut self,
        view: &View,
        names: &TunnelNames,
        from: &[Placed],
        to: &[Placed],
    ) -> Result<(), DataplaneError> {
        let lacks = |rules: &[Placed], placed: &Placed| rules.iter().all(|other| other.bit != placed.bit);
        let added: Vec<&Placed> = to.iter().filter(|placed| lacks(from, placed)).collect();
        let some_go = from.iter().any(|placed| lacks(to, placed));
        let desired = RuleTables::of(to, names);
        // No packet uses bits that its peer's mask lacks.
        if !some_go {
            self.write(&desired)?;
        } else if !added.is_empty() {
            let both: Vec<Placed> = from.iter().chain(added).cloned().collect();
            self.write(&RuleTables::of(&both, names))?;
        }
        fence(Ordering::SeqCst);
        for (peer, rules) in (0..).zip(&desired.peers) {
            if let Some(peer) = view.peer(peer) {
                peer.rules.set(*rules);
            }
        }
        if some_go {
            wait_for_programs();
            self.write(&desired)?;
        }
        Ok(())
    }

    /// Writes what differs in all maps. It does not write the peers' masks.
    pub(super) fn write(&mut self, desired: &RuleTables) -> Result<(), DataplaneError> {
        for (set, desired) in self.fields.entries().iter().zip(&desired.fields) {
            if set.rules.get() != *desired {
                set.rules.set(*desired);
            }
        }
        for (rule, (policy, flags)) in self.records.entries().iter().zip(&desired.records) {
            rule.policy.set(*policy);
            rule.flags.set(*flags);
        }
        for (mask, desired) in self.tunnels.entries().iter().zip(&desired.tunnels) {
            mask.tunnels.set(*desired);
        }
        write_prefixes(&mut self.sources, &desired.sources, maps::RULE_SOURCES)?;
        write_prefixes(&mut self.destinations, &desired.destinations, maps::RULE_DESTS)?;
        let failed = |error| failed("writing to", maps::RULE_MARKS)(error);
        let there: BTreeMap<u32, u64> = self.marks.iter().collect::<Result<_, _>>().map_err(failed)?;
        for mark in there.keys().filter(|mark| !desired.marks.contains_key(mark)) {
            self.marks.remove(mark).map_err(failed)?;
        }
        for (mark, rules) in desired.marks.iter().filter(|(mark, rules)| there.get(mark) != Some(rules)) {
            enomem::retried(|| self.marks.insert(mark, rules, 0)).map_err(failed)?;
        }
        Ok(())
    }

    /// Rules that a packet with this mark matches, one bit per rule; `None` if no rule names the mark.
    pub(super) fn of_mark(&self, mark: u32) -> Option<u64> {
        self.marks.get(&mark, 0).ok()
    }

    /// Rules that a packet from this address matches, one bit per rule.
    pub(super) fn of_source(&self, source: &Address) -> u64 {
        self.sources.get(&full_key(source), 0).unwrap_or(0)
    }

    /// Rules that a packet to this address matches, one bit per rule.
    pub(super) fn of_destination(&self, destination: &Address) -> u64 {
        self.destinations.get(&full_key(destination), 0).unwrap_or(0)
    }

    /// Rules that a field's value matches; `at` is an index of [`ecmpvpn_common::layout::rule_fields`].
    pub(super) fn field(&self, at: u32) -> Option<&RuleSet> {
        self.fields.entries().get(at as usize)
    }

    /// What a rule does with its packets.
    pub(super) fn record(&self, rule: u32) -> Option<&Rule> {
        self.records.entries().get(rule as usize)
    }

    /// Tunnels that a rule allows, one bit per slot; `at` is `rule * MAX_PEERS + peer`.
    pub(super) fn tunnels(&self, at: u32) -> u32 {
        self.tunnels.entries().get(at as usize).map_or(0, |set| set.tunnels.get())
    }
}

impl View {
    /// The tunnels' names, by peer and slot.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn tunnel_names(&self) -> Result<TunnelNames, DataplaneError> {
        let records: BTreeMap<TunnelId, _> = self.tunnel_records().into_iter().collect();
        let name =
            |id: TunnelId| InterfaceName::new(&text(&records.get(&id).filter(|tunnel| tunnel.ifindex != 0)?.name)).ok();
        let peers = (0..).map_while(|peer| self.peer(peer).map(|_| peer));
        Ok(peers.map(|peer| (0..MAX_TUNNELS_PER_PEER).map(|slot| name(TunnelId::new(peer, slot))).collect()).collect())
    }
}

/// The key of a single address.
pub(super) fn full_key(address: &Address) -> Key<Address> {
    Key::new(u32::try_from(8 * size_of::<Address>()).unwrap_or(u32::MAX), *address)
}

fn failed<E: std::error::Error + Send + Sync + 'static>(verb: &str, name: &str) -> impl Fn(E) -> DataplaneError {
    move |error| DataplaneError::new(format!("{verb} map {name}"), error)
}

fn prefixes(trie: &LpmTrie<MapData, Address, u64>, name: &str) -> Result<BTreeMap<IpNet, u64>, DataplaneError> {
    let entries: Result<Vec<_>, MapError> = trie.iter().collect();
    Ok(entries.map_err(failed("reading", name))?.into_iter().map(|(key, rules)| (net(&key), rules)).collect())
}

/// The prefix that a key stands for.
fn net(key: &Key<Address>) -> IpNet {
    let Address { family, address } = key.data();
    let length = u8::try_from(key.prefix_len().saturating_sub(Address::FAMILY_BITS)).unwrap_or(u8::MAX);
    if family == 4 {
        let address = Ipv4Addr::from(address[0].to_ne_bytes());
        Ipv4Net::new_assert(address, length.min(32)).trunc().into()
    } else {
        let octets: Vec<u8> = address.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let address = Ipv6Addr::from(<[u8; 16]>::try_from(octets).expect("four words are sixteen bytes"));
        Ipv6Net::new_assert(address, length.min(128)).trunc().into()
    }
}

/// Writes the entries of a trie. Prefixes that are no longer desired are removed first, to make room. The addresses of
/// a removed prefix then match a shorter prefix. It has the same rules, except those that are in no peer's mask any
/// more.
fn write_prefixes(
    trie: &mut LpmTrie<MapData, Address, u64>,
    desired: &BTreeMap<IpNet, u64>,
    name: &str,
) -> Result<(), DataplaneError> {
    let there = prefixes(trie, name)?;
    for prefix in there.keys().filter(|prefix| !desired.contains_key(prefix)) {
        trie.remove(&prefix_key(*prefix)).map_err(failed("writing to", name))?;
    }
    for (prefix, rules) in desired.iter().filter(|(prefix, rules)| there.get(prefix) != Some(rules)) {
        let insert = || trie.insert(&prefix_key(*prefix), rules, 0);
        enomem::retried(insert).map_err(failed("writing to", name))?;
    }
    Ok(())
}

/// Waits until every program that runs now has ended, so that no program still uses what it read before.
///
/// TC programs hold RCU's read lock, and this barrier waits for RCU (`kernel/sched/membarrier.c`).
fn wait_for_programs() {
    const GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes numbers only.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        // Kernels with `nohz_full` processors refuse the call. A program runs for microseconds, so a pause is enough.
        thread::sleep(Duration::from_millis(20));
    }
}
