//! Keeps the device that holds packets until their time as the configuration says: makes it, makes it again when
//! somebody else deletes it or sets it down, and removes it when it is not needed any more. Without it everything else
//! works.

use std::future::pending;
use std::time::Duration;

use tokio::time::sleep;

use super::health::Handover;
use super::site::Site;
use crate::dataplane::{self, Hook, View};
use crate::error::chain;
use crate::host::holding;

/// How often to look whether the device works.
const LOOK: Duration = Duration::from_secs(1);
/// How long to wait after it could not be made or removed. Each attempt writes to the journal.
const RETRY: Duration = Duration::from_secs(300);
/// How long it stays at least after the far end was told that order is not restored any more: stamped packets may still
/// come, and some are held.
const STAYS: Duration = Duration::from_secs(3);
/// The same in intervals of probes.
const INTERVALS: u32 = 10;

/// The device, and whether this host can have it.
#[derive(Debug)]
pub struct Holding {
    handover: Handover,
    /// Interface index; 0: there is none.
    device: u32,
    /// Why it could not be made or removed. Said once.
    failure: Option<String>,
    can_hold: bool,
}

impl Holding {
    /// Makes the device of a site that comes up, or removes what an earlier run has left.
    pub async fn begin(site: &mut Site, handover: &Handover) -> Self {
        let by_tcx = View::open(&site.paths.pins).is_ok_and(|view| view.hook() == Hook::Tcx);
        let can_hold = by_tcx && dataplane::restores();
        let mut holding = Self { handover: handover.clone(), device: 0, failure: None, can_hold };
        if site.config.steering.restore_order && !can_hold {
            tracing::info!(
                "this host does not restore the order of sprayed packets that arrive: its kernel has no tcx (from Linux \
                 6.6)"
            );
        }
        holding.keep(site).await;
        holding
    }

    fn is_desired(&self, site: &Site) -> bool {
        self.can_hold && site.config.steering.restore_order
    }

    /// Returns when the device must be made or removed.
    pub async fn is_due(&self, site: &Site) {
        if self.failure.is_some() {
            return sleep(RETRY).await;
        }
        if self.is_desired(site) {
            while self.device != 0 && holding::works(self.device).await {
                sleep(LOOK).await;
            }
        } else if self.device != 0 {
            let interval = Duration::from_millis(site.config.health.interval_ms.into());
            sleep(STAYS.max(INTERVALS * interval)).await;
        } else {
            pending::<()>().await;
        }
    }

    /// Makes or removes the device.
    pub async fn keep(&mut self, site: &mut Site) {
        let desired = self.is_desired(site);
        let (plan, journal) = (&site.plan, &mut site.journal);
        let (failed, result) = if desired {
            (
                "this host does not restore the order of sprayed packets that arrive",
                holding::ensure(plan, journal).await,
            )
        } else {
            self.handover.set_holding(0);
            let removed = holding::remove(plan, journal).await.map(|()| 0);
            ("the device that held packets cannot be removed", removed)
        };
        match result {
            Ok(device) => {
                if self.device != 0 && device != 0 {
                    tracing::warn!(
                        "somebody else changed the device that holds packets for their order, and it is mended"
                    );
                }
                (self.device, self.failure) = (device, None);
                self.handover.set_holding(device);
            }
            Err(error) => {
                let why = chain(&error);
                if self.failure.as_ref() != Some(&why) {
                    tracing::info!("{failed}: {why}");
                }
                self.failure = Some(why);
            }
        }
    }
}
