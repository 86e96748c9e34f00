//! A far end without ecmpvpn: a gateway with a bond, WireGuard and the kernel's ECMP, as an administrator would set it up.

use anyhow::Result;
use ecmpvpn::config;
use ecmpvpn::plan::{Backend, Plan};

use super::inner;
use super::lab::Lab;

impl Lab {
    /// Makes one site (0: A, 1: B) a gateway that does not run ecmpvpn. Keys, ports and addresses are those of its
    /// configuration. It answers the probes of the other site, since any Linux host does.
    ///
    /// # Errors
    /// The kernel lacks bonding or WireGuard.
    pub fn plain(&self, site: usize) -> Result<()> {
        let (near, far) = (&self.sites[site], &self.sites[1 - site]);
        let gateway = &near.gateway;
        let config = config::load(&near.config).map_err(|e| anyhow::anyhow!("{e}"))?;
        let bond = "link add bond0 type bond mode 802.3ad miimon 100 lacp_rate fast xmit_hash_policy layer3+4";
        let mut commands = vec![bond.to_owned()];
        for member in 0..self.options.members {
            commands.push(format!("link set u{member} down"));
            commands.push(format!("link set u{member} master bond0"));
        }
        commands.push(format!("address add {}/24 dev bond0", near.endpoint));
        commands.push("link set bond0 up".to_owned());
        gateway.apply("ip", &commands)?;
        for tunnel in &Plan::new(&config, Backend::Kernel).tunnels {
            inner::make(gateway, tunnel)?;
            gateway.sysctl(&format!("net/ipv4/conf/{}/rp_filter", tunnel.name), "2")?;
        }
        for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/fib_multipath_hash_policy"] {
            gateway.sysctl(key, "1")?;
        }
        let hops = self.tunnels.iter().fold(String::new(), |hops, tunnel| hops + " nexthop dev " + &tunnel.name);
        // The kernel has no multipath routes of IPv6 over devices alone. One tunnel is enough for what labs send.
        let routes = [
            format!("route add 10.{}.0.0/16{hops}", far.number),
            format!("route add fd00:{}::/48 dev {}", far.number, self.tunnels[0].name),
        ];
        gateway.apply("ip", &routes)
    }
}
