//! Rulesets as `nft` makes them, and what is said about them.

use super::ruleset::{Base, Chain, Element, Family, Field, Hook, Operator, Ruleset, Set, Step, Verdict};
use super::{findings, needed};
use crate::plan::tests::config;
use crate::plan::{Backend, Plan};

const REGISTER: u32 = 8;

fn plan() -> Plan {
    Plan::new(&config(2), Backend::Kernel)
}

fn chain(name: &str, base: Option<(Hook, bool)>, rules: Vec<Vec<Step>>) -> Chain {
    let base = base.map(|(hook, drops)| Base { hook, priority: 0, drops });
    Chain { family: Family::Inet, table: "filter".to_owned(), name: name.to_owned(), base, rules }
}

fn input(drops: bool, rules: Vec<Vec<Step>>) -> Chain {
    chain("input", Some((Hook::Input, drops)), rules)
}

fn load(field: Field, length: usize) -> Step {
    Step::Load { register: REGISTER, field, length: Some(length) }
}

fn is(operator: Operator, data: &[u8]) -> Step {
    Step::Compare { register: REGISTER, operator, data: data.to_vec() }
}

fn accept() -> Step {
    Step::Verdict(Verdict::Accept)
}

/// `udp dport FROM-TO accept`
fn ports(from: u16, to: u16) -> Vec<Step> {
    let protocol = [load(Field::Protocol, 1), is(Operator::Equal, &[17])];
    let range = [
        load(Field::Transport(2), 2),
        is(Operator::GreaterOrEqual, &from.to_be_bytes()),
        is(Operator::LessOrEqual, &to.to_be_bytes()),
        accept(),
    ];
    protocol.into_iter().chain(range).collect()
}

/// `icmp type { FIRST, SECOND } accept`
fn icmp(first: u8, second: u8) -> Vec<Step> {
    let ranges = vec![(vec![first], vec![first]), (vec![second], vec![second])];
    vec![
        load(Field::Protocol, 1),
        is(Operator::Equal, &[1]),
        load(Field::Transport(0), 1),
        Step::Within { register: REGISTER, ranges, is_inverted: false },
        accept(),
    ]
}

/// Echo requests and replies.
fn echo() -> Vec<Step> {
    icmp(8, 0)
}

/// `ct state established,related accept`
fn answers() -> Vec<Step> {
    let mask = Step::Mask { from: REGISTER, to: REGISTER, mask: 6_u32.to_ne_bytes().to_vec(), xor: vec![0; 4] };
    vec![load(Field::ConnectionState, 4), mask, is(Operator::NotEqual, &[0; 4]), accept()]
}

/// `iifname DEVICE*` or `oifname DEVICE*`
fn device(field: Field, start: &str, verdict: Verdict) -> Vec<Step> {
    vec![
        Step::Load { register: REGISTER, field, length: None },
        is(Operator::Equal, start.as_bytes()),
        Step::Verdict(verdict),
    ]
}

fn ruleset(chains: Vec<Chain>) -> Ruleset {
    Ruleset { chains, sets: Vec::new() }
}

/// What the chains could drop.
fn named(ruleset: &Ruleset) -> Vec<String> {
    findings(&plan(), ruleset).into_iter().map(|finding| finding.what).collect()
}

const BOTH: &str = "UDP to ports 51820, 51821 and ICMP echo on wg0, wg1";
const ECHO: &str = "ICMP echo on wg0, wg1";

#[test]
fn what_must_pass_is_named() {
    assert_eq!(
        needed(&plan()),
        "a firewall must let pass: UDP from 10.5.6.7 to 10.2.3.4 ports 51820, 51821, ICMP fragmentation-needed to \
         10.2.3.4, ICMP echo on wg0, wg1, and what is forwarded to ecmp0 or comes from the tunnels"
    );
}

#[test]
fn a_policy_that_drops_is_named_with_the_rules_to_add() {
    let found = findings(&plan(), &ruleset(vec![input(true, Vec::new())]));
    let [finding] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(
        finding.to_string(),
        "the firewall's chain input of table inet filter (hook input, priority 0, policy drop) could drop UDP to ports \
         51820, 51821 and ICMP echo on wg0, wg1: let it pass with `nft add rule inet filter input udp dport { \
         51820, 51821 } accept` and `nft add rule inet filter input iifname { wg0, wg1 } icmp type { echo-request, \
         echo-reply } accept` (docs/firewall.md)"
    );
}

