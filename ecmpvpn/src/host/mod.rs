//! Makes the kernel match a [`crate::plan::Plan`] and puts it back: bond, tunnels, steering device, routes, sysctls.
//!
//! Every change is written to a journal before it is made, so that any later process can undo it.

pub mod observe;
pub mod wireguard;
