//! What carries the tunnels of a test.

use anyhow::Result;
use lab::sites::{Lab, Options, Underlay, binary};
use lab::skip::Feature;
use serde_json::Value;

/// The backend and the underlay of a lab.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Userspace,
    Kernel,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::Kernel => "kernel_and_bond",
        }
    }

    pub fn needs(self) -> &'static [Feature] {
        match self {
            Self::Userspace => &[Feature::Tun],
            Self::Kernel => &[Feature::WireGuard, Feature::Bonding],
        }
    }

    pub fn lab(self) -> Result<Lab> {
        let (underlay, backend) = match self {
            Self::Userspace => (Underlay::Routed, "userspace"),
            Self::Kernel => (Underlay::Bonded, "kernel"),
        };
        // Devices count probes, steering does not. With few probes, the two counters differ by less than the allowed
        // 1%.
        Lab::new(Options { underlay, backend, probe_ms: 2_000, ..Options::default() }, &binary()?)
    }
}

/// Every tunnel's `field` of `stats --json`.
pub fn of_tunnels(stats: &Value, field: &str) -> Vec<u64> {
    let tunnels = stats["tunnels"].as_array().expect("stats list the tunnels");
    tunnels.iter().map(|tunnel| tunnel[field].as_u64().expect("a counter")).collect()
}
