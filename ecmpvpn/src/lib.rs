//! Steers the flows between two sites over several WireGuard tunnels.
//!
//! The way of data: `config -> plan -> host + dataplane -> live -> control`, with `commands` on top and `report` (values only)
//! below `live`. No import points back, and no files import each other in a circle: a test of the workspace checks both.
//! `config` and `plan` touch no kernel; only `host` writes netlink and sysctls; only `dataplane` touches BPF.

pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod error;
pub mod exit;
pub mod host;
pub mod live;
pub mod plan;
pub mod report;
