//! What `parse` and `load` accept, and the exact messages with which they refuse.

mod edit;
mod files;
mod refusals;
mod remote_names;
mod render;
mod tunnel_keys;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;

const PRIVATE: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
const PRESHARED: &str = "FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=";

/// Every section and every key; the line numbers in the tests below count from its first line.
const FULL: &str = r#"[site]
name = "site-a"
private_key_file = "site-a.key"
addresses = ["10.100.0.1/32", "fd00:100::1/128"]

[bond]
name = "bond0"
members = ["eno1", "eno2"]
mode = "802.3ad"
xmit_hash_policy = "layer3+4"
lacp_rate = "fast"
miimon_ms = 100
addresses = ["10.2.3.4/24"]

[steering]
device = "ecmp0"
policy = "adaptive"
backend = "auto"
mtu = 1420
seed = 0x1f2e3d4c
flowlet_gap_us = "auto"
spray_elephants = false
[[peer]]
name = "site-b"
public_key = "6Z2XTSd8hhpAyPLYQwmdiL2gHb7ItOyAlNPlbLRmUX0="
preshared_key_file = "site-b.psk"
local_endpoint = "10.2.3.4"
remote_endpoint = "10.5.6.7"
remote_bond = { members = 2, xmit_hash_policy = "layer3+4" }
prefixes = ["10.20.0.0/16", "fd00:20::/48"]
[[peer.tunnel]]
name = "wg0"
listen_port = 51820
remote_port = 51822
address = "169.254.77.0/31"
weight = 1
[[peer.tunnel]]
name = "wg1"
listen_port = 51821
remote_port = 51823
address = "169.254.77.2/31"

[[rule]]
proto = "tcp"
dst_ports = [873, "8000-8999"]
policy = "spray"
tunnels = ["wg0"]

[health]
interval_ms = 100
down_after = 3
up_after = 5

[metrics]
listen = "127.0.0.1:9586"
"#;

fn keys(file: &str) -> Result<Zeroizing<String>, KeyFileError> {
    match file {
        "junk.key" => Ok(Zeroizing::new("c2VjcmV0\n".to_owned())),
        "gone.key" => Err(KeyFileError::Missing(file.into())),
        _ if file.rsplit('.').next() == Some("key") => Ok(Zeroizing::new(format!("{PRIVATE}\n"))),
        _ if file.rsplit('.').next() == Some("psk") => Ok(Zeroizing::new(format!("{PRESHARED}\n"))),
        _ => Err(KeyFileError::Missing(file.into())),
    }
}

fn problems(text: &str) -> Vec<String> {
    let problems = parse(text, "f", &keys).expect_err("unsound");
    problems.to_string().lines().map(str::to_owned).collect()
}

/// The problems of `FULL` with `from` replaced by `to`.
fn replaced(from: &str, to: &str) -> Vec<String> {
    assert_eq!(FULL.matches(from).count(), 1, "{from}");
    problems(&FULL.replace(from, to))
}

/// Like `replaced`, if there is exactly one problem.
fn refused(from: &str, to: &str) -> String {
    let mut problems = replaced(from, to);
    assert_eq!(problems.len(), 1, "{from} -> {to}: {problems:#?}");
    problems.remove(0)
}

