//! What the host must look like: a pure function makes a [`Plan`] of a [`Config`]. No I/O here.

pub mod bond_hash;
pub mod changed;
pub mod firewall;
pub mod init;
pub mod measured;
pub mod ports;
pub mod reload;
pub mod rules;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ecmpvpn_common::layout::TunnelId;
use ipnet::{IpNet, Ipv4Net};

use crate::config::{self, Bond, Config, InterfaceName, Policy, PresharedKey, PrivateKey, PublicKey, Rule};

/// The WireGuard implementation, after `auto` is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The kernel's WireGuard.
    Kernel,
    /// gotatun in this process, on TUN devices.
    Userspace,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        })
    }
}

/// Everything that `run` makes on the host, in this order.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Part of the names of directories, pins and link aliases.
    pub site: String,
    pub backend: Backend,
    /// The bond to make or reuse. `None`: outer packets use the interfaces that the host already has.
    pub bond: Option<Bond>,
    pub tunnels: Vec<Tunnel>,
    pub steering: SteeringDevice,
    pub routes: Vec<Route>,
    pub sysctls: Vec<Sysctl>,
    pub table: SteeringTable,
}

/// One WireGuard device with one peer. Its id is `peer * MAX_TUNNELS_PER_PEER + slot`.
#[derive(Clone, Debug)]
pub struct Tunnel {
    pub name: InterfaceName,
    /// Position of the peer in [`SteeringTable::peers`].
    pub peer: usize,
    /// Position in [`PeerTable::tunnels`].
    pub slot: usize,
    /// Bytes.
    pub mtu: u32,
    pub address: Ipv4Net,
    pub private_key: PrivateKey,
    pub public_key: PublicKey,
    pub preshared_key: Option<PresharedKey>,
    /// UDP port at this end.
    pub listen_port: u16,
    /// Source address of the outer packets.
    pub local_endpoint: IpAddr,
    /// Destination of the outer packets.
    pub remote_endpoint: SocketAddr,
    /// Inner addresses that the peer may send from: its prefixes and the far end of `address`.
    pub allowed_ips: Vec<IpNet>,
}

impl Tunnel {
    /// The tunnel's id in the maps.
    #[must_use]
    pub const fn id(&self) -> TunnelId {
        TunnelId::at(self.peer, self.slot)
    }
}

/// The device that remote prefixes are routed to.
#[derive(Clone, Debug)]
pub struct SteeringDevice {
    pub name: InterfaceName,
    /// Bytes; the same as the tunnels' MTU.
    pub mtu: u32,
    /// This gateway's addresses inside the VPN.
    pub addresses: Vec<IpNet>,
}

/// A route into the steering device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub prefix: IpNet,
    /// Source address for this gateway's own traffic.
    pub source: Option<IpAddr>,
}

/// A kernel setting below `/proc/sys/net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sysctl {
    /// `net.ipv4.ip_forward = 1`
    Ipv4Forwarding,
    /// `net.ipv6.conf.all.forwarding = 1`. First `accept_ra = 2` if router advertisements are in use.
    Ipv6Forwarding,
    /// `net.ipv4.conf.DEVICE.rp_filter = 2`
    LooseReversePath(InterfaceName),
}

/// Content of the steering maps.
#[derive(Clone, Debug)]
pub struct SteeringTable {
    /// Seed of the flow hash.
    pub seed: u64,
    /// A flow may move after a pause longer than this, microseconds. `None`: automatic.
    pub flowlet_gap_us: Option<u32>,
    /// Whether the MSS of TCP connections that begin is lowered to what fits through a tunnel.
    pub mss_clamp: bool,
    pub peers: Vec<PeerTable>,
    /// In order; the first match applies.
    pub rules: Vec<Rule>,
}

/// One remote site's part of the steering maps.
#[derive(Clone, Debug)]
pub struct PeerTable {
    pub name: String,
    /// For flows that no rule gives another policy.
    pub policy: Policy,
    /// Whether sprayed flows are put back in order, if the site does that.
    pub restore_order: bool,
    /// Destinations behind this peer.
    pub prefixes: Vec<IpNet>,
    /// Interface and weight of each tunnel, by slot. Weight `None`: to be learned. Weight 0: the tunnel of this slot
    /// was removed; see [`Plan::keep_slots`].
    pub tunnels: Vec<(InterfaceName, Option<u16>)>,
}

