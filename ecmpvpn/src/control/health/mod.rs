//! Keeps the tunnels healthy: probes each of them, takes a dead one out of use, puts it back into use when it is up
//! again, and restarts it when it stays dead.
//!
//! Probing has its own thread, which waits neither for encryption nor for netlink. It writes its results to the pinned
//! maps at once. The session restarts tunnels, by [`Health::watch`].
//!
//! A new [`Health`] takes the state of each tunnel from the maps. When the plan changes, [`Health::follow`] begins or ends
//! to probe what was added or removed; the others are probed without a break. A tunnel that is about to be changed is
//! left out meanwhile ([`Health::leave_out`]).

mod detector;
/// Public for the fuzz targets only.
#[doc(hidden)]
pub mod dialogue;
mod estimate;
mod filter;
mod handover;
#[cfg(test)]
mod handshake_tests;
mod nanos;
mod neighbour;
mod ordering;
mod path_loss;
mod probed;
mod prober;
mod remedy;
/// Public for the fuzz targets only.
#[doc(hidden)]
pub mod seal;
mod socket;
mod stamp;
#[cfg(test)]
mod tests;
mod watchdog;
/// Public for the fuzz targets only.
#[doc(hidden)]
pub mod wire;

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::oneshot;

use super::firewall;
use crate::config::{Config, InterfaceName};
use crate::dataplane::{DataplaneError, Pins, View};
use crate::error::chain;
use crate::host::wireguard::userspace::Userspace;
use crate::plan::Plan;
pub use handover::{Handover, OwnQueue, PeerMessage};
pub use prober::NICE;
use prober::{Aim, Ask, Order, Prober};
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
pub struct Health {
    running: Option<Running>,
    asks: UnboundedReceiver<Ask>,
    pins: Pins,
    handover: Handover,
}

/// The probing thread.
struct Running {
    /// `None` only while it ends.
    orders: Option<Sender<Order>>,
    /// Written to when there is an order, or when there will be none any more.
    wake: OwnedFd,
    /// `None` only while it ends.
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn wake(&self) {
        // The counter cannot be full: the thread resets it.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl Health {
    /// Starts to probe `plan`'s tunnels in the calling thread's network namespace. If that fails it logs an error, and
    /// every tunnel keeps its state.
    pub fn start(config: &Config, plan: &Plan, pins: &Pins, handover: &Handover) -> Self {
        let (sender, asks) = unbounded_channel();
        let start = || -> Result<Running, HealthError> {
            let io = |operation| move |source| HealthError::Io { operation, source };
            let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| io("making an event descriptor")(e.into()))?;
            let woken = wake.try_clone().map_err(io("duplicating a descriptor"))?;
            let (orders, received) = channel();
            let prober = Prober::new(Aim::new(config, plan), View::open(pins)?, sender, received, handover);
            let thread = thread::Builder::new().name("health".to_owned());
            let thread = thread.spawn(move || prober.run(&woken)).map_err(io("starting the probing thread"))?;
            Ok(Running { orders: Some(orders), wake, thread: Some(thread) })
        };
        let running = start().map_err(|error| {
            tracing::error!("tunnels are not probed, and stay in use even when they fail: {}", chain(&error));
        });
        Self { running: running.ok(), asks, pins: pins.clone(), handover: handover.clone() }
    }

    /// The messages that both ends exchange in probes.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// Ends the probing of these tunnels, so that nothing judges them while they are changed. [`Self::follow`] probes
    /// them again.
    pub async fn leave_out(&self, names: &[InterfaceName]) {
        if !names.is_empty() {
            self.order(|done| Order::LeaveOut(names.to_vec(), done)).await;
        }
    }

    /// Probes the tunnels of `plan`, and no others. Tunnels that are probed already go on without a break, with what is
    /// known of them. Starts to probe if that failed before. Forgets which tunnels were to be restarted.
    pub async fn follow(&mut self, config: &Config, plan: &Plan) {
        while let Ok(ask) = self.asks.try_recv() {
            if let Ask::Explain(silent) = ask {
                explain_silence(&silent, plan).await;
            }
        }
        if self.running.as_ref().is_none_or(|running| running.thread.as_ref().is_none_or(JoinHandle::is_finished)) {
            *self = Self::start(config, plan, &self.pins, &self.handover);
            return;
        }
        self.order(|done| Order::Follow(Box::new(Aim::new(config, plan)), done)).await;
    }

    /// Returns when the thread has done what it is asked, or has ended.
    async fn order(&self, order: impl FnOnce(oneshot::Sender<()>) -> Order) {
        let Some(running) = &self.running else { return };
        let (done, is_done) = oneshot::channel();
        if running.orders.as_ref().is_some_and(|orders| orders.send(order(done)).is_ok()) {
            running.wake();
            // An error: the thread has ended.
            let _ = is_done.await;
        }
    }

    /// Restarts tunnels that stay dead, and says why none may answer. Never returns.
    pub async fn watch(&mut self, plan: &Plan, userspace: Option<&Userspace>) -> Infallible {
        while let Some(ask) = self.asks.recv().await {
            act(ask, plan, userspace).await;
        }
        std::future::pending().await
    }

    /// Restarts the tunnels that are due now.
    pub async fn restart_due(&mut self, plan: &Plan, userspace: Option<&Userspace>) {
        while let Ok(ask) = self.asks.try_recv() {
            act(ask, plan, userspace).await;
        }
    }
}

async fn act(ask: Ask, plan: &Plan, userspace: Option<&Userspace>) {
    match ask {
        Ask::Restart(request) => restart(request, plan, userspace).await,
        Ask::Explain(silent) => explain_silence(&silent, plan).await,
    }
}

/// Warns that no tunnel of these sites has ever answered, and looks whether this host's firewall may be the reason.
async fn explain_silence(silent: &[String], plan: &Plan) {
    let here = firewall::suspects(plan).await;
    for name in silent {
        tracing::warn!(
            "no tunnel to {name} has answered a probe yet: that site is not up, or a firewall at one of the sites drops \
             the tunnels' UDP or ICMP echo{here}; its tunnels stay in use"
        );
    }
}

async fn restart(request: Request, plan: &Plan, userspace: Option<&Userspace>) {
    let Request { tunnel, remedy, first } = request;
    let Some(planned) = plan.tunnel(&tunnel) else { return };
    match remedy::apply(plan, planned, remedy, userspace).await {
        Ok(()) if first => tracing::debug!("{tunnel} has had no handshake yet: {}", remedy::describe(remedy)),
        Ok(()) => tracing::info!("{tunnel} stays down: {}", remedy::describe(remedy)),
        Err(error) => {
            tracing::warn!("{tunnel} stays down, and cannot be restarted: {}", chain(&error));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.orders = None;
        self.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the probing thread panicked: this is a bug in ecmpvpn");
        }
    }
}