#[test]
fn a_policy_that_accepts_is_not_named_unless_a_rule_drops_the_rest() {
    assert_eq!(named(&ruleset(vec![input(false, Vec::new())])), [""; 0]);
    let rest = vec![Step::Verdict(Verdict::Drop)];
    let found = findings(&plan(), &ruleset(vec![input(false, vec![echo(), rest.clone()])]));
    assert_eq!(found[0].what, "UDP to ports 51820, 51821");
    assert!(found[0].chain.ends_with("(hook input, priority 0, policy accept, but a rule drops)"), "{found:?}");
    // A rule behind the one that drops would be too late.
    assert!(found[0].remedy.contains("`nft insert rule inet filter input udp dport "), "{found:?}");
    assert_eq!(named(&ruleset(vec![input(false, vec![echo(), ports(51820, 51821), rest])])), [""; 0]);
}

#[test]
fn accepted_ports_and_echo_are_not_named() {
    let with = |rules: Vec<Vec<Step>>| named(&ruleset(vec![input(true, rules)]));
    assert_eq!(with(vec![ports(51820, 51829), echo()]), [""; 0]);
    assert_eq!(with(vec![ports(51820, 51829)]), [ECHO]);
    assert_eq!(with(vec![ports(51821, 51829), echo()]), ["UDP to port 51820"]);
    assert_eq!(with(vec![ports(1, 51819), echo()]), ["UDP to ports 51820, 51821"]);
    // Neither do rules for other sources, nor rules that are not understood.
    let mut elsewhere = ports(1, u16::MAX);
    elsewhere.splice(0..0, [load(Field::Network(12), 4), is(Operator::Equal, &[192, 0, 2, 1])]);
    let mut sometimes = ports(1, u16::MAX);
    sometimes.insert(0, Step::Unknown);
    assert_eq!(with(vec![elsewhere, sometimes, echo()]), ["UDP to ports 51820, 51821"]);
    let mut from_there = ports(1, u16::MAX);
    from_there.splice(0..0, [load(Field::Network(12), 1), is(Operator::Equal, &[10])]);
    assert_eq!(with(vec![from_there, echo()]), [""; 0]);
}

/// Both ends send all the time: what comes back belongs to a connection that the kernel knows. Echo requests never do.
#[test]
fn answers_are_enough_for_the_tunnels_but_not_for_their_probes() {
    assert_eq!(named(&ruleset(vec![input(true, vec![answers(), echo()])])), [""; 0]);
    assert_eq!(named(&ruleset(vec![input(true, vec![answers()])])), [BOTH]);
    // Without rules about connections, the answers to this end's own probes need a rule too.
    assert_eq!(named(&ruleset(vec![input(true, vec![ports(51820, 51821), icmp(8, 8)])])), [ECHO]);
    assert_eq!(named(&ruleset(vec![input(true, vec![answers(), icmp(8, 8)])])), [""; 0]);
}

#[test]
fn other_chains_are_followed() {
    let jump = |name: &str| vec![Step::Verdict(Verdict::Jump(name.to_owned()))];
    let open = chain("open", None, vec![ports(51820, 51821), echo()]);
    assert_eq!(named(&ruleset(vec![input(true, vec![jump("open")]), open.clone()])), [""; 0]);
    // As firewalld: the interface decides, and which one the packets come by is not known.
    let by_device = |verdict: Verdict| device(Field::InputDevice, "eno", verdict);
    let closed = chain("closed", None, vec![vec![Step::Verdict(Verdict::Drop)]]);
    let rules = vec![by_device(Verdict::Goto("closed".to_owned())), jump("open")];
    assert_eq!(named(&ruleset(vec![input(false, rules), open.clone(), closed.clone()])), ["UDP to ports 51820, 51821"]);
    let rules = vec![by_device(Verdict::Goto("open".to_owned())), jump("open")];
    assert_eq!(named(&ruleset(vec![input(true, rules), open.clone()])), [""; 0]);
    let back = chain("back", None, vec![vec![Step::Verdict(Verdict::Return)], vec![Step::Verdict(Verdict::Drop)]]);
    assert_eq!(named(&ruleset(vec![input(true, vec![jump("back"), jump("open")]), open, back])), [""; 0]);
    // A chain that calls itself ends.
    let circle = chain("circle", None, vec![jump("circle")]);
    assert_eq!(named(&ruleset(vec![input(true, vec![jump("circle")]), circle])), [BOTH]);
}

