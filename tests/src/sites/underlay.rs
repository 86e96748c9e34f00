//! Makes, shapes and watches the links between the gateways.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::lab::{Lab, Site, Underlay};
use crate::topology::{Wires, shaper};

/// The routing table of link 0. Link N has this table plus N.
const TABLE: u32 = 700;

pub(super) fn build(lab: &mut Lab) -> Result<()> {
    let [a, b] = &lab.sites;
    let members = 0..lab.options.members;
    if let Some(quality) = lab.options.wires {
        let mut wires = Wires::new("wires")?;
        for member in members.clone() {
            let port = format!("u{member}");
            wires.join([(&port, &a.gateway), (&port, &b.gateway)], [quality; 2])?;
        }
        lab.wires = Some(wires);
    } else {
        let far_end = b.gateway.name();
        let link = |member| format!("link add u{member} type veth peer name u{member} netns {far_end}");
        a.gateway.apply("ip", &members.clone().map(link).collect::<Vec<_>>())?;
    }
    for (end, (site, far)) in [(a, b), (b, a)].into_iter().enumerate() {
        let up = |member| format!("link set u{member} up");
        let mut commands: Vec<String> = members.clone().map(up).collect();
        if lab.options.underlay == Underlay::Routed {
            commands.extend(routed(lab, end, site, far));
        }
        site.gateway.apply("ip", &commands)?;
    }
    lab.options.rate.map_or(Ok(()), |rate| lab.shape(rate))
}

/// Limits each link to its rate, 10^6 bits a second, in each direction.
pub(super) fn shape(lab: &Lab, rates: &[f64]) -> Result<()> {
    let command = |(member, rate): (usize, &f64)| {
        format!("qdisc replace dev u{member} root handle 1: {}", shaper(*rate, lab.options.queue))
    };
    for site in &lab.sites {
        site.gateway.apply("tc", &rates.iter().enumerate().map(command).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Gives each shaped link a queue for each flow, as systemd sets network cards up
/// (`net.core.default_qdisc = fq_codel`).
pub(super) fn queue_fairly(lab: &Lab) -> Result<()> {
    let command = |member| format!("qdisc add dev u{member} parent 1: handle 2: fq_codel");
    for site in &lab.sites {
        site.gateway.apply("tc", &(0..lab.options.members).map(command).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Waits until the kernel reports that both ends of every bond member carry packets. Until then a bond changes the
/// ports that it uses, and drops packets.
pub(super) fn wait_for_members(lab: &Lab, patience: Duration) -> Result<()> {
    if lab.options.underlay != Underlay::Bonded {
        return Ok(());
    }
    let start = Instant::now();
    for site in &lab.sites {
        loop {
            let text =
                site.gateway.run(|| fs::read_to_string("/proc/thread-self/net/bonding/bond0")).unwrap_or_default();
            if carrying(&text) == usize::from(lab.options.members) {
                break;
            }
            ensure!(start.elapsed() < patience, "the bond of {} is not complete:\n{text}", site.name);
            sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Counts the members that collect and distribute at both ends, in the text of `/proc/net/bonding/BOND`. Source: IEEE
/// 802.1AX, 6.4.2.3: bit 4 of a port's state is Collecting, bit 5 Distributing.
fn carrying(text: &str) -> usize {
    const BOTH: u8 = 1 << 4 | 1 << 5;
    let member = |part: &str| {
        let states = part.lines().filter_map(|line| line.trim().strip_prefix("port state: "));
        let states: Vec<u8> = states.filter_map(|state| state.parse().ok()).collect();
        states.len() == 2 && states.iter().all(|state| state & BOTH == BOTH)
    };
    text.split("Slave Interface: ").skip(1).filter(|part| member(part)).count()
}

/// Removes the rate limits of all links.
pub(super) fn unshape(lab: &Lab) -> Result<()> {
    let lift = |member| format!("qdisc del dev u{member} root");
    for site in &lab.sites {
        site.gateway.apply("tc", &(0..lab.options.members).map(lift).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// The `ip` commands that emulate the bond at one end.
fn routed(lab: &Lab, end: usize, site: &Site, far: &Site) -> Vec<String> {
    let route = |member| format!("route add {} dev u{member} src {}", far.endpoint, site.endpoint);
    let table = |member: u8| TABLE + u32::from(member);
    let mut commands = vec![format!("address add {}/32 dev lo", site.endpoint), route(0)];
    commands.extend((0..lab.options.members).map(|member| format!("{} table {}", route(member), table(member))));
    commands.extend(lab.tunnels.iter().map(|tunnel| {
        let (near_port, far_port) = (tunnel.ports[end], tunnel.ports[1 - end]);
        let flow = format!("to {} ipproto udp sport {near_port} dport {far_port}", far.endpoint);
        format!("rule add pref 1000 {flow} lookup {}", table(tunnel.members[end]))
    }));
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_that_carry_at_both_ends_are_counted() {
        let member = |actor: u8, partner: u8| {
            format!(
                "Slave Interface: u0\nMII Status: up\ndetails actor lacp pdu:\n    system priority: 65535\n    \
                 port state: {actor}\ndetails partner lacp pdu:\n    port state: {partner}\n\n"
            )
        };
        let text = format!("802.3ad info\n{}{}{}", member(63, 63), member(63, 15), member(7, 1));
        assert_eq!((carrying(&text), carrying("")), (1, 0));
    }
}
