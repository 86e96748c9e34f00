//! The configuration of one site: TOML text in, a validated [`Config`] out.
//!
//! A `Config` in hand is sound: names fit, keys parse, ports and addresses are unique, no endpoint lies inside a
//! steered prefix. Nothing here looks at the kernel; files are read only by [`load`].

mod keys;
mod types;

pub use keys::{KeyError, PresharedKey, PrivateKey, PublicKey};
pub use types::*;
