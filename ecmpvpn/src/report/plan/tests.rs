use std::time::Duration;

use serde_json::json;

use super::*;
use crate::config::XmitHashPolicy;
use crate::plan::measured::{Measured, Tunnel};
use crate::plan::ports::replan::replan;
use crate::plan::ports::{Better, PortPlan, Request};
use crate::plan::ports::{PortPair, better, judge, plan};

const LAYER34: XmitHashPolicy = XmitHashPolicy::Layer34;

fn request(members: (u8, u8), policies: (XmitHashPolicy, XmitHashPolicy)) -> Request {
    Request {
        a: End::new("10.2.3.4".parse().unwrap(), members.0, policies.0),
        b: End::new("10.2.3.5".parse().unwrap(), members.1, policies.1),
        tunnels: 3,
        base_port: 51820,
    }
}

fn peer(request: Request, plan: PortPlan) -> Peer {
    let better = better(&request, &plan).unwrap();
    let names = (0..plan.pairs.len()).map(|at| format!("wg{at}")).collect();
    Peer { here: "A".into(), there: "B".into(), request, names, plan, better, arrivals: None }
}

fn judged(request: Request, ports: &[(u16, u16)]) -> Peer {
    let pairs: Vec<_> = ports.iter().map(|&(a, b)| PortPair { a, b }).collect();
    let plan = judge(&request, &pairs).unwrap();
    peer(request, plan)
}

fn planned(request: Request) -> Peer {
    let plan = plan(&request).unwrap();
    peer(request, plan)
}

/// The usual recipe: equal ports at both ends of the lab's bonds.
fn recipe() -> Peer {
    judged(request((3, 3), (LAYER34, LAYER34)), &[(5000, 5000), (5001, 5001), (5002, 5002)])
}

fn ports(better: &Better) -> String {
    better.plan.pairs.iter().map(|pair| format!("{}:{}", pair.a, pair.b)).collect::<Vec<_>>().join(", ")
}

#[test]
fn the_recipe_with_equal_ports_as_a_table() {
    let text = Report { peers: vec![recipe()], changes: None }.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let rule = "─".repeat(92);
    let double = "═".repeat(92);
    let expected = [
        "A 10.2.3.4 (3 members, layer3+4)",
        "B 10.2.3.5 (3 members, layer3+4)",
        &rule,
        " tunnel             A port   B port   A sends on    one down:     B sends on    one down:",
        "                                      member of 3   member of 2   member of 3   member of 2",
        &double,
        " wg0                  5000     5000             0             0             0             0",
        " wg1                  5001     5001             0             0             0             0",
        " wg2                  5002     5002             0             0             0             0",
        " tunnels a member                           3/0/0           3/0         3/0/0           3/0",
        &rule,
    ];
    assert_eq!(lines[..expected.len()], expected, "{text}");
    let verdict = format!(
        "WARNING: all 3 tunnels share member 0: bonding gains nothing; use {}",
        ports(&recipe().better.expect("equal ports are easily bettered"))
    );
    assert_eq!(lines[expected.len()..], [verdict], "{text}");
}

#[test]
fn the_json_is_the_contract() {
    let report = Report { peers: vec![recipe()], changes: Some(vec!["create wg0".into()]) };
    let tunnel = |name, port| {
        json!({
            "name": name, "peer": "B", "listen_port": port, "remote_port": port, "tx_member": 0, "rx_member": 0,
            // With member 0 down, member 1 is the first remaining one.
            "tx_member_degraded": [1, 0, 0], "rx_member_degraded": [1, 0, 0],
            "rx_member_measured": null, "rx_members_measured": [], "rx_packets_measured": 0,
        })
    };
    let spread = json!({
        "tx_max": 3, "tx_min": 0, "rx_max": 3, "rx_min": 0,
        "tx_max_degraded": 3, "tx_min_degraded": 0, "rx_max_degraded": 3, "rx_min_degraded": 0,
    });
    let peer = recipe();
    let pairs = peer.better.as_ref().unwrap().plan.pairs.iter();
    let better: Vec<_> = pairs.map(|pair| json!({"listen_port": pair.a, "remote_port": pair.b})).collect();
    let expected = json!({
        "members": 3,
        "tunnels": [tunnel("wg0", 5000), tunnel("wg1", 5001), tunnel("wg2", 5002)],
        "spread": spread,
        "changes": ["create wg0"],
        "peers": [{
            "name": "B", "members": 3, "spread": spread, "misses": 6, "perfect": false,
            "verdict": peer.verdict(), "better": better, "measured": null, "replan": null,
        }],
    });
    assert_eq!(serde_json::to_value(report.json()).unwrap(), expected);
}

