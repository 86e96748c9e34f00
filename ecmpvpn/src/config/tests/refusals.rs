//! The exact message for each invalid text.

use super::*;

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    for (from, to, expected) in [
        (
            "listen_port = 51821",
            "lisen_port = 51821",
            r#"f:39: unknown key "lisen_port" in [[peer.tunnel]]: did you mean "listen_port"?"#,
        ),
        ("mtu = 1420", "mut = 1420", r#"f:19: unknown key "mut" in [steering]: did you mean "mtu"?"#),
        ("[metrics]", "[metric]", r#"f:54: unknown key "metric": did you mean "metrics"?"#),
        ("[site]", "[sites]", r#"f:1: unknown key "sites": did you mean "site"?"#),
        ("{ members = 2", "{ member = 2", r#"f:29: unknown key "member" in remote_bond: did you mean "members"?"#),
        (
            "up_after = 5",
            "colour = 5",
            r#"f:52: unknown key "colour" in [health]: known here are interval_ms, down_after, up_after"#,
        ),
    ] {
        assert_eq!(refused(from, to), expected);
    }
}

#[test]
fn a_value_out_of_range_is_refused_with_the_range() {
    for (from, to, expected) in [
        ("mtu = 1420", "mtu = 1279", "f:19: mtu in [steering] is 1279, out of range: give 1280 to 9000"),
        ("mtu = 1420", "mtu = 9001", "f:19: mtu in [steering] is 9001, out of range: give 1280 to 9000"),
        ("mtu = 1420", "mtu = -5", "f:19: mtu in [steering] is -5, out of range: give 1280 to 9000"),
        ("mtu = 1420", "mtu = \"1420\"", "f:19: mtu in [steering] must be a whole number, not a string"),
        ("mtu = 1420", "mtu = 1420.0", "f:19: mtu in [steering] must be a whole number, not a fraction"),
        (
            "seed = 0x1f2e3d4c",
            "seed = 0x1_0000_0000_0000_0000",
            "f:20: seed in [steering] is 0x10000000000000000, out of range: give 0 to 18446744073709551615",
        ),
        ("weight = 1", "weight = 0", "f:36: weight in [[peer.tunnel]] is 0, out of range: give 1 to 1000"),
        ("{ members = 2", "{ members = 0", "f:29: members in remote_bond is 0, out of range: give 1 to 32"),
        (
            "policy = \"adaptive\"",
            "policy = \"fast\"",
            r#"f:17: policy in [steering] is "fast": give one of "hash", "flowlet", "adaptive", "spray""#,
        ),
        (
            "mode = \"802.3ad\"",
            "mode = \"balance-xor\"",
            r#"f:11: lacp_rate in [bond] is for mode "802.3ad" only: remove it"#,
        ),
        (
            "flowlet_gap_us = \"auto\"",
            "flowlet_gap_us = \"soon\"",
            r#"f:21: flowlet_gap_us in [steering] is neither "auto" nor a number of microseconds: give one of the two"#,
        ),
        (
            "spray_elephants = false",
            "spray_elephants = \"no\"",
            "f:22: spray_elephants in [steering] is neither true nor false, without quotes: give one of the two",
        ),
        (
            "listen = \"127.0.0.1:9586\"",
            "listen = \"localhost\"",
            r#"f:55: listen in [metrics] is "localhost": give an address and port such as "127.0.0.1:9586""#,
        ),
        ("[[rule]]\n", "[[rule]]\ndscp = 64\n", "f:44: dscp in [[rule]] is 64, out of range: give 0 to 63"),
        (
            "\"8000-8999\"",
            "\"8999-8000\"",
            r#"f:45: dst_ports in [[rule]] has "8999-8000": give a port such as 873 or a range such as "8000-8999""#,
        ),
        (
            "proto = \"tcp\"",
            "proto = \"gre\"",
            r#"f:45: dst_ports in [[rule]] needs a protocol that has ports: add a line such as `proto = "tcp"`"#,
        ),
        ("\"wg0\"]", "\"wg7\"]", "f:47: tunnels in [[rule]] names wg7, which is no tunnel: tunnels are wg0, wg1"),
        ("[[peer]]", "[peer]", "f:23: peer must be written as [[peer]]"),
    ] {
        assert_eq!(refused(from, to), expected);
    }
}

#[test]
fn ports_are_unique_and_not_reserved() {
    for (from, to, expected) in [
        (
            "listen_port = 51821",
            "listen_port = 51820",
            "f:39: listen_port in [[peer.tunnel]] is 51820, taken already by line 33: give every tunnel a port of its own",
        ),
        (
            "listen_port = 51821",
            "listen_port = 443",
            "f:39: listen_port in [[peer.tunnel]] is 443, a port reserved for system services: give 1024 to 65535",
        ),
        (
            "listen_port = 51821",
            "listen_port = 0",
            "f:39: listen_port in [[peer.tunnel]] is 0, which lets the kernel pick one that the far end cannot know: give 1024 to 65535",
        ),
        (
            "listen_port = 51821",
            "listen_port = 65536",
            "f:39: listen_port in [[peer.tunnel]] is 65536, out of range: give 0 to 65535",
        ),
        (
            "remote_port = 51823",
            "remote_port = 51822",
            "f:40: remote_port in [[peer.tunnel]] is 10.5.6.7:51822, taken already by line 34: give every tunnel to one endpoint a remote_port of its own",
        ),
    ] {
        assert_eq!(refused(from, to), expected);
    }
}

#[test]
fn interface_names_fit_and_are_unique() {
    for (from, to, expected) in [
        (
            "name = \"wg1\"",
            "name = \"wireguard-tunnel1\"",
            r#"f:38: name in [[peer.tunnel]] is "wireguard-tunnel1", which is longer than 15 bytes: give 1 to 15 letters, digits or dashes"#,
        ),
        (
            "\"eno2\"]",
            "\"en/2\"]",
            r#"f:8: members in [bond] is "en/2", which has a character that an interface name cannot have: give 1 to 15 letters, digits or dashes"#,
        ),
        (
            "device = \"ecmp0\"",
            "device = \"wg%d\"",
            r#"f:16: device in [steering] is "wg%d", which has a character that an interface name cannot have: give 1 to 15 letters, digits or dashes"#,
        ),
        (
            "device = \"ecmp0\"",
            "device = 'wg\"0'",
            r#"f:16: device in [steering] is "wg\"0", which has a quotation mark or a backslash, which ecmpvpn does not support: give 1 to 15 letters, digits or dashes"#,
        ),
        (
            "device = \"ecmp0\"",
            "device = \"all\"",
            r#"f:16: device in [steering] is "all", which the kernel keeps for itself: give another name"#,
        ),
        (
            "\"eno2\"]",
            "\"eno1\"]",
            "f:8: members in [bond] has eno1, taken already by line 8: give every interface a name of its own",
        ),
        (
            "device = \"ecmp0\"",
            "device = \"wg0\"",
            "f:32: name in [[peer.tunnel]] is wg0, taken already by device in [steering] on line 16: give every interface a name of its own",
        ),
        (
            "device = \"ecmp0\"",
            "device = \"bond0\"",
            "f:16: device in [steering] is bond0, taken already by name in [bond] on line 7: give every interface a name of its own",
        ),
        (
            "name = \"site-b\"",
            "name = \"site-a\"",
            "f:24: name in [[peer]] is site-a, taken already by name in [site] on line 2: give every site a name of its own",
        ),
        (
            "name = \"site-b\"",
            "name = \"../b\"",
            r#"f:24: name in [[peer]] is "../b": give 1 to 32 letters, digits, dots, dashes or underscores, no dot first"#,
        ),
    ] {
        assert_eq!(refused(from, to), expected);
    }
    let default = FULL.replace("device = \"ecmp0\"\n", "").replace("name = \"wg1\"", "name = \"ecmp0\"");
    assert!(
        problems(&default)[0]
            .starts_with("f:37: name in [[peer.tunnel]] is ecmp0, taken already by device in [steering] by default: ")
    );
}

#[test]
fn addresses_that_would_loop_or_clash_are_refused() {
    let steered = "the tunnels' own packets would be steered into the tunnels, so leave that address out";
    for (from, to, expected) in [
        (
            "10.20.0.0/16",
            "10.5.0.0/16",
            format!("f:30: prefixes in [[peer]] has 10.5.0.0/16, which contains 10.5.6.7, remote_endpoint in [[peer]] on line 28: {steered}"),
        ),
        (
            "10.20.0.0/16",
            "10.2.0.0/16",
            format!("f:30: prefixes in [[peer]] has 10.2.0.0/16, which contains 10.2.3.4, local_endpoint in [[peer]] on line 27: {steered}"),
        ),
        (
            "\"10.100.0.1/32\"",
            "\"10.5.6.1/24\"",
            format!("f:4: addresses in [site] has 10.5.6.1/24, which contains 10.5.6.7, remote_endpoint in [[peer]] on line 28: {steered}"),
        ),
        (
            "local_endpoint = \"10.2.3.4\"",
            "local_endpoint = \"10.2.4.4\"\n# moved",
            String::new(),
        ),
        (
            "10.20.0.0/16",
            "10.20.0.1/16",
            r#"f:30: prefixes in [[peer]] has 10.20.0.1/16, with bits set behind the prefix: write "10.20.0.0/16""#.into(),
        ),
        (
            "10.20.0.0/16",
            "10.20.0.7",
            r#"f:30: prefixes in [[peer]] has "10.20.0.7", which has no prefix length: write "10.20.0.7/32""#.into(),
        ),
        (
            "\"10.20.0.0/16\"",
            "\"fd00:20::/48\"",
            "f:30: prefixes in [[peer]] has fd00:20::/48, taken already by line 30: a prefix can lead to one peer only".into(),
        ),
        (
            "10.20.0.0/16",
            "10.100.0.1/32",
            "f:30: prefixes in [[peer]] has 10.100.0.1/32, as addresses in [site] on line 4: give every site addresses of its own".into(),
        ),
        (
            "10.20.0.0/16",
            "fe80::/64",
            "f:30: prefixes in [[peer]] has fe80::/64, which never leaves its own link: take it out".into(),
        ),
        (
            "169.254.77.2/31",
            "169.254.77.1/31",
            "f:41: address in [[peer.tunnel]] is 169.254.77.1/31, the same net as on line 35: give every tunnel a /31 of its own".into(),
        ),
        (
            "169.254.77.2/31",
            "169.254.77.2/24",
            r#"f:41: address in [[peer.tunnel]] is 169.254.77.2/24, a net of other than two hosts: give an address of a /31 such as "169.254.77.0/31""#.into(),
        ),
        (
            "169.254.77.2/31",
            "10.20.0.2/31",
            "f:41: address in [[peer.tunnel]] is 10.20.0.2/31, which overlaps 10.20.0.0/16, prefixes in [[peer]] on line 30: give the tunnel a /31 that nothing else uses".into(),
        ),
        (
            "169.254.77.2/31",
            "10.5.6.6/31",
            "f:41: address in [[peer.tunnel]] is 10.5.6.6/31, which contains 10.5.6.7, remote_endpoint in [[peer]] on line 28: give the tunnel a /31 that nothing else uses".into(),
        ),
        (
            "remote_endpoint = \"10.5.6.7\"",
            "remote_endpoint = \"fd00::7\"",
            "f:28: remote_endpoint in [[peer]] is fd00::7, of another family than local_endpoint 10.2.3.4: both must be IPv4, or both IPv6".into(),
        ),
        (
            "remote_endpoint = \"10.5.6.7\"",
            "remote_endpoint = \"10.2.3.4\"",
            "f:28: remote_endpoint in [[peer]] is 10.2.3.4, as is local_endpoint: give the remote site's address".into(),
        ),
        (
            "remote_endpoint = \"10.5.6.7\"",
            "remote_endpoint = \"vpn.example:51820\"",
            r#"f:28: remote_endpoint in [[peer]] is "vpn.example:51820": give an address such as "10.2.3.4", or a host name, without a port"#.into(),
        ),
        (
            "remote_endpoint = \"10.5.6.7\"",
            "remote_endpoint = \"0.0.0.0\"",
            "f:28: remote_endpoint in [[peer]] is 0.0.0.0, which stands for any address: give the gateway's own unicast address".into(),
        ),
        (
            "\"10.2.3.4/24\"",
            "\"10.2.3.0/24\"",
            "f:13: addresses in [bond] has 10.2.3.0/24, which no host can have: give the address of this host in that net".into(),
        ),
    ] {
        if expected.is_empty() {
            parse(&FULL.replace(from, to), "f", &keys).expect("an endpoint need not be the bond's");
        } else {
            assert_eq!(refused(from, to), expected);
        }
    }
}

#[test]
fn keys_are_checked_and_never_shown() {
    let own: PrivateKey = PRIVATE.parse().unwrap();
    for (from, to, expected) in [
        (
            "6Z2XTSd8hhpAyPLYQwmdiL2gHb7ItOyAlNPlbLRmUX0=",
            "nonsense",
            "f:25: public_key in [[peer]] is not a WireGuard key: a key is 44 characters of base64, as `wg genkey` prints".to_owned(),
        ),
        (
            "6Z2XTSd8hhpAyPLYQwmdiL2gHb7ItOyAlNPlbLRmUX0=",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            "f:25: public_key in [[peer]] is all zeros: give the remote site's key".to_owned(),
        ),
        (
            "6Z2XTSd8hhpAyPLYQwmdiL2gHb7ItOyAlNPlbLRmUX0=",
            &own.public_key().to_string(),
            format!("f:25: public_key in [[peer]] is {}, which is this site's own key: give the remote site's, which `ecmpvpn init` prints", own.public_key()),
        ),
        (
            "\"site-a.key\"",
            "\"junk.key\"",
            "f:3: private_key_file in [site] names junk.key, whose content is not a WireGuard key: a key is 44 characters of base64, as `wg genkey` prints".to_owned(),
        ),
        (
            "\"site-a.key\"",
            "\"gone.key\"",
            "f:3: private_key_file in [site] names gone.key, which does not exist: write it with `ecmpvpn init` or `wg genkey`, mode 0600".to_owned(),
        ),
        (
            "\"site-a.key\"",
            &format!("{PRIVATE:?}"),
            "f:3: private_key_file in [site] holds a key itself: write the key to a file of mode 0600 and name that file".to_owned(),
        ),
    ] {
        let problem = refused(from, to);
        assert_eq!(problem, expected);
        assert!(!problem.contains(PRIVATE));
    }
    let debug = format!("{:?}", parse(FULL, "f", &keys).unwrap());
    assert!(!debug.contains(PRIVATE) && !debug.contains(PRESHARED));
}

#[test]
fn all_problems_are_reported_at_once_in_the_order_of_their_lines() {
    let text = FULL.replace("mtu = 1420", "mtu = 1").replace("weight = 1", "wieght = 1").replace("51821", "51820");
    let lines: Vec<usize> = parse(&text, "f", &keys).unwrap_err().list.iter().filter_map(|p| p.line).collect();
    assert_eq!(lines, [19, 36, 39]);
}

#[test]
fn what_is_no_configuration_is_said_plainly() {
    assert_eq!(problems(""), ["f: is empty: write a configuration with `ecmpvpn init`"]);
    assert_eq!(problems(" \n\t\n"), ["f: is empty: write a configuration with `ecmpvpn init`"]);
    assert_eq!(
        problems("a\n\u{7f}ELF"),
        ["f:2: there is a control character here, so this is not TOML: name a text file"]
    );
    assert_eq!(
        problems("[steering]\n"),
        [
            "f: there is no [site]: add one with name and private_key_file, or run `ecmpvpn init`",
            "f: there is no [[peer]]: add one for each remote site, or run `ecmpvpn init`",
        ]
    );
    assert_eq!(replaced("mtu = 1420", "mtu 1420"), ["f:19: not TOML: key with no value, expected `=`"]);
    assert_eq!(replaced("mtu = 1420", "mtu = 1420\nmtu = 1420"), ["f:20: not TOML: duplicate key"]);
}

#[test]
fn numbers_of_things_are_bounded() {
    let tunnel = |i: usize| {
        format!(
            "[[peer.tunnel]]\nname = \"t{i}\"\nlisten_port = {}\nremote_port = {}\naddress = \"169.254.78.{}/31\"\n",
            2000 + i,
            2000 + i,
            2 * i
        )
    };
    let with = |count: usize| {
        let tunnels: String = (0..count).map(tunnel).collect();
        FULL.replace("[[rule]]\n", &format!("{tunnels}[[rule]]\n"))
    };
    assert_eq!(parse(&with(30), "f", &keys).unwrap().peers[0].tunnels.len(), MAX_TUNNELS_PER_PEER);
    assert_eq!(problems(&with(31)), ["f:31: there are 33 [[peer.tunnel]]: at most 32 are possible"]);
    let rules = FULL.to_owned() + &"[[rule]]\npolicy = \"hash\"\n".repeat(MAX_RULES);
    assert_eq!(problems(&rules), ["f:43: there are 65 [[rule]]: at most 64 are possible"]);
}
