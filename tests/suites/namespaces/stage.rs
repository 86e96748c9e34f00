//! What the tests of this suite have in common.

use std::time::Duration;

use anyhow::Result;
use lab::kind::Kind;
use lab::sites::{Lab, Options, binary};
use serde_json::Value;

/// How long a dump may take to settle: the kernel does duplicate address detection and link watch with a delay.
pub const SETTLE: Duration = Duration::from_secs(30);

/// Devices count probes, steering does not. With few probes, the two counters differ by less than the allowed 1%.
pub fn lab(kind: Kind) -> Result<Lab> {
    Lab::new(Options { probe_ms: 2_000, ..kind.options() }, &binary()?)
}

/// Every tunnel's `field` of `stats --json`.
pub fn of_tunnels(stats: &Value, field: &str) -> Vec<u64> {
    let tunnels = stats["tunnels"].as_array().expect("stats list the tunnels");
    tunnels.iter().map(|tunnel| tunnel[field].as_u64().expect("a counter")).collect()
}
