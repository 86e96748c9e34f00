//! Routes past the steering device, for comparisons: over one tunnel alone, or over several by the kernel's ECMP.

use anyhow::Result;

use super::lab::Lab;

/// Number of the routing table, and preference of its rule.
const TABLE: u32 = 500;

impl Lab {
    /// Routes IPv4 from LAN to LAN past the steering device at both sites, until [`Lab::end_bypass`]. `tunnels` are
    /// numbers of tunnels, from 0. If there are several, the kernel's ECMP chooses among them.
    pub fn bypass(&self, tunnels: &[usize]) -> Result<()> {
        let device = |tunnel: usize| &self.tunnels[tunnel].name;
        let route = match tunnels {
            [one] => format!("dev {}", device(*one)),
            several => several.iter().fold(String::new(), |route, hop| route + " nexthop dev " + device(*hop)),
        };
        for (near, far) in [(0, 1), (1, 0)] {
            let (gateway, number) = (&self.sites[near].gateway, self.sites[far].number);
            // 1 is the layer 4 hash. The default hashes only addresses, and all flows here have the same addresses.
            gateway.sysctl("net/ipv4/fib_multipath_hash_policy", "1")?;
            let commands = [
                format!("route add 10.{number}.0.0/16 table {TABLE} {route}"),
                format!("rule add pref {TABLE} to 10.{number}.0.0/16 lookup {TABLE}"),
            ];
            gateway.apply("ip", &commands)?;
        }
        Ok(())
    }

    /// Routes traffic to the steering device again.
    pub fn end_bypass(&self) -> Result<()> {
        for site in &self.sites {
            let commands = [format!("rule del pref {TABLE}"), format!("route flush table {TABLE}")];
            site.gateway.apply("ip", &commands)?;
            site.gateway.sysctl("net/ipv4/fib_multipath_hash_policy", "0")?;
        }
        Ok(())
    }
}