#[test]
fn what_cannot_be_known_is_null() {
    let unknown = judged(request((2, 1), (XmitHashPolicy::Encap34, LAYER34)), &[(5000, 5000)]);
    let json = serde_json::to_value(Report { peers: vec![unknown], changes: None }.json()).unwrap();
    let tunnel = &json["tunnels"][0];
    assert_eq!(tunnel["tx_member"], json!(null));
    // With one of the two members down there is no choice.
    assert_eq!(tunnel["tx_member_degraded"], json!([1, 0]));
    assert_eq!((&tunnel["rx_member"], &tunnel["rx_member_degraded"]), (&json!(0), &json!([null])));
    assert_eq!((&json["spread"]["tx_max"], &json["spread"]["rx_max"]), (&json!(null), &json!(1)));
    assert_eq!((&json["changes"], &json["peers"][0]["perfect"]), (&json!([]), &json!(false)));
}

#[test]
fn a_table_says_what_is_not_known() {
    let text = judged(request((3, 1), (XmitHashPolicy::Layer2, LAYER34)), &[(5000, 5000), (5001, 5001)]).to_string();
    let row = |name: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(name)).expect(name);
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(row("wg1"), "5001 5001 ? ? 0 -");
    assert_eq!(row("tunnels a member"), "a member 2 on one 2 on one 2 -");
}

#[test]
fn verdicts() {
    let all = |policy| request((3, 3), (policy, policy));
    let mixed = request((3, 3), (XmitHashPolicy::Layer23, XmitHashPolicy::Encap34));
    let mut translated = request((2, 2), (LAYER34, LAYER34));
    translated.tunnels = 2;
    translated.a.rewritten = true;
    let mut one = request((2, 4), (LAYER34, LAYER34));
    one.tunnels = 1;
    let mut unknown = request((3, 3), (LAYER34, LAYER34));
    unknown.b = End::unknown(unknown.b.address);
    let cases = [
        (planned(all(LAYER34)), "the 3 tunnels spread evenly in both directions, also with one member down"),
        (planned(request((1, 1), (LAYER34, LAYER34))), "neither end has a bond of several members, so any ports do"),
        (
            planned(mixed),
            "A's layer2+3 does not read ports: all 3 tunnels share one member whatever the ports are; set \
             xmit_hash_policy layer3+4 there; B's encap3+4 spreads the inner flows of every tunnel over all members \
             by itself, whatever the ports are",
        ),
        (
            planned(translated),
            "A spreads the 2 tunnels evenly, also with one member down; which members B sends on cannot be predicted: \
             addresses or ports are rewritten between the ends",
        ),
        (planned(one), "one tunnel uses one member of 4: plan 4 tunnels or more"),
        (
            judged(request((3, 1), (LAYER34, LAYER34)), &[(5000, 5000), (5001, 5001)]),
            "A sends all 2 tunnels on member 0; 2 tunnels use at most 2 members of 3: plan 3 tunnels or more; use",
        ),
        (
            judged(unknown, &[(5000, 5000), (5001, 5001), (5002, 5002)]),
            "A sends all 3 tunnels on member 0; which members B sends on cannot be predicted: nothing is known of its \
             bond; describe it in the configuration, under [bond] for this site and as remote_bond for a peer; use",
        ),
    ];
    for (peer, expected) in cases {
        let verdict = peer.verdict();
        match expected.strip_suffix("use") {
            Some(start) => {
                let ports = ports(peer.better.as_ref().expect(expected));
                assert!(verdict.starts_with(&format!("{start}use {ports}")), "{verdict}");
            }
            None => assert_eq!(verdict, expected),
        }
    }
}

