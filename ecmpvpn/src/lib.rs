//! Steers the flows between two sites over several WireGuard tunnels.
//!
//! Data flows `config -> plan -> host + dataplane -> live -> control`. `commands` is on top; `report` (values only) is
//! below `live`. No module imports against this direction, and no files import each other in a circle: unit tests in
//! `xtask` check both. `config` and `plan` do not touch the kernel. Only `host` changes links,
//! addresses, routes and sysctls. Only `dataplane` touches BPF and its hooks.

pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod error;
pub mod exit;
pub mod fault;
pub mod file;
pub mod host;
pub mod live;
pub mod plan;
pub mod report;

// The binary uses it.
use tracing_subscriber as _;