/// Longest name of an interface. Source: `IFNAMSIZ`, `include/uapi/linux/if.h`.
const LONGEST_NAME: usize = 15;

impl Plan {
    /// The name of the device that holds packets for their order, for example `ecmp0o`.
    pub fn holding_name(&self) -> String {
        let mut name = self.steering.name.as_str().to_owned();
        name.truncate(LONGEST_NAME - 1);
        name.push('o');
        name
    }

    /// The tunnel with this name.
    pub fn tunnel(&self, name: &InterfaceName) -> Option<&Tunnel> {
        self.tunnels.iter().find(|tunnel| tunnel.name == *name)
    }

    /// Makes the plan for `config` with this backend.
    pub fn new(config: &Config, backend: Backend) -> Self {
        let tunnels: Vec<Tunnel> = config
            .peers
            .iter()
            .enumerate()
            .flat_map(|(peer_at, peer)| {
                peer.tunnels.iter().enumerate().map(move |(slot, tunnel)| Tunnel {
                    name: tunnel.name.clone(),
                    peer: peer_at,
                    slot,
                    mtu: config.steering.mtu,
                    address: tunnel.address,
                    private_key: tunnel.private_key.as_ref().unwrap_or(&config.site.private_key).clone(),
                    public_key: tunnel.public_key.unwrap_or(peer.public_key),
                    preshared_key: tunnel.preshared_key.as_ref().or(peer.preshared_key.as_ref()).cloned(),
                    listen_port: tunnel.listen_port,
                    local_endpoint: peer.local_endpoint,
                    remote_endpoint: SocketAddr::new(peer.remote_endpoint, tunnel.remote_port),
                    allowed_ips: allowed_ips(peer, tunnel),
                })
            })
            .collect();
        Self {
            site: config.site.name.clone(),
            backend,
            bond: config.bond.clone(),
            steering: SteeringDevice {
                name: config.steering.device.clone(),
                mtu: config.steering.mtu,
                addresses: config.site.addresses.clone(),
            },
            routes: routes(config),
            sysctls: sysctls(config, &tunnels),
            table: SteeringTable {
                seed: config.steering.seed,
                flowlet_gap_us: config.steering.flowlet_gap_us,
                mss_clamp: config.steering.mss_clamp,
                peers: peer_tables(config),
                rules: config.rules.clone(),
            },
            tunnels,
        }
    }

    /// Keeps every tunnel in the slot that it has in the running maps, because buckets and counters are stored by slot.
    /// New tunnels take free slots. `held` has the names of the running peers and of their tunnels, by position.
    ///
    /// # Errors
    /// The plan has other peers than the running maps.
    pub fn keep_slots(&mut self, held: &[(String, Vec<String>)]) -> Result<(), PeersDiffer> {
        let names = self.table.peers.iter().map(|peer| &peer.name);
        if !names.eq(held.iter().map(|(name, _)| name)) {
            return Err(PeersDiffer);
        }
        for (number, (peer, (_, held))) in self.table.peers.iter_mut().zip(held).enumerate() {
            let mut desired = std::mem::take(&mut peer.tunnels);
            let mut kept: Vec<Option<(InterfaceName, Option<u16>)>> = held
                .iter()
                .map(|name| {
                    let at = desired.iter().position(|(desired, _)| desired.as_str() == name)?;
                    Some(desired.remove(at))
                })
                .collect();
            for new in desired {
                match kept.iter_mut().find(|slot| slot.is_none()) {
                    Some(free) => *free = Some(new),
                    None => kept.push(Some(new)),
                }
            }
            let former = |slot: usize| held.get(slot).and_then(|name| InterfaceName::new(name).ok());
            peer.tunnels = kept
                .into_iter()
                .enumerate()
                .filter_map(|(slot, tunnel)| tunnel.or_else(|| Some((former(slot)?, Some(0)))))
                .collect();
            for tunnel in self.tunnels.iter_mut().filter(|tunnel| tunnel.peer == number) {
                let slot = peer.tunnels.iter().position(|(name, weight)| *name == tunnel.name && *weight != Some(0));
                tunnel.slot = slot.unwrap_or(tunnel.slot);
            }
        }
        Ok(())
    }

    /// The alias of every link that `run` makes. It marks the link as made by ecmpvpn for this site.
    pub fn link_alias(site: &str) -> String {
        format!("ecmpvpn:{site}")
    }
}