/// Ports that are even with all three members but not with two: this is reported beforehand.
#[test]
fn a_spread_that_a_failure_breaks_is_reported() {
    let all = request((3, 3), (LAYER34, LAYER34));
    let broken = (0..64).find_map(|shift| {
        let pairs = [(5000, 5000), (5002, 5000 + shift + 1), (5004, 5000 + shift + 2)];
        let peer = judged(all.clone(), &pairs);
        (peer.plan.views[0].miss() == Some(0) && peer.plan.views[1].miss() == Some(1)).then_some(peer)
    });
    let verdict = broken.expect("there are such ports").verdict();
    assert!(
        verdict.contains("with one member down A sends 3 of 3 tunnels on one member where 2 would be even"),
        "{verdict}"
    );
}

#[test]
fn ports_that_cannot_be_improved_are_reported() {
    let mut stuck = request((4, 4), (LAYER34, LAYER34));
    let left = [52000, 52008, 52016, 52024];
    for end in [&mut stuck.a, &mut stuck.b] {
        end.excluded = (0..=u16::MAX).filter(|port| !left.contains(port)).collect();
    }
    stuck.tunnels = 4;
    let peer = planned(stuck);
    assert!(
        peer.verdict().contains("no better ports were found near 51820: the four views miss by"),
        "{}",
        peer.verdict()
    );
}

#[test]
fn many_members_fit_a_terminal() {
    let mut asked = request((32, 32), (LAYER34, LAYER34));
    asked.tunnels = 32;
    let text = planned(asked).to_string();
    // The last line is the verdict, a sentence.
    let table = text.rsplit_once('\n').expect("a table").0;
    assert!(table.lines().all(|line| line.trim_end().chars().count() <= 100), "{text}");
    assert!(table.contains(" on ") && !text.contains("WARNING"), "{text}");
}

#[test]
fn changes_are_listed() {
    let report = |changes| Report { peers: vec![recipe()], changes }.to_string();
    assert!(report(Some(vec![])).ends_with("\n\n`run` would change nothing"));
    let changes = vec!["create wg0".to_owned(), "create ecmp0".to_owned()];
    assert!(report(Some(changes)).ends_with("\n\n`run` would change:\n  create wg0\n  create ecmp0"));
}

/// A peer with measured arrivals: `on` has the members that each tunnel arrives on.
fn measured(mut peer: Peer, on: &[&[u8]], replanned: bool) -> Peer {
    let tunnel = |on: &&[u8]| Tunnel { on: on.to_vec(), packets: 100, age: Some(Duration::from_secs(1)) };
    let names = (0..peer.request.a.members).map(|at| format!("eno{at}")).collect();
    let measured = Measured { names, tunnels: on.iter().map(tunnel).collect() };
    let replan = replanned.then(|| replan(&peer.request, &peer.plan.pairs, &measured).unwrap());
    peer.arrivals = Some(Arrivals { measured, replan });
    peer
}

#[test]
fn measured_members_stand_beside_the_predicted_ones() {
    let peer = measured(recipe(), &[&[1], &[1], &[0, 2]], false);
    let text = peer.to_string();
    let row = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).expect(name).to_owned();
    for header in ["A receives on", "measured,", "member of 3", "packets"] {
        assert!(text.contains(header), "{text}");
    }
    let words = |name| row(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    assert_eq!(words("wg0"), "wg0 5000 5000 0 0 0 0 1 100");
    assert_eq!(words("wg2"), "wg2 5002 5002 0 0 0 0 0,2 100");
    assert_eq!(words("tunnels a member"), "tunnels a member 3/0/0 3/0 3/0/0 3/0 0/2/0");
    let json = serde_json::to_value(Report { peers: vec![peer], changes: None }.json()).unwrap();
    let [first, third] = [&json["tunnels"][0], &json["tunnels"][2]];
    assert_eq!((&first["rx_member_measured"], &first["rx_packets_measured"]), (&json!(1), &json!(100)));
    assert_eq!((&third["rx_member_measured"], &third["rx_members_measured"]), (&json!(null), &json!(["eno0", "eno2"])));
}

