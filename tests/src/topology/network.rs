//! Networks of several sites with one or more gateways each, around a router to which every gateway has a bond.
//!
//! ```text
//!            site 0                                core (router)                        site 1
//!  host                gateway 0.0                                              gateway 1.0     host
//!  lan (bridge) ------ lan0  u0 ------- wire ------- p0 \                      / ...
//!  10.10.0.100    \          u1 ------- wire ------- p1 -- bond0.0     bond1.0 --
//!                  \   gateway 0.1                      /
//!                   -- lan0  u0 ------- wire ------- p2 -- bond0.1
//! ```
//! This module bonds the router's ends of the links. The program that runs on a gateway bonds the gateway's ends.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};

use super::{Quality, Wires, shaper};
use crate::netns::Netns;

/// Describes the network to build.
#[derive(Clone, Debug)]
pub struct Sketch {
    /// Number of gateways of each site.
    pub gateways: Vec<u8>,
    /// Number of links of each gateway.
    pub members: u8,
    /// Each link's rate in each direction, 10^6 bits a second. `None`: no limit.
    pub rate: Option<f64>,
    /// Delay, jitter and loss of each link, in each direction.
    pub quality: Quality,
}

/// A gateway. Its links `u0`, `u1`… to the router are up and are in no bond.
#[derive(Debug)]
pub struct Gateway {
    pub ns: Netns,
    /// The address for its bond, with prefix length 24. The caller assigns it.
    pub endpoint: Ipv4Addr,
    /// The router's address in the same network.
    pub router: Ipv4Addr,
    /// The gateway's address in the LAN, with prefix length 16.
    pub lan: Ipv4Addr,
}

#[derive(Debug)]
pub struct SiteNetwork {
    /// All gateways of the site, on one LAN.
    pub gateways: Vec<Gateway>,
    /// A host with `10.N.0.100/16` on the bridge `lan`. N is 10 × (number of the site + 1).
    pub host: Netns,
    /// The address of that host.
    pub address: Ipv4Addr,
}

/// A network that was built. Dropping this value removes it.
#[derive(Debug)]
pub struct Network {
    /// The sites, in the order of the sketch.
    pub sites: Vec<SiteNetwork>,
    pub core: Netns,
    /// The wires of the links, numbered in the order of sites, gateways and members. End 0 is the gateway's.
    pub wires: Wires,
}

impl Network {
    /// Builds the network.
    ///
    /// # Errors
    /// The sketch has no site or more than 24, or a site with no gateway or more than 8. Or the kernel refuses, for
    /// example because it has no bonding.
    pub fn draw(sketch: &Sketch) -> Result<Self> {
        ensure!((1..=24).contains(&sketch.gateways.len()), "a network has 1 to 24 sites");
        ensure!(sketch.gateways.iter().all(|count| (1..=8).contains(count)), "a site has 1 to 8 gateways");
        let core = Netns::new("core")?;
        core.sysctl("net/ipv4/ip_forward", "1")?;
        let mut network = Self { sites: Vec::new(), core, wires: Wires::new("wires")? };
        for (number, gateways) in sketch.gateways.iter().enumerate() {
            let site = network.site(sketch, number, *gateways)?;
            network.sites.push(site);
        }
        Ok(network)
    }

    fn site(&mut self, sketch: &Sketch, number: usize, gateways: u8) -> Result<SiteNetwork> {
        let n = u8::try_from(10 * (number + 1))?;
        let address = Ipv4Addr::new(10, n, 0, 100);
        let host = Netns::new("host")?;
        host.apply("ip", &["link add lan type bridge".to_owned(), format!("address add {address}/16 dev lan")])?;
        let mut site = SiteNetwork { gateways: Vec::new(), host, address };
        for gateway in 0..gateways {
            let ns = Netns::new("gw")?;
            let lan = Ipv4Addr::new(10, n, 0, gateway + 1);
            ns.apply(
                "ip",
                &[
                    format!("link add lan0 type veth peer name g{gateway} netns {}", site.host.name()),
                    format!("address add {lan}/16 dev lan0"),
                    "link set lan0 up".to_owned(),
                ],
            )?;
            site.host.apply("ip", &[format!("link set g{gateway} master lan up")])?;
            let gateway = self.gateway(sketch, (n, gateway), ns, lan)?;
            site.gateways.push(gateway);
        }
        site.host.apply("ip", &["link set lan up".to_owned(), format!("route add default via 10.{n}.0.1")])?;
        Ok(site)
    }

    fn gateway(&mut self, sketch: &Sketch, (n, number): (u8, u8), ns: Netns, lan: Ipv4Addr) -> Result<Gateway> {
        let address = |last| Ipv4Addr::new(172, 16 + number, n, last);
        let bond = format!("bond{n}.{number}");
        let mut commands =
            vec![format!("link add {bond} type bond mode 802.3ad miimon 100 lacp_rate fast xmit_hash_policy layer3+4")];
        for member in 0..sketch.members {
            let (near, far) = (format!("u{member}"), format!("p{n}.{number}.{member}"));
            self.wires.join([(&near, &ns), (&far, &self.core)], [sketch.quality; 2])?;
            ns.apply("ip", &[format!("link set {near} up")])?;
            if let Some(rate) = sketch.rate {
                ns.apply("tc", &[format!("qdisc replace dev {near} root {}", shaper(rate, None))])?;
                self.core.apply("tc", &[format!("qdisc replace dev {far} root {}", shaper(rate, None))])?;
            }
            commands.push(format!("link set {far} master {bond}"));
        }
        commands.push(format!("address add {}/24 dev {bond}", address(1)));
        commands.push(format!("link set {bond} up"));
        self.core.apply("ip", &commands)?;
        Ok(Gateway { ns, endpoint: address(2), router: address(1), lan })
    }
}
