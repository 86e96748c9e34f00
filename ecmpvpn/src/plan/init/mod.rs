//! What `init` makes: two sites that fit each other, or one site of its wg-quick files. Values in, values out.

pub mod from_wg_quick;
pub mod sites;

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use super::ports::PortError;
use crate::config::{InterfaceName, MAX_MEMBERS};

/// What is asked for. Site A is the near one where only one is made.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name of site A.
    pub a_name: String,
    /// Name of site B.
    pub b_name: String,
    /// Address of site A's gateway towards site B.
    pub a_endpoint: IpAddr,
    /// Address of site B's gateway towards site A; `None`: the files say it.
    pub b_endpoint: Option<IpAddr>,
    /// Nets behind site A.
    pub a_prefixes: Vec<IpNet>,
    /// Nets behind site B; empty: the files say them.
    pub b_prefixes: Vec<IpNet>,
    /// Number of tunnels.
    pub tunnels: u8,
    /// Site A's bond.
    pub a_members: Option<Members>,
    /// Site B's bond.
    pub b_members: Option<Members>,
    /// Addresses of a bond that is to be made at site A.
    pub a_bond_addresses: Vec<IpNet>,
    /// Addresses of a bond that is to be made at site B.
    pub b_bond_addresses: Vec<IpNet>,
    /// Lowest UDP port.
    pub base_port: Option<u16>,
    /// MTU of the tunnels, bytes.
    pub mtu: Option<u32>,
}

/// What was asked for cannot be made; the text says what to change.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// An option or a file is wrong.
    #[error("{0}")]
    Wrong(String),
    /// The ports.
    #[error(transparent)]
    Ports(#[from] PortError),
}

fn wrong(message: String) -> InitError {
    InitError::Wrong(message)
}

/// What is known of a site's bond.
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
