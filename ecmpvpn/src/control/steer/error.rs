//! Errors of the steering helper.

use crate::dataplane::DataplaneError;

/// Why the maps cannot be kept up to date.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    #[error("reading the host's links and routes")]
    Netlink(#[source] std::io::Error),
    #[error("reading what waits in the links' queues")]
    Queues(#[source] std::io::Error),
    #[error("opening a netlink socket")]
    Socket(#[source] std::io::Error),
}
