//! Plans UDP ports that put each tunnel onto the desired links, by the bond's own hash. Pure.

use std::net::Ipv4Addr;

use ecmpvpn::config::XmitHashPolicy;
use ecmpvpn::plan::bond_hash::{self, OuterFlow};

use crate::event::LINKS;
use crate::random::Random;

/// The links on which A and B send a tunnel's packets while all links are up.
pub fn links(endpoints: [Ipv4Addr; 2], ports: [u16; 2]) -> [u8; 2] {
    [0, 1].map(|end| {
        let flow = OuterFlow {
            src: endpoints[end].into(),
            dst: endpoints[1 - end].into(),
            sport: ports[end],
            dport: ports[1 - end],
            macs: None,
        };
        bond_hash::member(XmitHashPolicy::Layer34, &flow, LINKS).index().expect("layer3+4 needs no more than that")
    })
}

/// Ports of `count` tunnels, from `first` upwards. Each link has tunnels in each direction. Which ones differs by
/// direction and seed.
pub fn plan(endpoints: [Ipv4Addr; 2], first: u16, count: u8, random: &mut Random) -> Vec<[u16; 2]> {
    let turn = random.index(LINKS);
    let mut far = first + u16::from(count);
    let tunnel = |number: u8| {
        let near = first + u16::from(number);
        let desired = [number % LINKS, (number + turn) % LINKS];
        while links(endpoints, [near, far]) != desired {
            far += 1;
        }
        far += 1;
        [near, far - 1]
    };
    (0..count).map(tunnel).collect()
}

/// Another port, from `from` upwards, for the end `site` of a tunnel. The tunnel stays on its links.
pub fn other(endpoints: [Ipv4Addr; 2], ports: [u16; 2], site: usize, from: u16) -> u16 {
    let with = |port: u16| if site == 0 { [port, ports[1]] } else { [ports[0], port] };
    let same = |port: &u16| links(endpoints, with(*port)) == links(endpoints, ports) && !ports.contains(port);
    (from..=u16::MAX).find(same).unwrap_or(ports[site])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINTS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 2, 3, 4), Ipv4Addr::new(10, 2, 3, 5)];

    #[test]
    fn every_link_is_used_in_each_direction_and_ports_are_near() {
        for seed in 0..50 {
            for count in [3, 4] {
                let ports = plan(ENDPOINTS, 20_000, count, &mut Random::new(seed, "ports"));
                for direction in [0, 1] {
                    let used = |link| ports.iter().any(|ports| links(ENDPOINTS, *ports)[direction] == link);
                    assert!((0..LINKS).all(used), "{ports:?}");
                }
                assert!(ports.iter().flatten().all(|port| (20_000..21_000).contains(port)), "{ports:?}");
                let other = other(ENDPOINTS, ports[1], 1, 30_000);
                assert!((30_000..31_000).contains(&other));
                assert_eq!(links(ENDPOINTS, [ports[1][0], other]), links(ENDPOINTS, ports[1]));
            }
        }
    }
}
