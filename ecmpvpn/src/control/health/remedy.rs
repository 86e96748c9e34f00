//! Restarts one tunnel, and leaves the others alone.
//!
//! The device stays, with its index, addresses, programs and journal records. Setting it down and up again gives it a
//! new socket, and its peer new queues and session keys. Deleting the device would gain nothing more.

use super::watchdog::Remedy;
use crate::host::wireguard::userspace::Userspace;
use crate::host::{self, HostError};
use crate::plan::{Plan, Tunnel};

/// Says for the log what was done.
pub(super) fn describe(remedy: Remedy) -> &'static str {
    match remedy {
        Remedy::Handshake => "its peer was set again, to start a new handshake",
        Remedy::Interface => "its interface was set down and up again, with its key, port and peer",
    }
}

pub(super) async fn apply(
    plan: &Plan,
    planned: &Tunnel,
    remedy: Remedy,
    userspace: Option<&Userspace>,
) -> Result<(), HostError> {
    let Some(userspace) = userspace else {
        return host::restart_tunnel(planned, &Plan::link_alias(&plan.site), remedy == Remedy::Interface).await;
    };
    // In userspace both remedies are the same.
    let failed = |source| HostError::Userspace { tunnel: planned.name.clone(), source };
    userspace.restart(&planned.name).await.map_err(failed)
}