#[test]
fn sets_intervals_and_verdict_maps_are_looked_up() {
    let lookup = |is_inverted, is_map| {
        let set = "__set0".to_owned();
        vec![
            load(Field::Protocol, 1),
            is(Operator::Equal, &[17]),
            load(Field::Transport(2), 2),
            Step::Lookup { register: REGISTER, set, is_inverted, is_map },
        ]
    };
    let element = |key: u16, is_end, verdict| Element { key: key.to_be_bytes().to_vec(), is_end, verdict };
    let with = |mut rule: Vec<Step>, elements: Option<Vec<Element>>| {
        rule.push(accept());
        let set = Set { family: Family::Inet, table: "filter".to_owned(), name: "__set0".to_owned(), elements };
        named(&Ruleset { chains: vec![input(true, vec![rule, echo()])], sets: vec![set] })
    };
    let single = vec![element(51820, false, None), element(51821, false, None)];
    assert_eq!(with(lookup(false, false), Some(single.clone())), [""; 0]);
    assert_eq!(with(lookup(true, false), Some(single)), ["UDP to ports 51820, 51821"]);
    assert_eq!(with(lookup(false, false), None), ["UDP to ports 51820, 51821"]);
    // 0-51820, 51821-51830: the second begins where the first ends.
    let intervals = vec![
        element(51831, true, None),
        element(51821, false, None),
        element(51821, true, None),
        element(0, false, None),
    ];
    assert_eq!(with(lookup(false, false), Some(intervals)), [""; 0]);
    let ended = vec![element(0, false, None), element(51821, true, None)];
    assert_eq!(with(lookup(false, false), Some(ended)), ["UDP to port 51821"]);
    let map = vec![element(51820, false, Some(Verdict::Accept)), element(51821, false, Some(Verdict::Drop))];
    assert_eq!(with(lookup(false, true), Some(map)), ["UDP to port 51821"]);
}

#[test]
fn forwarding_must_be_open_one_way_at_least_and_to_answers_the_other_way() {
    const FORWARD: &str = "what is forwarded to ecmp0 or comes from wg0, wg1";
    let with = |rules: Vec<Vec<Step>>| named(&ruleset(vec![chain("forward", Some((Hook::Forward, true)), rules)]));
    let into = || device(Field::InputDevice, "wg", Verdict::Accept);
    let out = || device(Field::OutputDevice, "ecmp0", Verdict::Accept);
    assert_eq!(with(Vec::new()), [FORWARD]);
    assert_eq!(with(vec![into(), out()]), [""; 0]);
    assert_eq!(with(vec![out()]), [FORWARD]);
    assert_eq!(with(vec![answers(), out()]), [""; 0]);
    assert_eq!(with(vec![answers()]), [FORWARD]);
}

#[test]
fn chains_of_another_family_do_not_matter() {
    let of = |family| ruleset(vec![Chain { family, ..input(true, Vec::new()) }]);
    assert_eq!(named(&of(Family::Ipv6)), [""; 0]);
    assert_eq!(named(&of(Family::Ipv4)), [BOTH]);
}

#[test]
fn the_remedy_is_that_of_the_program_that_manages_the_chain() {
    let of = |table: &str, name: &str, more: &str| {
        let base = input(true, Vec::new());
        let found = Chain { family: Family::Ipv4, table: table.to_owned(), name: name.to_owned(), ..base };
        let other = chain(more, None, Vec::new());
        findings(&plan(), &ruleset(vec![found, other]))[0].remedy.clone()
    };
    let remedy = of("filter", "INPUT", "other");
    assert!(remedy.contains("`iptables -I INPUT -p udp -m multiport --dports 51820,51821 -j ACCEPT`"), "{remedy}");
    let remedy = of("filter", "INPUT", "ufw-user-input");
    assert!(remedy.contains("`ufw allow proto udp to any port 51820,51821` and `ufw allow in on wg0`"), "{remedy}");
    let remedy = of("firewalld", "filter_INPUT", "other");
    assert!(remedy.contains("`firewall-cmd --permanent --add-port=51820/udp --add-port=51821/udp`"), "{remedy}");
    assert!(remedy.contains("`firewall-cmd --reload`"), "{remedy}");
}
