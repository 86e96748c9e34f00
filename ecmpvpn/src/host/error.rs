//! Errors of changes to the host. Each message says what to do.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use super::journal::JournalError;
use super::run_dir::RunDirError;
use crate::config::InterfaceName;

/// What could not be undone. Everything else was undone.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct UndoErrors(pub Vec<String>);

/// Why the host does not match the plan.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A request to the kernel failed.
    #[error("{operation}")]
    Step {
        /// What was being done, and to what, for example `creating wg0`.
        operation: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    State(#[from] RunDirError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Undoing failed in part.
    #[error(transparent)]
    Undo(#[from] UndoErrors),
    /// A step failed, and the earlier steps could not all be undone.
    #[error("not all earlier changes could be undone ({undo}), after this failed")]
    NotUndone {
        #[source]
        first: Box<HostError>,
        undo: UndoErrors,
    },
    /// The host lacks a privilege or a kernel feature.
    #[error(transparent)]
    Lacks(#[from] Lacks),
    /// The plan conflicts with what is on the host.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    #[error("starting {tunnel} in userspace")]
    Userspace {
        tunnel: InterfaceName,
        #[source]
        source: super::wireguard::userspace::UserspaceError,
    },
}

/// A privilege or feature that this host does not have.
#[derive(Debug, thiserror::Error)]
pub enum Lacks {
    #[error("this needs {capability} ({why}): run it as root, for example with sudo")]
    Capability {
        /// For example `CAP_NET_ADMIN`.
        capability: &'static str,
        why: &'static str,
    },
    #[error(
        "this kernel has no WireGuard: load the module with `modprobe wireguard`, or set backend = \"userspace\" in \
         [steering]"
    )]
    WireGuard,
    #[error(
        "this kernel cannot make bonds: load the module with `modprobe bonding max_bonds=0`, or leave [bond] out to \
         use the interface that the host has"
    )]
    Bonding(#[source] io::Error),
    #[error(
        "this kernel has no TUN devices, which the userspace backend needs: load the module with `modprobe tun`, or \
         give the container /dev/net/tun"
    )]
    Tun(#[source] io::Error),
    #[error("this kernel has no IPv6, but {0} is steered: take it out of prefixes, or boot without ipv6.disable=1")]
    Ipv6(IpNet),
    #[error("the BPF file system cannot be mounted at {path}: this kernel has no BPF, or /sys is not mounted")]
    BpfFs {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Something on the host that conflicts with the plan.
#[derive(Debug, thiserror::Error)]
pub enum Conflict {
    #[error(
        "{name} exists and was not made by ecmpvpn ({}): rename {role} in the configuration, or remove that device",
        .alias.as_ref().map_or_else(|| "it has no alias".to_owned(), |a| format!("alias {a}"))
    )]
    NameTaken {
        name: InterfaceName,
        /// What the configuration uses the name for, for example `the bond`.
        role: &'static str,
        /// The alias of the device that has the name.
        alias: Option<String>,
    },
    /// A device with the alias of this site that is in no journal.
    #[error(
        "{name} is left over from an earlier run of {site} whose journal is gone: remove it with `ip link delete {name}`"
    )]
    Orphan {
        name: InterfaceName,
        /// The site in the device's alias.
        site: String,
    },
    #[error("bond member {member} does not exist; this host has {}", list(.present))]
    NoSuchMember {
        member: InterfaceName,
        /// The interfaces that could be members.
        present: Vec<String>,
    },
    #[error("bond member {member} {why}")]
    UnfitMember { member: InterfaceName, why: String },
    /// An existing bond with other settings than configured.
    #[error("{bond} exists with {setting} {is}, but the configuration says {desired}: change one of the two")]
    BondDiffers {
        bond: InterfaceName,
        setting: &'static str,
        /// The value on the host.
        is: String,
        /// The value in the configuration.
        desired: String,
    },
    #[error("UDP port {port} is already in use: choose another listen_port for {tunnel}")]
    PortInUse { port: u16, tunnel: InterfaceName },
    /// Full packets of the tunnels do not fit the port that they leave by.
    #[error(
        "mtu in [steering] is {mtu}, but {port} sends packets of at most {largest} bytes and WireGuard adds {overhead}: \
         {}raise the MTU of {port} to {}; otherwise fragments, which have no ports, put all tunnels on one bond member",
        largest.checked_sub(*overhead).filter(|fits| *fits >= 1280)
            .map(|fits| format!("set it to {fits}, or ")).unwrap_or_default(),
        mtu + overhead
    )]
    MtuTooLarge {
        /// MTU of the tunnels, bytes.
        mtu: u32,
        /// The interface that the outer packets leave by.
        port: String,
        /// Its MTU, bytes.
        largest: u32,
        /// What WireGuard adds to a packet, bytes.
        overhead: u32,
    },
    /// An endpoint that this host does not have.
    #[error(
        "local_endpoint {address} of {peer} is on no interface of this host{}: add it to addresses in [bond], or \
         correct local_endpoint",
        if *.on_member { " once the bond is made (it is on a bond member, which loses it)" } else { "" }
    )]
    EndpointNotHere {
        address: IpAddr,
        peer: String,
        /// The address is on an interface that will be enslaved.
        on_member: bool,
    },
    /// Enslaving this port could cut off the person who runs the command.
    #[error(
        "{member} carries {carries}: enslaving it could cut you off{}{}. To do it anyway, run with \
         --take-management-port, preferably with --confirm 60", missing_text(.missing), gateway_text(.gateway.as_ref())
    )]
    ManagementPort {
        member: InterfaceName,
        carries: String,
        /// Addresses of the port that the bond would not get.
        missing: Vec<IpNet>,
        /// The gateway, if no network of the bond's addresses contains it.
        gateway: Option<IpAddr>,
    },
    /// Something that this program made differs from the plan, and can only be removed and made again.
    #[error("{what}; this cannot be changed while it is up: run `ecmpvpn down`, then `ecmpvpn run`")]
    MadeOtherwise {
        /// What differs, and how.
        what: String,
    },
    #[error("{prefix} is already routed via {device}: remove that route, or take the prefix out of prefixes")]
    RouteTaken {
        prefix: IpNet,
        /// The device that the route uses now, or its type.
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
    gateway.map_or_else(String::new, |gateway| format!("; no network of addresses in [bond] has {gateway}"))
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "no Ethernet interface".to_owned() } else { names.join(", ") }
}

impl HostError {
    /// Whether the host lacks a privilege, a kernel feature or a tool. No change of the configuration helps then.
    pub fn is_lack(&self) -> bool {
        matches!(self, Self::Lacks(_))
    }
}

/// Adds to an I/O error the operation that failed.
pub trait During<T> {
    /// `operation`: for example `creating wg0`.
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, HostError>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, HostError> {
        self.map_err(|source| HostError::Step { operation: operation(), source })
    }
}
