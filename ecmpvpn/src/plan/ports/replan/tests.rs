use super::*;
use crate::plan::measured::Tunnel;
use crate::plan::ports::End;

fn request(members: (u8, u8)) -> Request {
    let end = |address: &str, members| End::new(address.parse().unwrap(), members, XmitHashPolicy::Layer34);
    Request { a: end("10.2.3.4", members.0), b: end("10.2.3.5", members.1), tunnels: 0, base_port: 5000 }
}

fn pairs(ports: &[(u16, u16)]) -> Vec<PortPair> {
    ports.iter().map(|&(a, b)| PortPair { a, b }).collect()
}

fn equal(count: u16) -> Vec<PortPair> {
    (5000..5000 + count).map(|port| PortPair { a: port, b: port }).collect()
}

fn measured(members: u8, on: &[&[u8]]) -> Measured {
    let tunnel = |on: &&[u8]| Tunnel { on: on.to_vec(), packets: 100, age: None };
    Measured { names: (0..members).map(|at| format!("eno{at}")).collect(), tunnels: on.iter().map(tunnel).collect() }
}

fn found(members: u8, pairs: &[PortPair], on: &[&[u8]]) -> Replan {
    replan(&request((members, members)), pairs, &measured(members, on)).unwrap()
}

#[test]
fn what_needs_no_change_gets_none() {
    let planned = pairs(&[(5000, 5000), (5002, 5001), (5004, 5004)]);
    for (members, on, finding) in [
        (3, [&[2][..], &[0], &[1]], Finding::Even),
        (1, [&[0][..], &[0], &[0]], Finding::OneMember),
        (3, [&[2][..], &[], &[1]], Finding::Unmeasured(vec![1])),
        (3, [&[2][..], &[0, 1], &[1, 2]], Finding::Several(vec![1, 2])),
        (2, [&[0][..], &[1], &[1]], Finding::Even),
    ] {
        let replan = found(members, &planned, &on);
        assert_eq!((&replan.finding, &replan.proposal), (&finding, &None), "{on:?}");
    }
}

/// Equal ports use one member with `layer3+4`. New ports at the far end only make all known views even.
#[test]
fn equal_ports_are_replanned_at_the_far_end() {
    for (members, count) in [(2, 2), (2, 4), (3, 3), (3, 6), (4, 4), (4, 8)] {
        let equal = equal(count);
        let on = vec![&[1][..]; usize::from(count)];
        let replan = found(members, &equal, &on);
        let predicted = arriving(&request((members, members)), &equal, members);
        if predicted.iter().filter(|load| **load > 0).count() == 1 {
            assert_eq!(replan.finding, Finding::Layer34OrBlind, "{members} members");
        }
        let Some(proposal) = replan.proposal else {
            assert!(matches!(replan.finding, Finding::Blind { one_in } if one_in >= UNLIKELY), "{replan:?}");
            continue;
        };
        let new = &proposal.plan.pairs;
        assert!(new.iter().zip(&equal).all(|(new, old)| new.a == old.a), "our own ports stay: {new:?}");
        assert!(new.iter().map(|pair| pair.b).collect::<BTreeSet<_>>().len() == new.len(), "{new:?}");
        assert_eq!(excess(&proposal.loads, new.len()), 0, "{members} members: {proposal:?}");
        assert_eq!(proposal.plan.misses(), 0, "{members} members: {proposal:?}");
        assert!(proposal.trial);
        assert_eq!(found(members, &equal, &on), found(members, &equal, &on), "deterministic");
    }
}

/// Uneven exactly as `layer3+4` predicts, with the switch's ports in another order: the proposal is not a trial.
#[test]
fn a_switch_that_hashes_as_linux_does_is_recognised() {
    let request = request((3, 3));
    let slot = |pair: &PortPair| bond_hash::slot(layer34(&request, *pair, Direction::BToA), 3);
    // Three tunnels on one member, the fourth on another.
    let mut uneven = equal(3);
    let other = (5010..5100).map(|port| PortPair { a: 5003, b: port }).find(|pair| slot(pair) != slot(&uneven[0]));
    uneven.extend(other);
    let slots: Vec<u8> = uneven.iter().map(slot).collect();
    let rotated: Vec<[u8; 1]> = slots.iter().map(|slot| [(slot + 1) % 3]).collect();
    let on: Vec<&[u8]> = rotated.iter().map(|on| &on[..]).collect();
    let replan = found(3, &uneven, &on);
    assert_eq!(replan.finding, Finding::Layer34, "{slots:?}");
    let proposal = replan.proposal.unwrap();
    assert!(!proposal.trial && excess(&proposal.loads, 4) == 0, "{proposal:?}");
    assert!(is_relabelling(&[0, 0, 2], &[1, 1, 0]) && !is_relabelling(&[0, 1, 2], &[1, 1, 0]));
    assert!(!is_relabelling(&[0, 0, 2], &[1, 2, 0]));
}

/// All tunnels on one member, although `layer3+4` would spread them.
#[test]
fn a_switch_that_reads_no_ports_is_recognised() {
    let three = pairs(&[(5000, 5000), (5002, 5001), (5004, 5004)]);
    let replan = found(3, &three, &[&[1], &[1], &[1]]);
    assert_eq!((replan.finding, replan.loads), (Finding::Blind { one_in: 9 }, vec![0, 3, 0]));
    // With three tunnels it may be chance: new ports will show.
    let proposal = replan.proposal.unwrap();
    assert!(proposal.trial && proposal.plan.pairs.iter().all(|pair| pair.b > 5004), "{proposal:?}");
    assert_eq!(proposal.plan.views[0].miss(), Some(0), "this site's own sending stays even");

    let six = pairs(&[(5000, 5000), (5001, 5003), (5002, 5001), (5003, 5007), (5004, 5004), (5005, 5010)]);
    let replan = found(3, &six, &[&[2][..]; 6]);
    assert_eq!((replan.finding, replan.proposal), (Finding::Blind { one_in: 243 }, None));
}

#[test]
fn an_unknown_hash_gets_a_trial_that_differs_from_the_last() {
    let three = pairs(&[(5000, 5000), (5002, 5001), (5004, 5004)]);
    let first = found(3, &three, &[&[1], &[1], &[0]]);
    assert_eq!(first.finding, Finding::Unknown);
    let first = first.proposal.unwrap().plan.pairs;
    let second = found(3, &first, &[&[1], &[1], &[0]]);
    if let Some(second) = second.proposal {
        assert!(second.plan.pairs.iter().all(|pair| first.iter().all(|old| old.b != pair.b)), "{second:?}");
    }
}