#[test]
fn every_key_is_read() {
    let config = parse(FULL, "f", &keys).expect("sound");
    assert_eq!(config.site.name, "site-a");
    assert_eq!(*config.site.private_key.to_base64(), PRIVATE);
    assert_eq!(config.site.addresses.len(), 2);
    let bond = config.bond.expect("a bond");
    assert_eq!((bond.name.as_str(), bond.members.len(), bond.mode), ("bond0", 2, BondMode::Lacp));
    assert_eq!((bond.xmit_hash_policy, bond.lacp_rate, bond.miimon_ms), (XmitHashPolicy::Layer34, LacpRate::Fast, 100));
    assert_eq!(bond.addresses, ["10.2.3.4/24".parse().unwrap()]);
    let steering = config.steering;
    assert_eq!((steering.device.as_str(), steering.policy), ("ecmp0", Policy::Adaptive));
    assert_eq!((steering.backend, steering.mtu), (BackendChoice::Auto, 1420));
    assert_eq!((steering.seed, steering.flowlet_gap_us, steering.spray_elephants), (0x1f2e_3d4c, None, false));
    let peer = &config.peers[0];
    assert_eq!(*peer.preshared_key.as_ref().unwrap().to_base64(), PRESHARED);
    assert_eq!(peer.remote_bond, Some(RemoteBond { members: 2, xmit_hash_policy: XmitHashPolicy::Layer34 }));
    assert_eq!((peer.prefixes.len(), peer.tunnels.len()), (2, 2));
    let tunnel = &peer.tunnels[1];
    assert_eq!((tunnel.name.as_str(), tunnel.listen_port, tunnel.remote_port), ("wg1", 51821, 51823));
    assert_eq!((tunnel.address, tunnel.weight), ("169.254.77.2/31".parse().unwrap(), Some(1)));
    let rule = &config.rules[0];
    assert_eq!((rule.proto, rule.policy), (Some(6), Some(Policy::Spray)));
    assert_eq!(rule.dst_ports, [(873, 873), (8000, 8999)]);
    assert_eq!(rule.tunnels, [InterfaceName::new("wg0").unwrap()]);
    assert_eq!(config.health, Health { interval_ms: 100, down_after: 3, up_after: 5 });
    assert_eq!(config.metrics.unwrap().listen, "127.0.0.1:9586".parse().unwrap());
}

#[test]
fn what_may_be_left_out_has_its_default() {
    let full = parse(FULL, "f", &keys).unwrap();
    let keep = |line: &&str| {
        let optional = ["mode", "xmit_hash", "lacp", "miimon", "device", "policy", "backend", "mtu", "flowlet"];
        !optional.iter().any(|key| line.starts_with(key)) && !line.starts_with("weight") && !line.contains("_after")
    };
    let short: Vec<&str> = FULL.lines().filter(keep).collect();
    assert_eq!(short.len(), FULL.lines().count() - 13);
    let mut short = parse(&short.join("\n"), "f", &keys).unwrap();
    short.rules[0].policy = Some(Policy::Spray);
    assert_eq!(short, full);
    let no_seed = parse(&FULL.replace("seed = 0x1f2e3d4c\n", ""), "f", &keys).unwrap();
    let public = full.site.private_key.public_key();
    assert_eq!(no_seed.steering.seed.to_le_bytes(), public.as_bytes()[..8]);
}

proptest! {
    #[test]
    fn parse_survives_any_mutation(
        edits in prop::collection::vec((0usize..FULL.len(), any::<prop::sample::Index>(), 0u8..4), 1..12),
    ) {
        let mut text: Vec<char> = FULL.chars().collect();
        for (at, with, kind) in edits {
            let at = at % text.len();
            match kind {
                0 => { text.remove(at); }
                1 => { let piece: Vec<char> = FULL.chars().skip(with.index(FULL.len() - 20)).take(20).collect(); text.splice(at..at, piece); }
                2 => text[at] = *with.get(&['"', '[', ']', '{', '}', '=', '.', '0', '-', '\n', '/', ',', 'é', '#', '\0', '9']),
                _ => { let end = (at + with.index(40)).min(text.len()); text.drain(at..end); }
            }
            if text.is_empty() { break; }
        }
        let text: String = text.into_iter().collect();
        if let Err(problems) = parse(&text, "f", &keys) {
            prop_assert!(!problems.list.is_empty());
            let last = text.lines().count() + 1;
            for problem in &problems.list {
                prop_assert!(problem.line.is_none_or(|line| (1..=last).contains(&line)));
                prop_assert!(!problem.message.contains('\n'), "{:?}", problem.message);
            }
        }
    }

    #[test]
    fn parse_survives_any_text(text in "\\PC*|[\\[\\]\"={}a-z0-9.,\\n _#-]{0,300}") {
        prop_assert!(parse(&text, "f", &keys).is_err());
    }
}
