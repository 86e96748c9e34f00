//! Loads, attaches and pins the BPF programs; typed views of their maps. The only module that touches BPF.
//!
//! What runs is pinned below `/sys/fs/bpf/ecmpvpn/<site>/v<LAYOUT>/` and outlives this process: [`start`] makes it,
//! [`adopt`] goes on with it in a later process,
//! [`update`] changes it while packets flow, [`View`] reads and steers it from any process, [`remove`] takes it away from
//! any process.

mod arrivals;
mod attach;
mod device;
mod enomem;
mod error;
mod fill;
mod keys;
mod mapped;
mod object;
mod pins;
mod prefixes;
mod rules;
mod snapshot;
mod update;
mod view;
mod weights;

use std::collections::BTreeMap;

pub use arrivals::{ArrivalView, Arrivals, OuterTunnel};
pub use device::{Device, Hook};
pub use error::DataplaneError;
pub use object::{Loaded, Options, TestRun, tick_ns};
pub use pins::Pins;
pub use rules::RuleMaps;
pub use snapshot::{Snapshot, monotonic_ns};
pub use update::{adopt, slots, update};
pub use view::{PeerView, Reasons, TunnelView, View, boot_time_ns};

use crate::config::InterfaceName;
use crate::plan::SteeringTable;

/// Steers by `table`: loads the programs, fills the maps, pins both, and attaches to the steering device and to every
/// tunnel. `tunnels` has the interface index of each tunnel that `table` names. bpffs must be mounted where `pins` are.
///
/// # Errors
/// All or nothing: whatever step fails, what the earlier ones made is removed again.
pub fn start(
    pins: &Pins,
    table: &SteeringTable,
    steering: &Device,
    tunnels: &BTreeMap<InterfaceName, u32>,
    options: &Options,
) -> Result<Hook, DataplaneError> {
    let mut loaded = Loaded::new(table, steering.ifindex, tunnels, options)?;
    pins.create()?;
    let started = loaded.pin(pins).and_then(|()| attach::attach(&mut loaded, pins, steering, table, options.hook));
    if started.is_err() {
        // The first failure is what the caller needs to know.
        if let Err(error) = remove(pins) {
            tracing::warn!("undoing the start of steering: {error}");
        }
    }
    started
}

/// Stops steering and removes all pins; nothing there is no error. Must run in the devices' network namespace.
///
/// # Errors
/// A filter cannot be detached or a pin cannot be removed; the rest is removed all the same.
pub fn remove(pins: &Pins) -> Result<(), DataplaneError> {
    if !pins.exist() && pins.of_other_versions().is_empty() {
        return Ok(());
    }
    // With tcx the links' pins hold the attachment; with clsact the filters must be taken off one by one.
    let detached = match View::open(pins) {
        Ok(view) => attach::detach(&view),
        // A start that was cut short has not attached anything yet.
        Err(_) => Ok(()),
    };
    let mut detached = detached.and(arrivals::detach_all(pins));
    for dir in pins.of_other_versions() {
        detached = detached.and(arrivals::detach_other_version(&dir));
    }
    pins.remove().and(detached)
}
