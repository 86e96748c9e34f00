//! Finds out what the steering programs cannot: which link each tunnel uses, how fast that link is, how long a flow
//! must pause before it may move, which busy buckets to move, and which flows use several links at once. Writes the
//! results to the pinned maps. Without this process the programs continue with the last values.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "rates are estimates, and conversions of them saturate"
)]

mod elephants;
mod error;
mod flows;
mod links;
mod paths;
mod queue;
mod rate;
mod rebalance;
#[cfg(test)]
mod simulation;

use std::convert::Infallible;
use std::time::{Duration, Instant};

use super::health::Handover;
use super::log_once::LogOnce;
use crate::config::Config;
use crate::dataplane::{Pins, View};
use crate::error::chain;
use crate::host::Netlink;
use crate::host::queues::Queues;
use error::SteerError;
use flows::Flows;
use links::Underlay;

/// How often queues and rates are read while there is traffic.
const TICK: Duration = Duration::from_millis(50);
/// The same while there is none.
const IDLE_TICK: Duration = Duration::from_millis(250);
/// How often links are looked up again and buckets are moved.
const ROUND: Duration = Duration::from_secs(1);
/// How often large flows are looked for while some links are full and others are not.
const LOOK: Duration = Duration::from_millis(100);
/// A link where packets wait longer than this is looked at with every tick: once its flow is sprayed, others overtake
/// what waits there, and only what waits for less than `restore_ms` can be put back in order.
const LONG_QUEUE: Duration = Duration::from_millis(20);

/// Keeps the maps up to date. `handover` has what probing measured. Never returns: a failure is logged once, and tried
/// again.
pub async fn keep(config: &Config, pins: &Pins, handover: &Handover) -> Infallible {
    let mut log = LogOnce::default();
    loop {
        let Err(error) = follow(config, pins, handover).await;
        log.warn(format!("steering continues with the last known rates and links: {}", chain(&error)));
        tokio::time::sleep(ROUND).await;
    }
}

async fn follow(config: &Config, pins: &Pins, handover: &Handover) -> Result<Infallible, SteerError> {
    let view = View::open(pins)?;
    let netlink = Netlink::open()?;
    let mut queues = Queues::open().map_err(SteerError::Socket)?;
    let mut underlay = Underlay::default();
    let mut flows = Flows::default();
    let (mut round, mut look) = (Instant::now(), Instant::now());
    underlay.look_up(config, &view, &netlink).await?;
    loop {
        let traffic = underlay.read_rates(&view, &mut queues, handover)?;
        let is_due = || look.elapsed() >= LOOK || underlay.longest_queue() >= LONG_QUEUE;
        if config.steering.spray_elephants && underlay.is_uneven() && is_due() {
            flows.look(&view, underlay.placed(), std::mem::replace(&mut look, Instant::now()).elapsed());
        }
        if round.elapsed() >= ROUND {
            let elapsed = round.elapsed();
            round = Instant::now();
            underlay.look_up(config, &view, &netlink).await?;
            underlay.set_gaps(config, &view, handover);
            flows.rebalance(&view, underlay.placed(), elapsed, config.steering.spray_elephants);
        }
        tokio::time::sleep(if traffic { TICK } else { IDLE_TICK }).await;
    }
}
