//! Errors of the steering helper.

use crate::dataplane::DataplaneError;
use crate::host::HostError;

/// Why the maps cannot be kept up to date.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    #[error("reading the host's links and routes")]
    Netlink(#[source] std::io::Error),
    #[error("reading what waits in the links' queues")]
    Queues(#[source] std::io::Error),
    #[error("opening a socket for the links' queues")]
    Socket(#[source] std::io::Error),
    #[error(transparent)]
    Host(#[from] HostError),
}
