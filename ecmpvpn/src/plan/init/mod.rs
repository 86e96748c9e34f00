//! What `init` makes: two sites that fit each other, or one site from its wg-quick files. Values in, values out.

pub mod from_wg_quick;
pub mod sites;

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use super::ports::PortError;
use crate::config::{InterfaceName, MAX_MEMBERS};

/// The options of `init`. If only one site is made, it is site A.
#[derive(Clone, Debug)]
pub struct Request {
    pub a_name: String,
    pub b_name: String,
    /// Address of site A's gateway towards site B.
    pub a_endpoint: IpAddr,
    /// Address of site B's gateway towards site A. `None`: from the files.
    pub b_endpoint: Option<IpAddr>,
    /// Nets behind site A.
    pub a_prefixes: Vec<IpNet>,
    /// Nets behind site B. Empty: from the files.
    pub b_prefixes: Vec<IpNet>,
    pub tunnels: u8,
    pub a_members: Option<Members>,
    pub b_members: Option<Members>,
    /// Addresses of a bond that is to be made at site A.
    pub a_bond_addresses: Vec<IpNet>,
    /// Addresses of a bond that is to be made at site B.
    pub b_bond_addresses: Vec<IpNet>,
    /// Lowest UDP port. `None`: a default.
    pub base_port: Option<u16>,
    /// MTU of the tunnels, bytes. `None`: a default.
    pub mtu: Option<u32>,
}

/// Why nothing can be made. The text says what to change.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// An option or a file is wrong.
    #[error("{0}")]
    Wrong(String),
    #[error(transparent)]
    Ports(#[from] PortError),
}

fn wrong(message: String) -> InitError {
    InitError::Wrong(message)
}

/// A site's bond, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Members {
    /// Interfaces to enslave.
    Names(Vec<InterfaceName>),
    /// The size of a bond that exists.
    Count(u8),
}

impl FromStr for Members {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let count = text.parse().ok().filter(|count| (1..=MAX_MEMBERS).contains(count));
            return count.map(Self::Count).ok_or_else(|| format!("a bond has 1 to {MAX_MEMBERS} members"));
        }
        let name = |name: &str| InterfaceName::new(name).map_err(|why| format!("{name:?} {why}"));
        text.split(',').map(name).collect::<Result<_, _>>().map(Self::Names)
    }
}