/// The running data plane has other peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the configuration has other peers than the running site")]
pub struct PeersDiffer;

/// The other host of a point-to-point net, /30 or /31. `None`: the net does not have exactly two hosts.
pub fn far_address(near: Ipv4Net) -> Option<Ipv4Addr> {
    near.hosts().find(|host| *host != near.addr()).filter(|_| near.prefix_len() >= 30)
}

fn allowed_ips(peer: &config::Peer, tunnel: &config::Tunnel) -> Vec<IpNet> {
    let far = far_address(tunnel.address).map(|address| IpNet::from(IpAddr::from(address)));
    peer.prefixes.iter().copied().chain(far).collect()
}

fn routes(config: &Config) -> Vec<Route> {
    let source_for = |prefix: &IpNet| {
        let same_family = |net: &&IpNet| net.addr().is_ipv4() == prefix.addr().is_ipv4();
        config.site.addresses.iter().find(same_family).map(IpNet::addr)
    };
    config
        .peers
        .iter()
        .flat_map(|peer| &peer.prefixes)
        .map(|prefix| Route { prefix: *prefix, source: source_for(prefix) })
        .collect()
}

fn sysctls(config: &Config, tunnels: &[Tunnel]) -> Vec<Sysctl> {
    let steers = |ipv4: bool| config.peers.iter().flat_map(|p| &p.prefixes).any(|net| net.addr().is_ipv4() == ipv4);
    let forwarding = [(steers(true), Sysctl::Ipv4Forwarding), (steers(false), Sysctl::Ipv6Forwarding)]
        .into_iter()
        .filter_map(|(needed, sysctl)| needed.then_some(sysctl));
    forwarding.chain(tunnels.iter().map(|tunnel| Sysctl::LooseReversePath(tunnel.name.clone()))).collect()
}

