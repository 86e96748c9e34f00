use proptest::prelude::*;

use super::*;
use crate::config::XmitHashPolicy;
use crate::plan::bond_hash::{Member, Unknown};

const POLICY: XmitHashPolicy = XmitHashPolicy::Layer34;

fn request(a: &str, b: &str, members: (u8, u8), tunnels: usize) -> Request {
    let end = |address: &str, members| End::new(address.parse().unwrap(), members, POLICY);
    Request { a: end(a, members.0), b: end(b, members.1), tunnels, base_port: 51820 }
}

fn pairs(ports: &[(u16, u16)]) -> Vec<PortPair> {
    ports.iter().map(|&(a, b)| PortPair { a, b }).collect()
}

fn assert_distinct(pairs: &[PortPair]) {
    for port_of in [(|pair| pair.a) as fn(&PortPair) -> u16, |pair| pair.b] {
        let distinct: BTreeSet<u16> = pairs.iter().map(port_of).collect();
        assert_eq!(distinct.len(), pairs.len(), "a port is used twice: {pairs:?}");
        assert!(distinct.iter().all(|port| *port >= LOWEST_PORT && !RESERVED_PORTS.contains(port)), "{pairs:?}");
    }
}

/// 10,000 random endpoint pairs: every plan is valid, and as even as possible in all four views.
#[test]
fn ten_thousand_random_plans_are_even() {
    let addresses = prop_oneof![
        any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
        any::<([u8; 16], [u8; 16])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
    ];
    let cases = (addresses, 2_u8..=8, 2_u8..=8, 1_usize..=16, prop_oneof![Just(51820), 1024_u16..]);
    let config = ProptestConfig { cases: 10_000, ..ProptestConfig::default() };
    proptest!(config, |((addresses, a_members, b_members, tunnels, base_port) in cases)| {
        let a = End::new(addresses.0, a_members, POLICY);
        let b = End::new(addresses.1, b_members, POLICY);
        let request = Request { a, b, tunnels, base_port };
        let plan = plan(&request).unwrap();
        prop_assert_eq!(plan.pairs.len(), tunnels);
        assert_distinct(&plan.pairs);
        for view in &plan.views {
            let (max, min) = view.max_min().unwrap();
            prop_assert!(max - min <= 1, "{:?}", view);
        }
        prop_assert!(plan.is_perfect());
    });
}

/// The lab's usual recipe: it gains nothing, and the planner finds better ports.
#[test]
fn equal_ports_miss_and_planned_ports_do_not() {
    let request = request("10.2.3.4", "10.2.3.5", (3, 3), 3);
    let recipe = judge(&request, &pairs(&[(5000, 5000), (5001, 5001), (5002, 5002)])).unwrap();
    for (view, members) in recipe.views.iter().zip([3, 2, 3, 2]) {
        let mut loads = vec![0; members];
        loads[0] = 3;
        assert_eq!(view.spread, Spread::Known(loads));
        assert_eq!(view.tunnels, [Member::Index(0); 3]);
    }
    assert_eq!(recipe.views.each_ref().map(View::miss), [Some(2), Some(1), Some(2), Some(1)]);
    assert_eq!(recipe.misses(), 6);
    let planned = plan(&request).unwrap();
    assert!(planned.is_perfect(), "{planned:?}");
    assert!(planned.pairs.iter().all(|pair| (51820..51824).contains(&pair.a) && (51820..51824).contains(&pair.b)));
}

#[test]
fn both_sites_get_the_same_answer() {
    let config = ProptestConfig { cases: 300, ..ProptestConfig::default() };
    proptest!(config, |(a: [u8; 4], b: [u8; 4], a_members in 1_u8..=8, b_members in 1_u8..=8, tunnels in 1_usize..=8)| {
        prop_assume!(a != b);
        let here = Request {
            a: End::new(a.into(), a_members, POLICY),
            b: End::new(b.into(), b_members, POLICY),
            tunnels,
            base_port: 51820,
        };
        let there = Request { a: here.b.clone(), b: here.a.clone(), ..here };
        let back: Vec<_> = plan(&there).unwrap().pairs.iter().map(|pair| PortPair { a: pair.b, b: pair.a }).collect();
        prop_assert_eq!(back, plan(&here).unwrap().pairs);
    });
}

