//! Keys for single tunnels.

use super::*;
use crate::config::{Edit, TunnelKeys};

/// `FULL` with lines added to its first tunnel.
fn with(lines: &str) -> String {
    FULL.replacen("weight = 1\n", &format!("weight = 1\n{lines}\n"), 1)
}

#[test]
fn a_tunnels_own_keys_are_read_and_the_others_have_none() {
    let far = PrivateKey::generate().public_key();
    let text =
        with(&format!("private_key_file = \"wg0.key\"\npublic_key = \"{far}\"\npreshared_key_file = \"wg0.psk\""));
    let tunnels = &parse(&text, "f", &keys).unwrap().peers[0].tunnels;
    assert_eq!(tunnels[0].private_key, Some(PRIVATE.parse().unwrap()));
    assert_eq!(tunnels[0].public_key, Some(far));
    assert_eq!(tunnels[0].preshared_key, Some(PRESHARED.parse().unwrap()));
    assert!(tunnels[1].private_key.is_none() && tunnels[1].public_key.is_none() && tunnels[1].preshared_key.is_none());
}

#[test]
fn a_key_of_this_site_is_not_the_far_ends() {
    let own = PRIVATE.parse::<PrivateKey>().unwrap().public_key();
    let refused = parse(&with(&format!("public_key = \"{own}\"")), "f", &keys).unwrap_err().to_string();
    assert!(refused.contains("public_key in [[peer.tunnel]]") && refused.contains("this site's own key"), "{refused}");
    let text = with(&format!("private_key_file = \"wg0.key\"\npublic_key = \"{own}\""));
    let refused = parse(&text, "f", &keys).unwrap_err().to_string();
    assert!(refused.contains("is that of private_key_file here"), "{refused}");
    let refused = parse(&with("private_key_file = \"absent\""), "f", &keys).unwrap_err().to_string();
    assert!(refused.contains("private_key_file in [[peer.tunnel]] names absent"), "{refused}");
}

#[test]
fn keys_are_set_where_the_tunnel_stands_and_what_is_not_given_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ecmpvpn.toml");
    std::fs::write(&path, FULL).unwrap();
    let mut edit = Edit::new(&path, FULL, &parse(FULL, "f", &keys).unwrap()).unwrap();
    let far = PrivateKey::generate().public_key();
    let first = TunnelKeys { private_key_file: Some("old.key"), ..TunnelKeys::default() };
    assert_eq!(edit.set_keys("wg1", &first).unwrap(), Vec::<String>::new());
    let second = TunnelKeys { private_key_file: Some("wg1.key"), ..TunnelKeys::default() };
    assert_eq!(edit.set_keys("wg1", &second).unwrap(), ["old.key"]);
    edit.set_keys("wg1", &TunnelKeys { public_key: Some(far), ..TunnelKeys::default() }).unwrap();
    assert!(edit.set_keys("wg9", &TunnelKeys::default()).is_err());
    edit.save().unwrap();
    let added = format!("169.254.77.2/31\"\nprivate_key_file = \"wg1.key\"\npublic_key = \"{far}\"\n");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), FULL.replace("169.254.77.2/31\"\n", &added));
}
