//! What runs: bringing a site up, keeping it, taking it down; and gathering what the reports show.

pub mod arrivals;
pub mod gather;
pub mod health;
pub mod measure;
pub mod ports;
pub mod session;
mod steer;
pub mod underlay;
