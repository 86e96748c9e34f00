//! Remote endpoints given by host name.

use super::*;

fn named(name: &str) -> Result<Config, Problems> {
    let text = FULL.replacen("remote_endpoint = \"10.5.6.7\"", &format!("remote_endpoint = \"{name}\""), 1);
    parse(&text, "f", &keys)
}

#[test]
fn a_name_is_taken_and_its_address_is_left_open() {
    for name in ["vpn.example.org", "site-b", "b.example.", "a1", "xn--bcher-kva.example", "3com.example"] {
        let peer = &named(name).unwrap().peers[0];
        assert_eq!(peer.remote_name.as_deref(), Some(name));
        assert_eq!(peer.remote_endpoint.to_string(), "0.0.0.0");
    }
    let text = render(&named("vpn.example.org").unwrap());
    assert!(text.contains("remote_endpoint = \"vpn.example.org\""), "{text}");
    assert_eq!(parse(FULL, "f", &keys).unwrap().peers[0].remote_name, None);
}

#[test]
fn what_is_neither_a_name_nor_an_address_is_refused() {
    for wrong in ["", "vpn example", "-a.example", "a..b", "10.5.6", "1.2.3.4.5", "b.example:51820", "[fd00::1]", "b/c"]
    {
        let message = named(wrong).unwrap_err().to_string();
        assert!(message.contains("or a host name, without a port"), "{wrong}: {message}");
    }
    assert!(named("127.0.0.1").unwrap_err().to_string().contains("never leaves the host"));
    assert!(named(&"a".repeat(64)).is_err() && named(&"abc.".repeat(64)).is_err());
}

#[test]
fn an_address_that_a_name_leads_to_is_checked_like_one_that_is_written() {
    let mut config = named("vpn.example.org").unwrap();
    for (address, why) in [
        ("10.20.0.9", "lies in 10.20.0.0/16"),
        ("10.2.3.4", "own endpoint"),
        ("fd01::1", "another family"),
        ("169.254.77.1", "the net of wg0"),
        ("10.100.0.1", "10.100.0.1/32"),
        ("224.0.0.1", "is multicast"),
    ] {
        let message = config.set_remote(0, address.parse().unwrap()).unwrap_err();
        assert!(message.contains(why), "{address}: {message}");
        assert!(config.peers[0].remote_endpoint.is_unspecified());
    }
    config.set_remote(0, "10.5.6.8".parse().unwrap()).unwrap();
    assert_eq!(config.peers[0].remote_endpoint.to_string(), "10.5.6.8");
    config.peers[0].tunnels[1].remote_port = config.peers[0].tunnels[0].remote_port;
    assert!(config.set_remote(0, "10.5.6.9".parse().unwrap()).unwrap_err().contains("remote_port of its own"));
}
