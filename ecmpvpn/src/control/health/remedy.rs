//! Starts one tunnel anew, and leaves the others alone.
//!
//! The device is kept: its index, addresses and programs stay, and so does what the journal knows of it. Down and up
//! again, it has a new socket, and its peer new queues and keys; deleting it would gain nothing more.

use super::watchdog::Remedy;
use crate::host::wireguard::userspace::Userspace;
use crate::host::{self, HostError};
use crate::plan::{Plan, Tunnel};

/// What was done, for the log.
pub(super) fn describe(remedy: Remedy) -> &'static str {
    match remedy {
        Remedy::Handshake => "its peer was set again, for a new handshake",
        Remedy::Interface => "its interface was set down and up again, with its key, port and peer",
    }
}

/// Applies `remedy` to a tunnel of `plan`.
pub(super) async fn apply(
    plan: &Plan,
    planned: &Tunnel,
    remedy: Remedy,
    userspace: Option<&Userspace>,
) -> Result<(), HostError> {
    let Some(userspace) = userspace else {
        return host::restart_tunnel(planned, &Plan::link_alias(&plan.site), remedy == Remedy::Interface).await;
    };
    // There both are one and the same.
    let failed = |source| HostError::Userspace { tunnel: planned.name.clone(), source };
    userspace.restart(&planned.name).await.map_err(failed)
}
