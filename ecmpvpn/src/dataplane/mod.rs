//! Loads, attaches and pins the BPF programs, and gives typed views of their maps. The only module that touches BPF.
//!
//! Programs and maps are pinned below `/sys/fs/bpf/ecmpvpn/<site>/v<LAYOUT>/` and outlive this process. [`start`]
//! creates them, [`adopt`] takes them over in a later process, and [`update`] changes them while packets flow. From any
//! process, [`View`] reads and changes them, and [`remove`] removes them.

mod arrivals;
mod attach;
mod clock;
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
pub use attach::device_exists;
pub use clock::{boot_time_ns, monotonic_ns};
pub use device::{Device, Hook};
pub use error::DataplaneError;
pub use object::{Loaded, Options, TestRun, restores, tick_ns};
pub use pins::Pins;
pub use rules::RuleMaps;
pub use snapshot::Snapshot;
pub use update::{adopt, slots, update};
pub use view::{PeerView, Reasons, TunnelView, View};

use crate::config::InterfaceName;
use crate::error::chain;
use crate::plan::SteeringTable;

/// Starts steering by `table`: loads the programs, fills the maps, pins both, and attaches to the steering device and
/// to every tunnel. `tunnels` has the interface index of each tunnel that `table` names. bpffs must be mounted where
/// `pins` are.
///
/// # Errors
/// A step failed. Everything that earlier steps made is removed again.
pub fn start(
    pins: &Pins,
    table: &SteeringTable,
    steering: &Device,
    tunnels: &BTreeMap<InterfaceName, u32>,
    options: &Options,
) -> Result<Hook, DataplaneError> {
    let mut loaded = Loaded::new(table, steering.ifindex, tunnels, options)?;
    // Before the pins: whoever finds them must know how to attach what a killed process has not attached.
    let hook = attach::choose(&loaded, steering, options.hook)?;
    pins.create()?;
    let started = loaded.pin(pins).and_then(|()| attach::attach(&mut loaded, pins, steering, table, hook));
    if started.is_err() {
        // The first failure is what the caller needs to know.
        if let Err(error) = remove(pins) {
            tracing::warn!("undoing the start of steering: {}", chain(&error));
        }
    }
    started
}

/// Stops steering and removes all pins. It is no error if there are none. Must run in the devices' network namespace.
///
/// # Errors
/// A filter cannot be detached or a pin cannot be removed. The rest is removed nevertheless.
pub fn remove(pins: &Pins) -> Result<(), DataplaneError> {
    if !pins.exist() && pins.of_other_versions().is_empty() {
        // A start that was killed may have made only these.
        return pins.remove_parents();
    }
    // With tcx the pinned links hold the attachment. With clsact the filters must be detached one by one.
    let detached = match View::open(pins) {
        Ok(view) => attach::detach(&view),
        // A start that was interrupted has not attached anything yet.
        Err(_) => Ok(()),
    };
    let mut detached = detached.and(arrivals::detach_all(pins));
    for dir in pins.of_other_versions() {
        detached = detached.and(arrivals::detach_other_version(&dir));
    }
    pins.remove().and(detached)
}