fn peer_tables(config: &Config) -> Vec<PeerTable> {
    config
        .peers
        .iter()
        .map(|peer| PeerTable {
            name: peer.name.clone(),
            policy: peer.policy.unwrap_or(config.steering.policy),
            restore_order: peer.restore_order,
            prefixes: peer.prefixes.clone(),
            tunnels: peer.tunnels.iter().map(|tunnel| (tunnel.name.clone(), tunnel.weight)).collect(),
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::{BackendChoice, Health, Peer, PrivateKey, Site, Steering, Tunnel as ConfigTunnel};

    /// A site with one peer and this many tunnels.
    pub(crate) fn config(tunnels: u8) -> Config {
        let name = |text: &str| InterfaceName::new(text).expect("a valid name");
        Config {
            site: Site {
                name: "site-a".into(),
                private_key: PrivateKey::generate(),
                addresses: vec!["10.100.0.1/32".parse().unwrap(), "fd00:100::1/128".parse().unwrap()],
            },
            bond: None,
            steering: Steering {
                device: name("ecmp0"),
                policy: Policy::Hash,
                backend: BackendChoice::Auto,
                mtu: 1420,
                mss_clamp: true,
                seed: 7,
                flowlet_gap_us: None,
                spray_elephants: true,
                restore_order: true,
                restore_ms: config::RESTORE_MS,
            },
            peers: vec![Peer {
                name: "site-b".into(),
                public_key: PrivateKey::generate().public_key(),
                preshared_key: None,
                local_endpoint: "10.2.3.4".parse().unwrap(),
                remote_endpoint: "10.5.6.7".parse().unwrap(),
                remote_name: None,
                remote_bond: None,
                policy: None,
                restore_order: true,
                prefixes: vec!["10.20.0.0/16".parse().unwrap(), "fd00:20::/48".parse().unwrap()],
                tunnels: (0..tunnels)
                    .map(|i| ConfigTunnel {
                        name: name(&format!("wg{i}")),
                        listen_port: 51820 + u16::from(i),
                        remote_port: 51920 + u16::from(i),
                        address: Ipv4Net::new(Ipv4Addr::new(169, 254, 77, 2 * i), 31).unwrap(),
                        weight: Some(1),
                        private_key: None,
                        public_key: None,
                        preshared_key: None,
                    })
                    .collect(),
            }],
            rules: vec![],
            health: Health { interval_ms: 100, down_after: 3, up_after: 5 },
            metrics: None,
        }
    }

    /// A bond of these members, without addresses.
    pub(crate) fn bond(members: &[&str]) -> Bond {
        let name = |text: &str| InterfaceName::new(text).expect("a valid name");
        Bond {
            name: name("bond0"),
            members: members.iter().map(|member| name(member)).collect(),
            mode: config::BondMode::Lacp,
            xmit_hash_policy: config::XmitHashPolicy::Layer34,
            lacp_rate: config::LacpRate::Fast,
            miimon_ms: 100,
            addresses: Vec::new(),
        }
    }

    #[test]
    fn the_name_of_the_device_that_holds_packets_fits() {
        let mut plan = Plan::new(&config(1), Backend::Kernel);
        for (steering, holding) in [("ecmp0", "ecmp0o"), ("fifteen-letters", "fifteen-lettero")] {
            plan.steering.name = InterfaceName::new(steering).unwrap();
            assert_eq!(plan.holding_name(), holding);
        }
    }

    #[test]
    fn far_address_is_the_other_host_of_the_net() {
        for (near, far) in [
            ("169.254.77.0/31", Some("169.254.77.1")),
            ("169.254.77.1/31", Some("169.254.77.0")),
            ("169.254.77.5/30", Some("169.254.77.6")),
            ("169.254.77.6/30", Some("169.254.77.5")),
            ("169.254.77.1/24", None),
            ("169.254.77.1/32", None),
        ] {
            let expected = far.map(|far| far.parse::<Ipv4Addr>().unwrap());
            assert_eq!(far_address(near.parse().unwrap()), expected, "{near}");
        }
    }

    #[test]
    fn tunnels_keep_their_slots_and_new_ones_take_free_ones() {
        let held = |names: &[&str]| [("site-b".to_owned(), names.iter().map(|name| (*name).to_owned()).collect())];
        let slots = |plan: &Plan| -> Vec<(String, u16)> {
            plan.table.peers[0].tunnels.iter().map(|(name, weight)| (name.to_string(), weight.unwrap())).collect()
        };
        let row = |name: &str, weight| (name.to_owned(), weight);
        let mut plan = Plan::new(&config(3), Backend::Kernel);
        plan.keep_slots(&held(&["wg2", "gone", "wg0", "wg9"])).unwrap();
        assert_eq!(slots(&plan), [row("wg2", 1), row("wg1", 1), row("wg0", 1), row("wg9", 0)]);
        assert_eq!(plan.tunnels.iter().map(|tunnel| tunnel.slot).collect::<Vec<_>>(), [2, 1, 0]);

        let mut plan = Plan::new(&config(2), Backend::Kernel);
        plan.keep_slots(&held(&["wg1"])).unwrap();
        assert_eq!(slots(&plan), [row("wg1", 1), row("wg0", 1)]);
        assert_eq!(plan.keep_slots(&[("site-c".to_owned(), vec![])]), Err(PeersDiffer));
        assert_eq!(plan.keep_slots(&[]), Err(PeersDiffer));
    }

    #[test]
    fn each_tunnel_admits_the_prefixes_and_its_own_far_end() {
        let plan = Plan::new(&config(2), Backend::Kernel);
        let allowed: Vec<String> = plan.tunnels[1].allowed_ips.iter().map(ToString::to_string).collect();
        assert_eq!(allowed, ["10.20.0.0/16", "fd00:20::/48", "169.254.77.3/32"]);
        assert_eq!(plan.tunnels[1].remote_endpoint, "10.5.6.7:51921".parse().unwrap());
    }

    #[test]
    fn routes_carry_the_source_address_of_their_family() {
        let plan = Plan::new(&config(1), Backend::Kernel);
        let sources: Vec<_> = plan.routes.iter().map(|route| route.source.unwrap().to_string()).collect();
        assert_eq!(sources, ["10.100.0.1", "fd00:100::1"]);
    }

    #[test]
    fn forwarding_is_asked_for_only_in_families_that_are_steered() {
        let mut config = config(1);
        config.peers[0].prefixes.retain(|prefix| prefix.addr().is_ipv4());
        let plan = Plan::new(&config, Backend::Kernel);
        assert_eq!(
            plan.sysctls,
            [Sysctl::Ipv4Forwarding, Sysctl::LooseReversePath(InterfaceName::new("wg0").unwrap())]
        );
    }
}