#[test]
fn the_measurement_is_held_against_the_prediction() {
    let spread = || judged(request((3, 3), (LAYER34, LAYER34)), &[(5000, 5000), (5002, 5001), (5004, 5004)]);
    let on: Vec<[u8; 1]> = spread().plan.views[2].tunnels.iter().map(|member| [member.index().unwrap()]).collect();
    let on: Vec<&[u8]> = on.iter().map(|on| &on[..]).collect();
    let rotated = [on[1], on[2], on[0]];
    let unknown = || {
        let mut peer = spread();
        peer.request.b = End::unknown(peer.request.b.address);
        judged(peer.request, &[(5000, 5000), (5002, 5001), (5004, 5004)])
    };
    for (peer, on, expected) in [
        (spread(), &on[..], "measured, of 300 packets; B's tunnels arrive as predicted"),
        (spread(), &rotated[..], "B's tunnels arrive as predicted, except for the order of the members"),
        (spread(), &[&[1][..], &[1], &[1]][..], "the switch before A, or B's bond, hashes otherwise than layer3+4: wg"),
        (
            spread(),
            &[&[1][..], &[1], &[1]][..],
            "all 3 tunnels arrive on member 1 (eno1): `ecmpvpn plan --replan-rx` says what to do",
        ),
        (unknown(), &[&[1][..], &[1], &[0]][..], "2 of 3 tunnels arrive on member 1 (eno1) where 1 would be even"),
        (spread(), &[&[][..], &[], &[]][..], "no packet of any tunnel has arrived"),
        (spread(), &[&[0][..], &[], &[1, 2]][..], "nothing of wg1 has arrived; wg2 arrive on several members each"),
    ] {
        let verdict = measured(peer, on, false).arrival_verdict().unwrap();
        assert!(verdict.contains(expected), "{on:?}: {verdict}");
    }
}

#[test]
fn a_replan_says_what_to_change_at_which_site() {
    let peer = measured(recipe(), &[&[0], &[0], &[0]], true);
    let text = peer.replan_text().unwrap();
    assert!(text.contains("and so does a switch that hashes addresses only"), "{text}");
    let proposal = peer.arrivals.as_ref().unwrap().replan.as_ref().unwrap().proposal.clone().unwrap();
    let settings = peer.settings(&proposal);
    let (there, here): (Vec<_>, Vec<_>) = settings.iter().partition(|setting| setting.site == "B");
    assert!(there.len() == here.len() && !there.is_empty(), "{settings:?}");
    for (there, here) in there.iter().zip(here) {
        assert_eq!((there.key, here.key, &there.tunnel), ("listen_port", "remote_port", &here.tunnel));
        assert_eq!((there.from, there.to), (here.from, here.to));
        assert!(
            text.contains(&format!("{}: listen_port = {}    (now {})", there.tunnel, there.to, there.from)),
            "{text}"
        );
        assert!(text.contains(&format!("{}: remote_port = {}", here.tunnel, here.to)), "{text}");
    }
    assert!(text.contains("this is a trial") && text.contains("still share one member"), "{text}");
    let json = serde_json::to_value(Report { peers: vec![peer], changes: None }.json()).unwrap();
    let replan = &json["peers"][0]["replan"];
    assert_eq!((&replan["finding"], &replan["trial"]), (&json!("layer3+4_or_addresses"), &json!(true)));
    assert_eq!(replan["ports"].as_array().unwrap().len(), 3);
    assert_eq!(replan["changes"].as_array().unwrap().len(), settings.len());

    let six = [(5000, 5000), (5001, 5003), (5002, 5001), (5003, 5007), (5004, 5004), (5005, 5010)];
    let blind = measured(judged(request((3, 3), (LAYER34, LAYER34)), &six), &[&[2][..]; 6], true);
    let text = blind.replan_text().unwrap();
    assert!(text.contains("no ports help: set the switch's hash policy") && !text.contains("listen_port"), "{text}");
    let even = measured(judged(request((3, 3), (LAYER34, LAYER34)), &six[..3]), &[&[0], &[1], &[2]], true);
    assert!(even.replan_text().unwrap().ends_with("as even as can be: change nothing"));
}
