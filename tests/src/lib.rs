//! Labs: namespaces, links, traffic and dumps.
//!
//! Everything here runs as root, in network namespaces of its own; nothing touches the namespace that it is started in.

pub mod changes;
pub mod dump;
pub mod interrupt;
pub mod log;
pub mod netns;
pub mod packet;
pub mod sites;
pub mod skip;
pub mod stalls;
pub mod topology;
pub mod traffic;
