//! What must pass a chain.

use std::fmt;

use crate::config::InterfaceName;

/// Something that must pass a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// UDP to these ports.
    Udp(Vec<u16>),
    /// Echo requests and replies that come out of these tunnels.
    Echo(Vec<InterfaceName>),
    /// What comes out of these tunnels, and what is routed to this device.
    Forward(Vec<InterfaceName>, InterfaceName),
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(ports) => write!(f, "UDP to {} {}", plural(ports, "port"), list(ports)),
            Self::Echo(tunnels) => write!(f, "ICMP echo on {}", list(tunnels)),
            Self::Forward(tunnels, device) => {
                write!(f, "what is forwarded to {device} or comes from {}", list(tunnels))
            }
        }
    }
}

/// Separated by commas.
pub fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The singular or plural of `word`.
pub fn plural<T>(items: &[T], word: &str) -> String {
    if items.len() == 1 { word.to_owned() } else { format!("{word}s") }
}
