//! `parse` reads back what `render` writes.

use super::*;

fn interface() -> impl Strategy<Value = InterfaceName> {
    "[a-z][a-z0-9._-]{4,10}".prop_map(|name| InterfaceName::new(&name).unwrap())
}

fn prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<u16>(), 17u8..=32).prop_map(|(low, length)| {
            IpNet::new_assert(std::net::Ipv4Addr::from_bits(0xac10_0000 | u32::from(low)).into(), length).trunc()
        }),
        (any::<u64>(), 17u8..=128).prop_map(|(low, length)| {
            IpNet::new_assert(std::net::Ipv6Addr::from_bits((0xfd77 << 112) | u128::from(low)).into(), length).trunc()
        }),
    ]
}

prop_compose! {
    fn rule()(
        src in proptest::option::of(prefix()),
        proto in proptest::option::of(any::<u8>()),
        ports in prop::collection::vec((any::<u16>(), any::<u16>()), 0..4),
        dscp in proptest::option::of(0u8..64),
        fwmark in proptest::option::of(any::<u32>()),
        policy in prop::sample::select(Policy::ALL),
    ) -> Rule {
        let dst_ports = match proto {
            Some(6 | 17) => ports.iter().map(|(a, b)| (*a.min(b), *a.max(b))).collect(),
            _ => Vec::new(),
        };
        Rule { src, dst: src, proto, src_ports: Vec::new(), dst_ports, dscp, fwmark, policy: Some(policy), ..Rule::default() }
    }
}

prop_compose! {
    fn tunnels()(
        names in prop::collection::hash_set(interface(), 1..MAX_TUNNELS_PER_PEER),
        port in 1024u16..65000,
        remote_port in 1u16..65000,
        weight in proptest::option::of(1u16..=1000),
        own in any::<bool>(),
    ) -> Vec<Tunnel> {
        let tunnel = |(position, name): (usize, InterfaceName)| {
            let offset = u16::try_from(position).unwrap();
            let address = std::net::Ipv4Addr::new(169, 254, 77, u8::try_from(2 * position).unwrap());
            Tunnel {
                name,
                listen_port: port + offset,
                remote_port: remote_port + offset,
                address: ipnet::Ipv4Net::new_assert(address, 31),
                weight,
                private_key: own.then(|| PRIVATE.parse().unwrap()),
                public_key: own.then(|| PrivateKey::generate().public_key()),
                preshared_key: own.then(|| PRESHARED.parse().unwrap()),
            }
        };
        names.into_iter().enumerate().map(tunnel).collect()
    }
}

prop_compose! {
    fn config()(
        backend in prop::sample::select(BackendChoice::ALL),
        policy in prop::sample::select(Policy::ALL),
        mtu in 1280u32..=9000,
        seed in any::<u64>(),
        flowlet_gap_us in proptest::option::of(1u32..=10_000_000),
        (spray_elephants, restore_order, mss_clamp) in any::<(bool, bool, bool)>(), restore_ms in 1u32..=100,
        bond_mode in proptest::option::of(prop::sample::select(BondMode::ALL)),
        hash_policy in prop::sample::select(&XmitHashPolicy::ALL[..]),
        preshared in any::<bool>(),
        prefixes in prop::collection::hash_set(prefix(), 1..8),
        tunnels in tunnels(),
        rules in prop::collection::vec(rule(), 0..5),
        port in proptest::option::of(1u16..),
    ) -> Config {
        let mut config = parse(FULL, "f", &keys).unwrap();
        let bond = config.bond.take().unwrap();
        config.bond = bond_mode.map(|mode| Bond { mode, xmit_hash_policy: hash_policy, ..bond });
        config.steering = Steering { policy, backend, mtu, mss_clamp, seed, flowlet_gap_us, spray_elephants, restore_order, restore_ms, ..config.steering };
        let peer = &mut config.peers[0];
        peer.prefixes = prefixes.into_iter().collect();
        peer.tunnels = tunnels;
        if !preshared {
            peer.preshared_key = None;
            peer.remote_bond = None;
            peer.policy = Some(policy);
            peer.restore_order = false;
        }
        config.rules = rules;
        for rule in config.rules.iter_mut().step_by(2) {
            *rule = Rule { pin: true, policy: Some(Policy::Hash), tunnels: vec![peer.tunnels[0].name.clone()], ..rule.clone() };
        }
        config.metrics = port.map(|port| Metrics { listen: ([0; 16], port).into() });
        config
    }
}

#[test]
fn keys_stay_out_of_the_text() {
    let text = render(&parse(FULL, "f", &keys).unwrap());
    assert!(!text.contains(PRIVATE) && !text.contains(PRESHARED));
}

proptest! {
    #[test]
    fn what_is_rendered_is_read_back(config in config()) {
        let text = render(&config);
        prop_assert_eq!(parse(&text, "f", &keys).map_err(|p| format!("{p}\n{text}")), Ok(config));
    }
}
