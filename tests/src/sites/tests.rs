//! The lab itself, before ecmpvpn runs in it.

use std::net::UdpSocket;
use std::time::Duration;

use ecmpvpn::config;

use super::{FsPath, Lab, Options, wait_for_reply};

fn lab() -> Lab {
    // Nothing here starts the program.
    Lab::new(Options::default(), FsPath::new("/nonexistent/ecmpvpn")).expect("needs root")
}

#[test]
fn configurations_are_what_ecmpvpn_reads() {
    let lab = lab();
    for (end, site) in lab.sites.iter().enumerate() {
        let config = config::load(&site.config).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(config.site.name, site.name);
        let tunnels = &config.peers[0].tunnels;
        assert_eq!(tunnels.len(), 3);
        for (tunnel, lab) in tunnels.iter().zip(&lab.tunnels) {
            assert_eq!((tunnel.listen_port, tunnel.remote_port), (lab.ports[end], lab.ports[1 - end]));
        }
    }
}

#[test]
fn outer_packets_take_the_link_that_the_bond_would_choose() {
    let lab = lab();
    let [a, b] = &lab.sites;
    wait_for_reply(&a.gateway, a.endpoint.into(), b.endpoint.into(), Duration::from_secs(5)).unwrap();
    for (near, far, end) in [(a, b, 0), (b, a, 1)] {
        let mut used = Vec::new();
        for tunnel in &lab.tunnels {
            let bytes =
                || -> Vec<u64> { (0..3).map(|member| near.device_bytes(&format!("u{member}")).unwrap().1).collect() };
            let before = bytes();
            let socket = near.gateway.run(|| UdpSocket::bind((near.endpoint, tunnel.ports[end]))).unwrap();
            for _ in 0..100 {
                socket.send_to(&[0; 1000], (far.endpoint, tunnel.ports[1 - end])).unwrap();
            }
            let sent: Vec<u64> = bytes().iter().zip(before).map(|(after, before)| after - before).collect();
            let member = usize::from(tunnel.members[end]);
            for (link, bytes) in sent.iter().enumerate() {
                assert_eq!(*bytes >= 100_000, link == member, "{} from {}: {sent:?}", tunnel.name, near.name);
            }
            used.push(member);
        }
        used.sort_unstable();
        assert_eq!(used, [0, 1, 2], "three tunnels on three links");
    }
}

#[test]
fn hosts_reach_their_gateway_and_no_further() {
    let lab = lab();
    for path in [lab.path_v4(), lab.path_v6()] {
        assert!(wait_for_reply(path.from, path.source, path.destination, Duration::from_millis(600)).is_err());
    }
    let site = &lab.sites[1];
    for (source, gateway) in [(site.host_v4(), "10.20.0.1"), (site.host_v6(), "fd00:20::1")] {
        wait_for_reply(&site.host, source, gateway.parse().unwrap(), Duration::from_secs(5)).unwrap();
    }
}
