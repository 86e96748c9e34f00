//! What runs: bringing a site up, keeping it, taking it down; and gathering what the reports show.

pub mod arrivals;
pub mod confirm;
mod converge;
pub mod explain;
pub mod gather;
pub mod health;
pub mod measure;
mod mend;
pub mod names;
mod notify;
pub mod policy;
pub mod ports;
pub mod reload;
pub mod rotate;
pub mod session;
mod steer;
mod syslog;
pub mod underlay;
