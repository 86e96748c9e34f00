//! The two configurations that `init` makes fit each other.

use std::collections::HashSet;

use clap::Parser as _;
use proptest::prelude::*;

use crate::cli::{Cli, Command};
use crate::config::InterfaceName;
use crate::plan::far_address;
use crate::plan::init::Request;
use crate::plan::init::sites::{Sites, make};

fn args(more: &str) -> Request {
    let fixed = "ecmpvpn init --a-endpoint 10.2.3.4 --b-endpoint 10.5.6.7";
    let cli = Cli::try_parse_from(fixed.split(' ').chain(more.split(' '))).expect("sound arguments");
    let Command::Init(args) = cli.command else { panic!("{cli:?}") };
    args.request()
}

fn assert_fit(Sites { a, b, ports }: &Sites) {
    let (to_b, to_a) = (&a.peers[0], &b.peers[0]);
    assert_eq!((&to_b.name, &to_a.name), (&b.site.name, &a.site.name));
    assert_eq!(to_b.public_key, b.site.private_key.public_key());
    assert_eq!(to_a.public_key, a.site.private_key.public_key());
    assert_ne!(to_a.public_key, to_b.public_key);
    assert_eq!(to_a.preshared_key, to_b.preshared_key);
    assert!(to_a.preshared_key.is_some());
    assert_eq!((to_b.local_endpoint, to_b.remote_endpoint), (to_a.remote_endpoint, to_a.local_endpoint));
    assert_eq!(a.steering, b.steering);
    assert!(a.site.addresses.iter().all(|address| to_a.prefixes.contains(address)));
    assert!(b.site.addresses.iter().all(|address| to_b.prefixes.contains(address)));
    assert_eq!((to_a.tunnels.len(), to_b.tunnels.len()), (ports.pairs.len(), ports.pairs.len()));
    for ((near, far), pair) in to_b.tunnels.iter().zip(&to_a.tunnels).zip(&ports.pairs) {
        assert_eq!((near.listen_port, near.remote_port), (pair.a, pair.b));
        assert_eq!((far.listen_port, far.remote_port), (pair.b, pair.a));
        assert_eq!(far_address(near.address), Some(far.address.addr()));
        assert_eq!(near.name, far.name);
    }
}

#[test]
fn a_bond_of_names_is_made_and_a_count_is_for_the_far_end() {
    let sites = make(&args(
        "--a-prefix 10.10.0.0/16 --b-prefix 10.20.0.0/16 --a-members eno1,eno2 --a-bond-address 10.2.3.4/24 --b-members 4",
    ))
    .expect("sound");
    assert_fit(&sites);
    let bond = sites.a.bond.expect("names were given");
    assert_eq!(bond.members.iter().map(InterfaceName::as_str).collect::<Vec<_>>(), ["eno1", "eno2"]);
    assert_eq!(bond.addresses, ["10.2.3.4/24".parse().unwrap()]);
    assert_eq!(sites.b.bond, None);
    assert_eq!(sites.a.peers[0].remote_bond.map(|bond| bond.members), Some(4));
    assert_eq!(sites.b.peers[0].remote_bond.map(|bond| bond.members), Some(2));
}

#[test]
fn gateways_get_addresses_that_nothing_else_has() {
    let sites = make(&args("--a-prefix 10.100.0.0/16 --b-prefix fd00::/17,172.31.0.0/24")).expect_err("fd00::/17");
    assert_eq!(sites.to_string(), "no IPv6 net is left for the gateways: narrow the prefixes");
    let sites = make(&args("--a-prefix 10.100.0.0/16 --b-prefix fd00:100::/32,172.31.0.0/24")).expect("sound");
    let addresses: Vec<String> = sites.b.site.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["172.31.1.2/32", "fd00:101::2/128"]);
    assert_fit(&sites);
}

#[test]
fn two_runs_share_nothing_secret() {
    let sites = [(); 2].map(|()| make(&args("--a-prefix 10.10.0.0/16 --b-prefix 10.20.0.0/16")).expect("sound"));
    let keys: HashSet<String> = sites
        .iter()
        .flat_map(|sites| [&sites.a, &sites.b])
        .flat_map(|site| {
            let shared = site.peers[0].preshared_key.as_ref().expect("one").to_base64().to_string();
            [site.site.private_key.to_base64().to_string(), shared]
        })
        .collect();
    assert_eq!(keys.len(), 6);
    assert_ne!(sites[0].a.steering.seed, sites[1].a.steering.seed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn sites_fit_each_other(tunnels in 1u8..=32, a in 1u8..=8, b in 1u8..=8, port in 1024u16..60000) {
        let more = format!(
            "--a-prefix 10.10.0.0/16 --b-prefix 10.20.0.0/16 --tunnels {tunnels} --a-members {a} --b-members {b} \
             --base-port {port}"
        );
        assert_fit(&make(&args(&more)).expect("sound"));
    }
}
