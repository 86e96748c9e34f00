//! Makes the configurations of both sites from the options. The only I/O is the operating system's random numbers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{InitError, Members, Request, wrong};
use crate::config::{
    BackendChoice, Bond, BondMode, Config, Health, InterfaceName, LacpRate, Peer, Policy, PresharedKey, PrivateKey,
    RemoteBond, Site, Steering, Tunnel, XmitHashPolicy,
};
use crate::plan::ports::{self, End, PortPair, PortPlan};

/// The first /31 net of the tunnels. It is link-local, so it cannot clash with a routed net.
pub const TUNNEL_NETS: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 0);

/// Lowest port unless the user gives another: the customary port of WireGuard.
pub const BASE_PORT: u16 = 51820;
/// MTU of the tunnels, bytes, unless the user gives another: what WireGuard leaves of 1500.
pub const MTU: u32 = 1420;
/// The defaults of `[health]`.
pub const HEALTH: Health = Health { interval_ms: 100, down_after: 3, up_after: 5 };

/// Two configurations that fit each other.
#[derive(Debug)]
pub struct Sites {
    pub a: Config,
    pub b: Config,
    pub ports: PortPlan,
}

/// One site as the command line describes it.
#[derive(Clone, Copy)]
struct Side<'a> {
    flag: &'a str,
    name: &'a str,
    endpoint: IpAddr,
    prefixes: &'a [IpNet],
    members: Option<&'a Members>,
    bond_addresses: &'a [IpNet],
}

/// What both sites have in common.
struct Common {
    preshared_key: PresharedKey,
    seed: u64,
    mtu: u32,
}

pub fn make(asked: &Request) -> Result<Sites, InitError> {
    let a = Side {
        flag: "a",
        name: &asked.a_name,
        endpoint: asked.a_endpoint,
        prefixes: &asked.a_prefixes,
        members: asked.a_members.as_ref(),
        bond_addresses: &asked.a_bond_addresses,
    };
    let b = Side {
        flag: "b",
        name: &asked.b_name,
        endpoint: asked
            .b_endpoint
            .ok_or_else(|| wrong("there is no --b-endpoint: give site B's address".to_owned()))?,
        prefixes: &asked.b_prefixes,
        members: asked.b_members.as_ref(),
        bond_addresses: &asked.b_bond_addresses,
    };
    check(&[a, b])?;
    let ports = plan_ports(asked, &a, &b)?;
    let addresses = vpn_addresses(&[a, b])?;
    let seed: [u8; 8] = std::array::from_fn(|i| PresharedKey::generate().as_bytes()[i]);
    let common = Common {
        preshared_key: PresharedKey::generate(),
        // 63 bits: TOML guarantees only signed 64-bit integers.
        seed: u64::from_le_bytes(seed) >> 1,
        mtu: asked.mtu.unwrap_or(MTU),
    };
    let keys = [PrivateKey::generate(), PrivateKey::generate()];
    let exchanged: Vec<PortPair> = ports.pairs.iter().map(|pair| PortPair { a: pair.b, b: pair.a }).collect();
    let [config_a, config_b] = [(0, a, b, &ports.pairs), (1, b, a, &exchanged)].map(|(end, near, far, pairs)| {
        let addresses = (addresses[end].as_slice(), addresses[1 - end].as_slice());
        site(&common, &keys, end, near, far, addresses, pairs)
    });
    Ok(Sites { a: config_a, b: config_b, ports })
}

/// Finds errors that can be reported in terms of the command line. Others are found when the result is read back.
fn check(sides: &[Side<'_>; 2]) -> Result<(), InitError> {
    let [a, b] = sides;
    if a.name == b.name {
        return Err(wrong(format!("--a-name and --b-name are both {}: give every site a name of its own", a.name)));
    }
    for side in sides {
        let flag = side.flag;
        check_bond(flag, side.endpoint, side.members, side.bond_addresses)?;
        for end in sides {
            if let Some(net) = side.prefixes.iter().find(|net| net.contains(&end.endpoint)) {
                return Err(wrong(format!(
                    "--{flag}-prefix {net} contains --{}-endpoint {}: the tunnels' own packets would be steered into \
                     the tunnels, so leave that address out",
                    end.flag, end.endpoint
                )));
            }
        }
    }
    if let Some(net) = a.prefixes.iter().find(|net| b.prefixes.contains(net)) {
        return Err(wrong(format!("--a-prefix and --b-prefix are both {net}: a net is behind one site only")));
    }
    Ok(())
}

/// Checks that the options on one site's bond fit each other. `flag` is `a` or `b`.
pub fn check_bond(
    flag: &str,
    endpoint: IpAddr,
    members: Option<&Members>,
    addresses: &[IpNet],
) -> Result<(), InitError> {
    match members {
        Some(Members::Names(_)) if addresses.is_empty() => Err(wrong(format!(
            "--{flag}-members names interfaces to bond: add the bond's address, as --{flag}-bond-address {endpoint}/24"
        ))),
        Some(Members::Count(_)) if !addresses.is_empty() => Err(wrong(format!(
            "--{flag}-bond-address is for a bond that is made here: give --{flag}-members as names, or leave it out"
        ))),
        Some(Members::Names(_)) if !addresses.iter().any(|net| net.addr() == endpoint) => {
            let given: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            Err(wrong(format!(
                "--{flag}-bond-address is {}, but outer packets leave from --{flag}-endpoint {endpoint}: give that address \
                 with its prefix length, as {endpoint}/{}",
                given.join(","),
                if endpoint.is_ipv4() { 24 } else { 64 }
            )))
        }
        _ => Ok(()),
    }
}

fn plan_ports(asked: &Request, a: &Side<'_>, b: &Side<'_>) -> Result<PortPlan, InitError> {
    let end = |side: &Side<'_>| {
        let members = side.members.map_or(asked.tunnels, member_count);
        End::new(side.endpoint, members, XmitHashPolicy::Layer34)
    };
    let request = ports::Request {
        a: end(a),
        b: end(b),
        tunnels: usize::from(asked.tunnels),
        base_port: asked.base_port.unwrap_or(BASE_PORT),
    };
    ports::plan(&request).map_err(InitError::from)
}

