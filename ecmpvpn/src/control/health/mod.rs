//! Keeps the tunnels healthy: probes each of them, takes a dead one out of use, puts it back into use when it is up
//! again, and restarts it when it stays dead.
//!
//! Probing has its own thread, which waits neither for encryption nor for netlink. It writes its results to the pinned
//! maps at once. The session restarts tunnels, by [`Health::watch`].
//!
//! A new [`Health`] takes the state of each tunnel from the maps. Start a new one after tunnels were added or removed.

mod detector;
mod estimate;
mod handover;
#[cfg(test)]
mod handshake_tests;
mod nanos;
mod neighbour;
mod probed;
mod prober;
mod remedy;
mod socket;
#[cfg(test)]
mod tests;
mod watchdog;
/// Public for the fuzz targets only.
#[doc(hidden)]
pub mod wire;

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::config::Config;
use crate::dataplane::{DataplaneError, Pins, View};
use crate::error::chain;
use crate::host::wireguard::userspace::Userspace;
use crate::plan::Plan;
pub use handover::{Handover, PeerMessage};
use prober::Prober;
use watchdog::Request;

/// Why probing cannot start.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// A descriptor or thread of this process; `operation` in the form "starting the probing thread".
    #[error("{operation}")]
    Io {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The running probes. Dropping this ends them.
#[derive(Debug)]
pub struct Health {
    running: Option<(OwnedFd, JoinHandle<()>)>,
    requests: UnboundedReceiver<Request>,
}

impl Health {
    /// Starts to probe `plan`'s tunnels in the calling thread's network namespace. If that fails it logs an error, and
    /// every tunnel keeps its state.
    pub fn start(config: &Config, plan: &Plan, pins: &Pins, handover: &Handover) -> Self {
        let (sender, requests) = unbounded_channel();
        let start = || -> Result<(OwnedFd, JoinHandle<()>), HealthError> {
            let io = |operation| move |source| HealthError::Io { operation, source };
            let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| io("making an event descriptor")(e.into()))?;
            let stopped = stop.try_clone().map_err(io("duplicating a descriptor"))?;
            let prober = Prober::new(config, plan, View::open(pins)?, sender, handover);
            let thread = thread::Builder::new().name("health".to_owned());
            let thread = thread.spawn(move || prober.run(&stopped)).map_err(io("starting the probing thread"))?;
            Ok((stop, thread))
        };
        let running = start().map_err(|error| {
            tracing::error!("tunnels are not probed, and stay in use even when they fail: {}", chain(&error));
        });
        Self { running: running.ok(), requests }
    }

    /// Restarts tunnels that stay dead. Never returns.
    pub async fn watch(&mut self, plan: &Plan, userspace: Option<&Userspace>) -> Infallible {
        while let Some(Request { tunnel, remedy, first }) = self.requests.recv().await {
            let Some(planned) = plan.tunnel(&tunnel) else { continue };
            match remedy::apply(plan, planned, remedy, userspace).await {
                Ok(()) if first => tracing::debug!("{tunnel} has had no handshake yet: {}", remedy::describe(remedy)),
                Ok(()) => tracing::info!("{tunnel} stays down: {}", remedy::describe(remedy)),
                Err(error) => {
                    tracing::warn!("{tunnel} stays down, and cannot be restarted: {}", chain(&error));
                }
            }
        }
        std::future::pending().await
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            // A counter of 1 cannot be full.
            let _ = rustix::io::write(&stop, &1_u64.to_ne_bytes());
            if thread.join().is_err() {
                tracing::error!("the probing thread panicked: this is a bug in ecmpvpn");
            }
        }
    }
}
