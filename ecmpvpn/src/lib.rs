//! Steers the flows between two sites over several WireGuard tunnels.
//!
//! The way of data: `config -> plan -> host + dataplane -> control -> report`; an arrow never points back.
//! `config` and `plan` touch no kernel; only `host` writes netlink and sysctls; only `dataplane` touches BPF.

pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod exit;
pub mod host;
pub mod plan;
pub mod report;
