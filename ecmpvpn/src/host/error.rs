//! What can go wrong on the host, each with what to do about it.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use super::journal::JournalError;
use super::run_dir::StateError;
use crate::config::InterfaceName;

/// Something could not be undone. Everything else was.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct UndoErrors(pub Vec<String>);

/// Why the host does not match the plan.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A request to the kernel failed: what was being done, and to what.
    #[error("{operation}")]
    Step {
        /// As `creating wg0`.
        operation: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The run directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The record of what must be undone.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Undoing failed in part.
    #[error(transparent)]
    Undo(#[from] UndoErrors),
    /// A step failed, and so did undoing the earlier ones.
    #[error("{first}; what was made before could not all be undone: {undo}")]
    NotUndone {
        /// The step's error.
        #[source]
        first: Box<HostError>,
        /// What could not be undone.
        undo: UndoErrors,
    },
    /// The host lacks a privilege or a kernel feature.
    #[error(transparent)]
    Lacks(#[from] Lacks),
    /// The plan does not fit what is on the host.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// The userspace backend.
    #[error("starting {tunnel} in userspace")]
    Userspace {
        /// The tunnel or the steering device.
        tunnel: InterfaceName,
        /// What it says.
        #[source]
        source: super::wireguard::userspace::UserspaceError,
    },
}

/// Something that this host does not have.
#[derive(Debug, thiserror::Error)]
pub enum Lacks {
    /// A capability of this process.
    #[error("this needs {capability} ({why}): run it as root, for example with sudo")]
    Capability {
        /// As `CAP_NET_ADMIN`.
        capability: &'static str,
        /// What for.
        why: &'static str,
    },
    /// Kernel WireGuard.
    #[error(
        "this kernel has no WireGuard: load the module with `modprobe wireguard`, or set backend = \"userspace\" in \
         [steering]"
    )]
    WireGuard,
    /// Bonding.
    #[error(
        "this kernel cannot make bonds: load the module with `modprobe bonding max_bonds=0`, or leave [bond] out to \
         use the interface that the host has"
    )]
    Bonding(#[source] io::Error),
    /// TUN devices.
    #[error(
        "this kernel has no TUN devices, which the userspace backend needs: load the module with `modprobe tun`, or \
         give the container /dev/net/tun"
    )]
    Tun(#[source] io::Error),
    /// IPv6.
    #[error("this kernel has no IPv6, but {0} is steered: take it out of prefixes, or boot without ipv6.disable=1")]
    Ipv6(IpNet),
    /// The BPF file system.
    #[error("the BPF file system cannot be mounted at {path}: this kernel has no BPF, or /sys is not mounted")]
    BpfFs {
        /// The mount point.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Something on the host that stands against the plan.
#[derive(Debug, thiserror::Error)]
pub enum Conflict {
    /// A name is taken.
    #[error(
        "{name} exists and is not ours ({}): rename {role} in the configuration, or remove that device",
        .alias.as_ref().map_or_else(|| "it has no alias".to_owned(), |a| format!("alias {a}"))
    )]
    NameTaken {
        /// The interface.
        name: InterfaceName,
        /// What it was to be.
        role: &'static str,
        /// Whose it is.
        alias: Option<String>,
    },
    /// A device of ours that no journal knows.
    #[error("{name} is left over from an earlier run of {site} whose journal is gone: `ip link delete {name}`")]
    Orphan {
        /// The interface.
        name: InterfaceName,
        /// The site in its alias.
        site: String,
    },
    /// A member that is not there.
    #[error("bond member {member} does not exist; this host has {}", list(.present))]
    NoSuchMember {
        /// As configured.
        member: InterfaceName,
        /// Interfaces that could be members.
        present: Vec<String>,
    },
    /// A member that cannot be enslaved.
    #[error("bond member {member} {why}")]
    UnfitMember {
        /// As configured.
        member: InterfaceName,
        /// Why, and what to do.
        why: String,
    },
    /// An existing bond that is set up in another way.
    #[error("{bond} exists with {setting} {is}, but the configuration says {desired}: change one of the two")]
    BondDiffers {
        /// The bond.
        bond: InterfaceName,
        /// The setting.
        setting: &'static str,
        /// On the host.
        is: String,
        /// In the configuration.
        desired: String,
    },
    /// A UDP port in use.
    #[error("UDP port {port} is already in use: choose another listen_port for {tunnel}")]
    PortInUse {
        /// UDP port.
        port: u16,
        /// The tunnel that wants it.
        tunnel: InterfaceName,
    },
    /// An endpoint that this host does not have.
    #[error(
        "local_endpoint {address} of {peer} is on no interface of this host{}: add it to addresses in [bond], or \
         correct local_endpoint",
        if *.on_member { " once the bond is made (it is on a bond member, which loses it)" } else { "" }
    )]
    EndpointNotHere {
        /// As configured.
        address: IpAddr,
        /// The remote site's name.
        peer: String,
        /// It is on an interface that will be enslaved.
        on_member: bool,
    },
    /// Whoever runs this could be cut off.
    #[error(
        "{member} carries {carries}: enslaving it could cut you off{}{}. If it is meant, run with --take-management-port, \
         best with --confirm 60 as well", missing_text(.missing), gateway_text(.gateway.as_ref())
    )]
    ManagementPort {
        /// As configured.
        member: InterfaceName,
        /// What it carries.
        carries: String,
        /// Addresses that the bond would not take over.
        missing: Vec<IpNet>,
        /// Not in a net of the bond's addresses.
        gateway: Option<IpAddr>,
    },
    /// Something of ours that differs, and can only be made anew.
    #[error("{what}; this cannot be changed while it is up: `ecmpvpn down` and then `ecmpvpn run`")]
    MadeOtherwise {
        /// What, and in what.
        what: String,
    },
    /// A prefix that is routed elsewhere.
    #[error("{prefix} is already routed via {device}: remove that route, or take the prefix out of prefixes")]
    RouteTaken {
        /// The prefix.
        prefix: IpNet,
        /// Where it goes now.
        device: String,
    },
}

fn missing_text(missing: &[IpNet]) -> String {
    if missing.is_empty() {
        return String::new();
    }
    let texts: Vec<String> = missing.iter().map(ToString::to_string).collect();
    format!("; add its addresses to addresses in [bond] ({})", texts.join(", "))
}

fn gateway_text(gateway: Option<&IpAddr>) -> String {
    gateway.map_or_else(String::new, |gateway| format!("; no address in [bond] is of a net that reaches {gateway}"))
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "no Ethernet interface".to_owned() } else { names.join(", ") }
}

impl HostError {
    /// Whether the host lacks a privilege, a kernel feature or a tool, so that no configuration would do.
    pub fn is_lack(&self) -> bool {
        matches!(self, Self::Lacks(_))
    }
}

/// Names the operation in whose course an I/O error came.
pub trait During<T> {
    /// `operation` as `creating wg0`.
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, HostError>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, HostError> {
        self.map_err(|source| HostError::Step { operation: operation(), source })
    }
}
