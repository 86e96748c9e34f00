//! The links between the gateways.

use anyhow::Result;

use super::Lab;

/// What joins the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// The links are members of a real LACP bond at each end, which ecmpvpn makes. Needs kernel bonding.
    Bonded,
    /// Emulates the bond where the kernel has none: a policy routing rule for each tunnel's UDP ports puts its outer
    /// packets on the link that the bond's layer3+4 hash would. The links and their rates are as real as with a bond;
    /// LACP, and what a bond does when a member fails, are not there.
    Routed,
}

/// The routing table of link 0 and, counted on, of the others.
const TABLE: u32 = 700;

pub(super) fn build(lab: &Lab) -> Result<()> {
    let [a, b] = &lab.sites;
    for member in 0..lab.options.members {
        a.gateway.ip(&format!("link add u{member} type veth peer name u{member} netns {}", b.gateway.name()))?;
        for site in &lab.sites {
            site.gateway.ip(&format!("link set u{member} up addrgenmode none"))?;
            if let Some(rate) = lab.options.rate {
                let shape = format!("qdisc add dev u{member} root tbf rate {rate}mbit burst 16k latency 50ms");
                site.gateway.tc(&shape)?;
            }
        }
    }
    if lab.options.underlay == Underlay::Bonded {
        return Ok(());
    }
    for (end, (site, far)) in [(a, b), (b, a)].into_iter().enumerate() {
        site.gateway.ip(&format!("address add {}/32 dev lo", site.endpoint))?;
        for member in 0..lab.options.members {
            let route = format!("{} dev u{member} src {}", far.endpoint, site.endpoint);
            site.gateway.ip(&format!("route add {route} table {}", TABLE + u32::from(member)))?;
            if member == 0 {
                site.gateway.ip(&format!("route add {route}"))?;
            }
        }
        for tunnel in &lab.tunnels {
            let (near_port, far_port) = (tunnel.ports[end], tunnel.ports[1 - end]);
            site.gateway.ip(&format!(
                "rule add pref 1000 to {} ipproto udp sport {near_port} dport {far_port} lookup {}",
                far.endpoint,
                TABLE + u32::from(tunnel.members[end])
            ))?;
        }
    }
    Ok(())
}
