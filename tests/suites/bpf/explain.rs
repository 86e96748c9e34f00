//! Compares the answer of `explain` with the tunnel that the program then chooses.

use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use ecmpvpn::config::Rule;
use ecmpvpn::dataplane::{Options, RuleMaps};
use ecmpvpn::live::explain::{Flow, Probe, ask};
use ecmpvpn::plan::rules::{canonical, place};
use ecmpvpn_common::layout::{Bucket, Policy, TunnelId};

use super::agree::{Random, V4_ADDRESSES, V6_ADDRESSES, rule};
use super::build::{ICMP, ICMPV6, TCP, UDP, icmp, tcp, v4, v6};
use super::rig::{Outcome, Rig, table};

const FLOWS: usize = 3000;

pub fn explained_is_where_it_goes() -> anyhow::Result<()> {
    let mut random = Random(7);
    let mut rig = Rig::new(&table(3), &Options::default())?;
    let (mut rule_maps, names) = (RuleMaps::open(&rig.pins)?, rig.view.tunnel_names()?);
    let mut in_force = Vec::new();
    let (mut steered, mut by_hash, mut other, mut agreed) = (0, 0, 0, 0);
    for round in 0..FLOWS {
        if round % 100 == 0 {
            let rules: Vec<_> = (0..random.below(12)).map(|_| rule(&mut random, &names)).collect();
            let desired = place(&rules)?;
            rule_maps.change(&rig.view, &names, &in_force, &[])?;
            rule_maps.change(&rig.view, &names, &[], &desired)?;
            in_force = desired;
            for peer in [0, 1] {
                let record = rig.view.peer(peer).context("a peer")?;
                record.policy.set(random.of(&[Policy::Hash, Policy::Hash, Policy::Flowlet, Policy::Spray]).number());
                record.open.set_bits(0b10, random.one_in(2));
            }
        }
        let is_v4 = random.one_in(2);
        let pick: fn(&mut Random) -> &'static str =
            if is_v4 { |random| random.of(&V4_ADDRESSES) } else { |random| random.of(&V6_ADDRESSES) };
        let (src, dst): (IpAddr, IpAddr) = (pick(&mut random).parse()?, pick(&mut random).parse()?);
        let proto = random.of(&[TCP, UDP, if is_v4 { ICMP } else { ICMPV6 }, 47, 50, 51]);
        let ports = if matches!(proto, TCP | UDP) { (random.port(), random.port()) } else { (0, 0) };
        let (id, dscp, mark) = (u32::from(random.port()), random.of(&[0, 46]), random.of(&[0, 1, 7]));
        let probe = Probe::of(&Flow { src, dst, proto, ports, id, dscp, mark });
        rig.mark = mark;
        let answer = ask(&rig.pins, &rig.view, &rule_maps, &probe)?;
        let before = answer.verdict.as_ref().ok().and_then(|found| rig.view.bucket_record(found.bucket)).map(words);
        let again = ask(&rig.pins, &rig.view, &rule_maps, &probe)?;
        let after = answer.verdict.as_ref().ok().and_then(|found| rig.view.bucket_record(found.bucket)).map(words);
        ensure!(before == after && again.hash == answer.hash, "explaining changed {before:?} to {after:?}");
        let gone = rig.egress(probe.bytes(), (0, 0))?;
        match (&answer.verdict, gone) {
            (Err(reason), Outcome::Refused(number)) if *reason as u32 == number => {}
            (Ok(found), Outcome::Steered { tunnel, bucket, .. }) if found.bucket == bucket => {
                steered += 1;
                let tunnel = TunnelId::from_number(tunnel);
                if answer.policy != Policy::Hash {
                    // Loads decay between `explain` and the program, so a few answers may differ.
                    other += 1;
                    agreed += usize::from(found.tunnel == tunnel);
                    continue;
                }
                by_hash += 1;
                ensure!(found.tunnel == tunnel, "{probe:?} went to {tunnel:?}: {answer:?}");
                rig.view.set_live(tunnel, false).context("a tunnel of the table")?;
                let next = match rig.egress(probe.bytes(), (0, 0))? {
                    Outcome::Steered { tunnel, .. } => Some(TunnelId::from_number(tunnel)),
                    Outcome::Refused(_) => None,
                };
                rig.view.set_live(tunnel, true);
                ensure!(found.next == next, "without {tunnel:?} it went to {next:?}: {answer:?}");
            }
            (_, gone) => anyhow::bail!("{probe:?} was {gone:?}: {answer:?}"),
        }
    }
    println!("{FLOWS} flows: {steered} steered, {by_hash} by hash, {agreed} of {other} others as explained");
    ensure!(by_hash > FLOWS / 8 && other > FLOWS / 8, "too few flows were steered");
    ensure!(agreed * 100 >= other * 97, "{agreed} of {other} flows by load went where explained");
    Ok(())
}

fn words(bucket: &Bucket) -> (u64, u32, u8, u8) {
    (bucket.last_ns.get(), bucket.bytes.get(), bucket.tunnel.get(), bucket.home.get())
}

/// A rule keeps a net's packets on one tunnel. An ICMP error from that net stays there, whatever flow it quotes.
pub fn a_made_up_quote_passes_no_rule() -> anyhow::Result<()> {
    const KEPT: u32 = 2;
    let mut rig = Rig::new(&table(3), &Options::default())?;
    let (mut rule_maps, names) = (RuleMaps::open(&rig.pins)?, rig.view.tunnel_names()?);
    let tunnel = |slot: u32| names[0][slot as usize].clone().context("a tunnel of the table");
    let rule = |src: &str, proto, slot| -> anyhow::Result<Rule> {
        let (src, tunnels) = (Some(src.parse()?), vec![tunnel(slot)?]);
        let (src_ports, dst_ports) = (Vec::new(), Vec::new());
        Ok(Rule {
            src,
            dst: None,
            proto,
            src_ports,
            dst_ports,
            dscp: None,
            fwmark: None,
            policy: None,
            tunnels,
            pin: false,
        })
    };
    let rules =
        [rule("10.1.0.0/16", Some(TCP), 0)?, rule("10.9.0.0/16", None, KEPT)?, rule("fd00:9::/48", None, KEPT)?];
    let desired = place(&rules.map(|rule| canonical(&rule, &names)))?;
    rule_maps.change(&rig.view, &names, &[], &desired)?;
    for port in 1..50 {
        let quote = v4("10.20.0.1", "10.1.0.1", TCP, &tcp(80, port, 0));
        let quote6 = v6("fd00:20::1", "fd00:10::1", TCP, &tcp(80, port, 0));
        for error in [
            v4("10.9.0.1", "10.20.0.1", ICMP, &icmp(3, 0, &quote)),
            v6("fd00:9::1", "fd00:20::1", ICMPV6, &icmp(1, 0, &quote6)),
        ] {
            match rig.egress(&error, (0, 0))? {
                Outcome::Steered { tunnel: KEPT, .. } => {}
                other => anyhow::bail!("port {port}: {other:?}"),
            }
        }
    }
    Ok(())
}
