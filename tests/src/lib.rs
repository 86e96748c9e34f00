//! Labs: namespaces, links, traffic and dumps.
//!
//! Everything here runs as root in separate network namespaces, and does not touch the namespace in which it is
//! started.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

pub mod bpffs;
pub mod cgroup;
pub mod changes;
pub mod clear;
pub mod comparison;
pub mod dump;
pub mod hostile;
pub mod interrupt;
pub mod kind;
pub mod log;
pub mod names;
pub mod netns;
pub mod packet;
pub mod quantiles;
pub mod sites;
pub mod skip;
pub mod stalls;
pub mod topology;
pub mod traffic;
