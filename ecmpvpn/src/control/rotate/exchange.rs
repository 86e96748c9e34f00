//! The file that brings new keys to the other site: this site's new public keys, and the new pre-shared keys. Pure.

use std::fmt::Write as _;

use serde::{Deserialize, Deserializer, Serialize, de};
use zeroize::Zeroizing;

use crate::config::{PresharedKey, PublicKey, may_hold_key};

/// The content of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    pub rotation: Head,
    pub tunnel: Vec<NewKeys>,
}

/// `[rotation]`
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Identifies the renewal at both sites; not 0.
    pub id: u32,
    /// The site whose private keys are new.
    pub from: String,
    /// The site that must apply the file.
    pub to: String,
}

/// `[[tunnel]]`, from the view of the site that wrote the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewKeys {
    /// UDP port of the site that wrote the file.
    pub listen_port: u16,
    /// UDP port of the site that reads it.
    pub remote_port: u16,
    /// The writing site's new public key.
    #[serde(deserialize_with = "public_key")]
    pub public_key: PublicKey,
    /// The new key that both sites share.
    #[serde(deserialize_with = "preshared_key")]
    pub preshared_key: PresharedKey,
}

fn public_key<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PublicKey, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
}

fn preshared_key<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PresharedKey, D::Error> {
    Zeroizing::new(String::deserialize(deserializer)?).parse().map_err(de::Error::custom)
}

impl Exchange {
    pub fn text(&self) -> Zeroizing<String> {
        let Head { id, from, to } = &self.rotation;
        // Reserve all memory at once: a string that grows leaves copies of the keys behind.
        let mut text = Zeroizing::new(String::with_capacity(1024 + 256 * self.tunnel.len()));
        let head = format!(
            "# New keys of {from} for its tunnels to {to}. SECRET: it holds pre-shared keys.\n\
             # Copy it over a channel that nobody else can read, such as `scp -p` through the VPN. Then, at {to}:\n\
             #   sudo ecmpvpn rotate --apply FILE\n\
             # then, at {from}: sudo ecmpvpn rotate\n\
             # Remove it at both sites afterwards; it is not needed again.\n\n\
             [rotation]\nid = {id}\nfrom = \"{from}\"\nto = \"{to}\"\n"
        );
        text.push_str(&head);
        for keys in &self.tunnel {
            let _ = writeln!(
                text,
                "\n[[tunnel]]\nlisten_port = {}\nremote_port = {}\npublic_key = \"{}\"",
                keys.listen_port, keys.remote_port, keys.public_key
            );
            let _ = writeln!(text, "preshared_key = \"{}\"", keys.preshared_key.to_base64().as_str());
        }
        text
    }

    /// Parses `text`.
    ///
    /// # Errors
    /// What is wrong, with the line. Never quotes a key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
            // The parser's own message may quote the input.
            let message = if may_hold_key(error.message()) { "it cannot be parsed" } else { error.message() };
            format!("line {line}: {message}")
        })?;
        if parsed.rotation.id == 0 || parsed.tunnel.is_empty() {
            return Err("it names no tunnel, or has no id".to_owned());
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PrivateKey;

    fn exchange() -> Exchange {
        let keys = |port: u16| NewKeys {
            listen_port: port,
            remote_port: port + 100,
            public_key: PrivateKey::generate().public_key(),
            preshared_key: PresharedKey::generate(),
        };
        let rotation = Head { id: 0xdead_beef, from: "site-a".into(), to: "site-b".into() };
        Exchange { rotation, tunnel: vec![keys(51820), keys(51821)] }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let sent = exchange();
        let read = Exchange::parse(&sent.text()).unwrap();
        assert_eq!((read.rotation.id, read.rotation.from.as_str()), (0xdead_beef, "site-a"));
        for (sent, read) in sent.tunnel.iter().zip(&read.tunnel) {
            assert_eq!((sent.listen_port, sent.remote_port), (read.listen_port, read.remote_port));
            assert!(sent.public_key == read.public_key && sent.preshared_key == read.preshared_key);
        }
    }

    #[test]
    fn an_error_never_shows_a_key() {
        let sent = exchange();
        let text = sent.text();
        let secret = sent.tunnel[0].preshared_key.to_base64();
        let short = secret[..40].to_owned();
        for (broken, line) in [
            (text.replace(secret.as_str(), &short), "line 16"),
            (text.replace("[rotation]", "[rotating]"), "line"),
            (text.replace("public_key = \"", "public_key = \"x"), "line 15"),
            (text.replace("id = 3735928559", "id = 0"), "no id"),
            ("junk".to_owned(), "line 1"),
            (text.replace("id = 3735928559", &format!("id = \"{}\"", secret.as_str())), "line 8"),
            (text.replace("id = 3735928559", &format!("\"{}\" = 1", secret.as_str())), "line"),
            (String::new(), "rotation"),
        ] {
            let message = Exchange::parse(&broken).unwrap_err();
            assert!(message.contains(line), "{message}");
            assert!(!message.contains(&short), "{message}");
        }
    }
}
