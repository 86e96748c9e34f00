//! The daemon: brings a site up, keeps it healthy, and takes it down.

pub mod confirm;
pub mod down;
pub mod firewall;
pub mod health;
mod holding;
mod log_once;
mod members;
mod notify;
mod reconcile;
pub mod reload;
mod repair;
pub mod resolve;
pub mod rotate;
pub mod session;
pub mod site;
mod steer;
mod syslog;
pub mod trial;
