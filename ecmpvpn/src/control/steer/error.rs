//! What steering cannot do.

use crate::dataplane::DataplaneError;

/// Steering cannot be helped.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The maps.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// Links and routes.
    #[error("reading the host's links and routes")]
    Netlink(#[source] std::io::Error),
    /// What waits on the links.
    #[error("reading what waits in the links' queues")]
    Queues(#[source] std::io::Error),
    /// No socket.
    #[error("opening a netlink socket")]
    Socket(#[source] std::io::Error),
}