pub fn member_count(members: &Members) -> u8 {
    match members {
        Members::Names(names) => u8::try_from(names.len()).unwrap_or(u8::MAX),
        Members::Count(count) => *count,
    }
}

/// The addresses of the two gateways inside the VPN: one IPv4 and one IPv6 address each, outside of all other nets.
fn vpn_addresses(sides: &[Side<'_>; 2]) -> Result<[Vec<IpNet>; 2], InitError> {
    let taken = |net: &IpNet| {
        sides.iter().any(|side| {
            let nets = side.prefixes.iter().chain(side.bond_addresses);
            net.contains(&side.endpoint) || nets.into_iter().any(|other| other.contains(net) || net.contains(other))
        })
    };
    let first_free = |mut nets: Box<dyn Iterator<Item = IpNet>>, family: &str| {
        nets.find(|net| !taken(net))
            .ok_or_else(|| wrong(format!("no {family} net is left for the gateways: narrow the prefixes")))
    };
    let ipv4 = |a: u8, b: u8| (0..=255).map(move |c| Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), 24).into());
    let ipv4 = first_free(Box::new(ipv4(10, 100).chain(ipv4(172, 31)).chain(ipv4(192, 168))), "IPv4")?;
    let ipv6 = |c: u16| ipnet::Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, c, 0, 0, 0, 0, 0, 0), 64).into();
    let ipv6 = first_free(Box::new((0x100..=0x1ff).map(ipv6)), "IPv6")?;
    let host = |net: IpNet, number: u8| match net {
        IpNet::V4(net) => IpNet::from(IpAddr::from(Ipv4Addr::from_bits(net.addr().to_bits() + u32::from(number)))),
        IpNet::V6(net) => IpNet::from(IpAddr::from(Ipv6Addr::from_bits(net.addr().to_bits() + u128::from(number)))),
    };
    Ok([1, 2].map(|number| vec![host(ipv4, number), host(ipv6, number)]))
}

/// The configuration of `near`. `end` says whether it has the even (0) or odd (1) address of each tunnel.
fn site(
    common: &Common,
    keys: &[PrivateKey; 2],
    end: usize,
    near: Side<'_>,
    far: Side<'_>,
    (near_addresses, far_addresses): (&[IpNet], &[IpNet]),
    pairs: &[PortPair],
) -> Config {
    let tunnel = |(position, pair): (usize, &PortPair)| {
        let offset = u32::try_from(2 * position + end).expect("there are few tunnels");
        Tunnel {
            name: name(&format!("wg{position}")),
            listen_port: pair.a,
            remote_port: pair.b,
            address: Ipv4Net::new_assert(Ipv4Addr::from_bits(TUNNEL_NETS.to_bits() + offset), 31),
            weight: Some(1),
            private_key: None,
            public_key: None,
            preshared_key: None,
        }
    };
    Config {
        site: Site { name: near.name.to_owned(), private_key: keys[end].clone(), addresses: near_addresses.to_vec() },
        bond: bond(near.members, near.bond_addresses),
        steering: steering(common.mtu, common.seed),
        peers: vec![Peer {
            name: far.name.to_owned(),
            public_key: keys[1 - end].public_key(),
            preshared_key: Some(common.preshared_key.clone()),
            local_endpoint: near.endpoint,
            remote_endpoint: far.endpoint,
            remote_name: None,
            remote_bond: far.members.map(remote_bond),
            policy: None,
            restore_order: true,
            prefixes: far.prefixes.iter().chain(far_addresses).copied().collect(),
            tunnels: pairs.iter().enumerate().map(tunnel).collect(),
        }],
        rules: Vec::new(),
        health: HEALTH,
        metrics: None,
    }
}

/// The bond to make, if interfaces are named.
pub fn bond(members: Option<&Members>, addresses: &[IpNet]) -> Option<Bond> {
    match members {
        Some(Members::Names(members)) => Some(Bond {
            name: name("bond0"),
            members: members.clone(),
            mode: BondMode::Lacp,
            xmit_hash_policy: XmitHashPolicy::Layer34,
            lacp_rate: LacpRate::Fast,
            miimon_ms: 100,
            addresses: addresses.to_vec(),
        }),
        _ => None,
    }
}

/// The `remote_bond` of the other site for this bond.
pub fn remote_bond(members: &Members) -> RemoteBond {
    RemoteBond { members: member_count(members), xmit_hash_policy: XmitHashPolicy::Layer34 }
}

pub fn steering(mtu: u32, seed: u64) -> Steering {
    Steering {
        device: name("ecmp0"),
        policy: Policy::Adaptive,
        backend: BackendChoice::Auto,
        mtu,
        mss_clamp: true,
        seed,
        flowlet_gap_us: None,
        spray_elephants: true,
        restore_order: true,
        restore_ms: crate::config::RESTORE_MS,
    }
}

fn name(name: &str) -> InterfaceName {
    InterfaceName::new(name).expect("a fixed name that fits")
}
