//! Parses arbitrary text as a wg-quick file. The parser must refuse it without showing a key, or must read the same
//! again from what is written out of the result.

#![no_main]

use std::fmt::{Display, Write as _};

use ecmpvpn::config::wg_quick::{Endpoint, Host, Table, WgQuick, parse};
use ecmpvpn_fuzz::{assert_hides_keys, assert_sound};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let found = match parse(text, "wg0.conf") {
        Ok(found) => found,
        Err(problems) => {
            assert_sound(&problems, text);
            return assert_hides_keys(&problems.to_string(), text);
        }
    };
    let last = text.lines().count();
    assert!(found.interface.unused.iter().all(|(_, line)| (1..=last).contains(line)));
    let written = written(&found);
    let again = parse(&written, "wg0.conf").unwrap_or_else(|problems| panic!("{problems}\n{written}"));
    assert_same(&found, &again);
});

fn written(file: &WgQuick) -> String {
    let interface = &file.interface;
    let mut text = "[Interface]\n".to_owned();
    key(&mut text, "PrivateKey", interface.private_key.as_ref().map(|key| key.to_base64().to_string()));
    key(&mut text, "ListenPort", interface.listen_port);
    key(&mut text, "FwMark", interface.fwmark);
    key(&mut text, "MTU", interface.mtu);
    let table = match &interface.table {
        Table::Auto => "auto",
        Table::Off => "off",
        Table::Named(name) => name,
    };
    key(&mut text, "Table", Some(table));
    interface.addresses.iter().for_each(|net| key(&mut text, "Address", Some(net)));
    for peer in &file.peers {
        text.push_str("[Peer]\n");
        key(&mut text, "PublicKey", Some(peer.public_key));
        key(&mut text, "PresharedKey", peer.preshared_key.as_ref().map(|key| key.to_base64().to_string()));
        key(&mut text, "Endpoint", peer.endpoint.as_ref().map(endpoint));
        key(&mut text, "PersistentKeepalive", peer.persistent_keepalive);
        peer.allowed_ips.iter().for_each(|net| key(&mut text, "AllowedIPs", Some(net)));
    }
    text
}

fn key(text: &mut String, name: &str, value: Option<impl Display>) {
    if let Some(value) = value {
        writeln!(text, "{name} = {value}").unwrap();
    }
}

fn endpoint(Endpoint { host, port }: &Endpoint) -> String {
    match host {
        Host::Address(address) => std::net::SocketAddr::new(*address, *port).to_string(),
        Host::Name(name) => format!("{name}:{port}"),
    }
}

fn assert_same(before: &WgQuick, after: &WgQuick) {
    let (a, b) = (&before.interface, &after.interface);
    assert!(a.private_key == b.private_key, "another private key");
    assert_eq!((a.listen_port, a.fwmark, a.mtu), (b.listen_port, b.fwmark, b.mtu));
    assert_eq!((&a.table, &a.addresses), (&b.table, &b.addresses));
    assert_eq!(before.peers.len(), after.peers.len());
    for (a, b) in before.peers.iter().zip(&after.peers) {
        assert!(a.public_key == b.public_key && a.preshared_key == b.preshared_key, "other keys");
        assert_eq!((&a.endpoint, a.persistent_keepalive), (&b.endpoint, b.persistent_keepalive));
        assert_eq!(a.allowed_ips, b.allowed_ips);
        assert!(a.allowed_ips.iter().all(|net| net.trunc() == *net), "{:?}", a.allowed_ips);
    }
}