#[test]
fn excluded_and_reserved_ports_are_skipped() {
    let mut request = request("10.2.3.4", "10.5.6.7", (4, 3), 8);
    request.base_port = 4780;
    request.a.excluded = (4781..4789).collect();
    request.b.excluded = (1024..=u16::MAX).filter(|port| port % 2 == 1).collect();
    let planned = plan(&request).unwrap();
    assert_distinct(&planned.pairs);
    assert!(planned.pairs.iter().all(|pair| !request.a.excluded.contains(&pair.a) && pair.b % 2 == 0), "{planned:?}");
    assert!(planned.is_perfect(), "{planned:?}");

    request.b.excluded = (0..=u16::MAX).filter(|port| *port != 6000).collect();
    let expected = PortError::TooFewPorts { side: Side::B, available: 1, desired: 8 };
    assert_eq!(plan(&request), Err(expected.clone()));
    let swapped = Request { a: request.b.clone(), b: request.a.clone(), ..request };
    assert_eq!(plan(&swapped), Err(PortError::TooFewPorts { side: Side::A, available: 1, desired: 8 }));
}

/// Only four ports are left at each end, and they cannot be even: the plan is the best possible, and reports its
/// misses.
#[test]
fn an_impossible_spread_is_reported() {
    let mut request = request("10.2.3.4", "10.5.6.7", (4, 4), 4);
    // Four ports with the same low three bits have the same XOR, hence the same one of four members.
    let left = [52000, 52008, 52016, 52024];
    for end in [&mut request.a, &mut request.b] {
        end.excluded = (0..=u16::MAX).filter(|port| !left.contains(port)).collect();
    }
    let planned = plan(&request).unwrap();
    assert_distinct(&planned.pairs);
    assert_eq!(planned.views[0].miss(), Some(3));
    assert!(!planned.is_perfect());
}

#[test]
fn ends_that_ports_cannot_spread() {
    let spread = |policy, end_b: fn(&mut End)| {
        let mut request = request("10.2.3.4", "10.5.6.7", (3, 2), 3);
        request.a.policy = policy;
        end_b(&mut request.b);
        let planned = plan(&request).unwrap();
        assert_distinct(&planned.pairs);
        planned.views
    };
    let [there, there_degraded, back, back_degraded] = spread(Some(XmitHashPolicy::Layer23), |_| ());
    assert_eq!(there.spread, Spread::OneOfThem(Unknown::Macs));
    assert_eq!((there.max_min(), there.miss()), (Some((3, 0)), Some(2)));
    assert_eq!((there_degraded.max_min(), there_degraded.miss()), (Some((3, 0)), Some(1)));
    assert_eq!((back.max_min(), back.miss()), (Some((2, 1)), Some(0)));
    assert_eq!((back_degraded.max_min(), back_degraded.miss()), (Some((3, 3)), Some(0)));

    assert_eq!(spread(Some(XmitHashPolicy::Encap34), |_| ())[0].spread, Spread::Unknown(Unknown::InnerFlow));
    assert_eq!(spread(None, |_| ())[0].spread, Spread::Unknown(Unknown::Policy));
    let rewritten = spread(Some(POLICY), |end| end.rewritten = true);
    assert_eq!(rewritten[0].spread, Spread::Unknown(Unknown::Rewritten));
    assert_eq!(rewritten[2].miss(), Some(0), "what the end behind the translator sends is known");
}

#[test]
fn one_member_is_no_failure_view() {
    let planned = plan(&request("10.2.3.4", "10.5.6.7", (1, 1), 2)).unwrap();
    assert_eq!(planned.pairs, pairs(&[(51820, 51820), (51821, 51821)]));
    assert_eq!(planned.views.each_ref().map(|view| view.members), [1, 0, 1, 0]);
    assert_eq!(planned.views[1].tunnels, [Member::Unknown(Unknown::NoMember); 2]);
    assert_eq!(planned.views.each_ref().map(View::miss), [Some(0), None, Some(0), None]);
    assert!(planned.is_perfect());
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let good = || request("10.2.3.4", "10.5.6.7", (2, 2), 2);
    assert_eq!(plan(&Request { tunnels: 0, ..good() }), Err(PortError::Tunnels(0)));
    assert_eq!(plan(&Request { tunnels: 33, ..good() }), Err(PortError::Tunnels(33)));
    assert_eq!(plan(&Request { base_port: 443, ..good() }), Err(PortError::BasePort(443)));
    let mut members = good();
    members.b.members = 33;
    assert_eq!(plan(&members), Err(PortError::Members { side: Side::B, members: 33 }));
    let mixed = request("10.2.3.4", "fd00::1", (2, 2), 2);
    assert!(matches!(plan(&mixed), Err(PortError::MixedFamilies(..))));
    let duplicate = Err(PortError::Duplicate { side: Side::B, port: 5000 });
    assert_eq!(judge(&good(), &pairs(&[(5000, 5000), (5001, 5000)])), duplicate);
    assert_eq!(judge(&good(), &pairs(&[(0, 5000)])), Err(PortError::PortZero(Side::A)));
    assert_eq!(judge(&good(), &[]), Err(PortError::Tunnels(0)));
}
