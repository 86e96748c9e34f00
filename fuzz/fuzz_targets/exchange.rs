//! Parses arbitrary text as the file that carries new keys. The parser must refuse it without showing a key, or must
//! read the same again from what is written out of the result.

#![no_main]

use ecmpvpn::config::is_site_name;
use ecmpvpn::control::rotate::exchange::Exchange;
use ecmpvpn_fuzz::assert_hides_keys;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let exchange = match Exchange::parse(text) {
        Ok(exchange) => exchange,
        Err(message) => return assert_hides_keys(&message, text),
    };
    assert!(exchange.rotation.id != 0 && !exchange.tunnel.is_empty());
    // Only sites write such files, and their names need no escapes.
    if !is_site_name(&exchange.rotation.from) || !is_site_name(&exchange.rotation.to) {
        return;
    }
    let again = Exchange::parse(&exchange.text()).expect("what is written is read back");
    let (before, after) = (&exchange.rotation, &again.rotation);
    assert_eq!((before.id, &before.from, &before.to), (after.id, &after.from, &after.to));
    assert_eq!(exchange.tunnel.len(), again.tunnel.len());
    for (before, after) in exchange.tunnel.iter().zip(&again.tunnel) {
        assert_eq!((before.listen_port, before.remote_port), (after.listen_port, after.remote_port));
        assert!(before.public_key == after.public_key && before.preshared_key == after.preshared_key);
    }
});
