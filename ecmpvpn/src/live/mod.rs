//! What any process reads from a running site, or changes in it, through the pinned maps. No daemon is needed.

pub mod arrivals;
pub mod explain;
pub mod policy;
pub mod ports;
pub mod stats;
