//! Makes the kernel match a [`crate::plan::Plan`], and undoes that: bond, tunnels, steering device, routes, sysctls.
//!
//! Every change is recorded in a journal before it is made, so that any later process can undo it. The steps of a run:
//! ```text
//! RunDir::lock -> Journal::open (not empty: a crash; undo it) -> preflight -> bring_up -> … -> Journal::undo -> RunDir::remove
//! ```
//! The same functions adopt what an earlier run left up, and apply a changed plan to a running site:
//! ```text
//! changes_since(plan, made) -> preflight_since -> apply (additions) -> … -> apply (removals)
//! ```
//! Everything works in the network namespace of the calling thread. A test that moves only its own thread to another
//! namespace must use a current-thread runtime.

mod alteration;
mod bond;
pub mod bpffs;
mod bring_up;
mod change;
mod device;
mod error;
pub mod events;
pub mod firewall;
pub mod holding;
pub mod journal;
pub mod links;
pub mod managed;
mod management;
mod member;
mod member_routes;
pub mod netlink;
mod next_hop;
mod owned;
pub mod packets;
mod preflight;
pub mod privilege;
pub mod queues;
mod record;
mod route;
pub mod run_dir;
pub mod sandbox;
mod saved;
mod sessions;
mod shared;
mod survey;
mod sysctl;
mod tunnel;
pub mod underlay;
mod undo;
mod unreachable;
pub mod wireguard;

pub use alteration::{Alteration, Part};
pub use bring_up::{HostLinks, Options, apply, bring_up, changes, changes_since};
pub use change::Change;
pub use error::{Conflict, HostError, Lacks, UndoErrors};
pub use journal::Journal;
pub use managed::remember_namespace;
pub use management::check_management;
pub use netlink::Netlink;
pub use owned::Owned;
pub use preflight::{load_bonding, mtu_conflict, preflight, preflight_since, require_maps, require_privilege};
pub use record::Undo;
pub use route::PROTOCOL as ROUTE_PROTOCOL;
pub use run_dir::{RUN_ROOT, RunDir};
pub use sessions::remember as remember_ssh_sessions;
pub use tunnel::{rekey as rekey_tunnel, restart as restart_tunnel};

use crate::config::BackendChoice;
use crate::plan::{Backend, Plan};

/// Whether a kernel setting that `plan` needs has another value now. The kernel tells of no such change.
pub fn switches_differ(plan: &Plan) -> bool {
    sysctl::differ(&plan.sysctls)
}

/// Decides which backend carries the tunnels: the kernel if it has WireGuard, unless the configuration chooses one.
pub fn detect_backend(choice: BackendChoice) -> Backend {
    match choice {
        BackendChoice::Kernel => Backend::Kernel,
        BackendChoice::Auto if wireguard::kernel::is_available() => Backend::Kernel,
        BackendChoice::Auto | BackendChoice::Userspace => Backend::Userspace,
    }
}
