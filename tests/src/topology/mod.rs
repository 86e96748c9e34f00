//! The building blocks of labs: links with a rate, a queue, a delay, jitter and loss, and networks of several sites.
//! The same code builds them on the running kernel, in the emulated machine and in the simulation.

mod link;
mod network;
mod wire;

pub use link::{Quality, shaper};
pub use network::{Gateway, Network, SiteNetwork, Sketch};
pub use wire::Wires;
