//! The configuration of one site: TOML text in, a validated [`Config`] out.
//!
//! A `Config` is always valid: names fit, keys parse, ports and addresses are unique, and no endpoint lies inside a
//! steered prefix. Nothing here looks at the kernel. Files are read only by [`load`] and [`read_secret`], and written
//! only by [`Edit`].

mod crosscheck;
mod edit;
mod key_file;
mod keys;
mod problems;
mod remote;
mod render;
mod rules;
mod schema;
mod section;
mod types;
mod values;
pub mod wg_quick;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use toml::de::DeTable;
use zeroize::Zeroizing;

pub use edit::{Edit, EditError, TunnelKeys};
pub use key_file::{KeyFileError, read_secret};
pub use keys::{KeyError, PresharedKey, PrivateKey, PublicKey, may_hold_key};
pub use problems::{ConfigError, Problem, Problems};
pub use render::{preshared_key_file, private_key_file, render, tunnel_key_file, tunnel_preshared_key_file};
pub use rules::{check_rule, has_ports, parse_ports, parse_protocol, port_range, protocol_name};
pub use types::*;
pub use values::{is_site_name, parse_prefix};

/// Maximum file size, bytes. Far above any valid configuration: all peers, tunnels and prefixes at their limits fit
/// many times.
const MAX_LEN: u64 = 16 << 20;
/// Syntax errors shown at once. Those after the first few are only consequences of these.
const MAX_SYNTAX_ERRORS: usize = 3;

/// Reads the configuration at `path`, and the key files that it names. Their paths are relative to the configuration's
/// folder.
///
/// # Errors
/// The file cannot be read, or it is not a valid configuration.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    load_with_text(path).map(|(config, _)| config)
}

/// Like [`load`]; also returns the text of the file.
pub fn load_with_text(path: &Path) -> Result<(Config, String), ConfigError> {
    let name = path.display().to_string();
    let (bytes, owner) = read(path)?;
    let whole = |line, message: &str| {
        ConfigError::Invalid(Problems { file: name.clone(), list: vec![Problem { line, message: message.to_owned() }] })
    };
    if bytes.len() as u64 > MAX_LEN {
        return Err(whole(None, "is too large for a configuration: name a TOML file"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = problems::line(&bytes[..error.valid_up_to()]);
        whole(Some(line), "there is a byte here that is not UTF-8 text: name a TOML file")
    })?;
    Ok((parse_beside(path, text, owner)?, text.to_owned()))
}

/// Parses `text` as if the file at `path` had it: the key files are beside that.
///
/// # Errors
/// As [`load`].
pub fn load_as(path: &Path, text: &str) -> Result<Config, ConfigError> {
    let (_, owner) = read(path)?;
    parse_beside(path, text, owner)
}

fn parse_beside(path: &Path, text: &str, owner: u32) -> Result<Config, ConfigError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let key = |key_file: &str| key_file::read(&folder.join(key_file), owner);
    parse(text, &path.display().to_string(), &key).map_err(ConfigError::Invalid)
}

/// Reads at most one byte more than [`MAX_LEN`]. Also returns the user id of the file's owner.
fn read(path: &Path) -> Result<(Vec<u8>, u32), ConfigError> {
    let unreadable = |source: io::Error| {
        let file = path.display().to_string();
        match source.kind() {
            io::ErrorKind::NotFound => ConfigError::Missing { file },
            _ => ConfigError::Unreadable { file, source },
        }
    };
    let file = File::open(path).map_err(unreadable)?;
    let owner = file.metadata().map_err(unreadable)?.uid();
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok((bytes, owner))
}

/// The `name` in `[site]` of the configuration at `path`, even if the rest of it is wrong and key files are missing.
/// `None`: there is no valid name to be found.
pub fn site_name(path: &Path) -> Option<String> {
    let (bytes, _) = read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let (document, _) = DeTable::parse_recoverable(&text);
    let site = document.get_ref().get("site").and_then(|site| site.get_ref().as_table());
    let name = site.and_then(|site| site.get("name")?.get_ref().as_str());
    // An error can hide what follows it from the parser.
    name.or_else(|| scanned_name(&text)).filter(|name| is_site_name(name)).map(str::to_owned)
}

/// Finds `name = "…"` below a line `[site]`, whatever stands around.
fn scanned_name(text: &str) -> Option<&str> {
    let is_header = |line: &&str| line.split('#').next().is_some_and(|line| line.trim() == "[site]");
    let after = text.lines().skip_while(|line| !is_header(line)).skip(1);
    let section = after.take_while(|line| !line.trim_start().starts_with('['));
    section.filter_map(|line| line.split_once('=')).find_map(|(key, value)| {
        let value = (key.trim() == "name").then(|| value.trim())?;
        value.strip_prefix('"')?.split('"').next()
    })
}

/// Parses a configuration. Messages call it `file`. `keys` returns the content of a key file, given the name in the
/// configuration.
///
/// # Errors
/// All problems of the text and of the key files.
pub fn parse(
    text: &str,
    file: &str,
    keys: &dyn Fn(&str) -> Result<Zeroizing<String>, KeyFileError>,
) -> Result<Config, Problems> {
    let collector = problems::Collector::new(text);
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut config = None;
    if let Some(at) = text.find(|c: char| c.is_ascii_control() && !"\t\r\n".contains(c)) {
        collector.add(at, "there is a control character here, so this is not TOML: name a text file");
    } else if text.trim().is_empty() {
        collector.add_to_file("is empty: write a configuration with `ecmpvpn init`");
    } else if errors.is_empty() {
        config = schema::config(document.get_ref(), keys, &collector);
    } else {
        // The sections are not read: what is missing from half a document means nothing.
        for error in errors.iter().take(MAX_SYNTAX_ERRORS) {
            collector.add(error.span().map_or(text.len(), |span| span.start), format!("not TOML: {}", error.message()));
        }
    }
    match (collector.finish(file), config) {
        (None, Some(config)) => Ok(config),
        (Some(problems), _) => Err(problems),
        (None, None) => unreachable!("a section is left out only where a problem is reported"),
    }
}
