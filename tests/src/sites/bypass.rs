//! The contestants that do without the steering device: one tunnel by itself, and the kernel's ECMP.

use anyhow::Result;

use super::lab::Lab;

/// Routing table and rule preference.
const TABLE: u32 = 500;

impl Lab {
    /// Leads IPv4 from LAN to LAN past the steering device, over the tunnels of these numbers: by the kernel's ECMP if
    /// there are several. At both sites, until [`Lab::end_bypass`].
    pub fn bypass(&self, tunnels: &[usize]) -> Result<()> {
        let device = |tunnel: usize| &self.tunnels[tunnel].name;
        let route = match tunnels {
            [one] => format!("dev {}", device(*one)),
            several => several.iter().fold(String::new(), |route, hop| route + " nexthop dev " + device(*hop)),
        };
        for (near, far) in [(0, 1), (1, 0)] {
            let (gateway, number) = (&self.sites[near].gateway, self.sites[far].number);
            // Layer 4 hash: the default hashes addresses only, and all flows here share theirs.
            gateway.sysctl("net/ipv4/fib_multipath_hash_policy", "1")?;
            let commands = [
                format!("route add 10.{number}.0.0/16 table {TABLE} {route}"),
                format!("rule add pref {TABLE} to 10.{number}.0.0/16 lookup {TABLE}"),
            ];
            gateway.apply("ip", &commands)?;
        }
        Ok(())
    }

    /// Leads traffic to the steering device again.
    pub fn end_bypass(&self) -> Result<()> {
        for site in &self.sites {
            let commands = [format!("rule del pref {TABLE}"), format!("route flush table {TABLE}")];
            site.gateway.apply("ip", &commands)?;
            site.gateway.sysctl("net/ipv4/fib_multipath_hash_policy", "0")?;
        }
        Ok(())
    }
}
