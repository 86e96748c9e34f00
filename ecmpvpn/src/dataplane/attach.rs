//! Attaches the programs: by tcx where the kernel has it, else by clsact filters.

use std::mem;
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use ecmpvpn_common::layout::{Settings, State, Tunnel, TunnelId, maps, programs, settings_flags, tunnel_flags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::error::os_error;
use super::mapped::Mapped;
use super::{DataplaneError, Device, Hook, Loaded, Pins, View};
use crate::config::InterfaceName;
use crate::fault;
use crate::plan::SteeringTable;

/// Priority of ecmpvpn's clsact filters. It identifies a filter when it is replaced.
const PRIORITY: u16 = 0xec;
/// Handle of ecmpvpn's clsact filters, for the same purpose as [`PRIORITY`].
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Attaches to the steering device and to every tunnel; the attachments outlive this process.
pub fn attach(
    loaded: &mut Loaded,
    pins: &Pins,
    steering: &Device,
    table: &SteeringTable,
    hook: Hook,
) -> Result<Hook, DataplaneError> {
    // The tunnels come first: once the steering device steers, the answers must be counted.
    for (peer, row) in (0..).zip(&table.peers) {
        for (slot, (name, _)) in (0..).zip(&row.tunnels) {
            let id = TunnelId::new(peer, slot);
            match hook {
                Hook::Tcx => {
                    let program = loaded.program_mut(programs::INGRESS)?;
                    attach_tcx(program, name, TcAttachType::Ingress, &pins.tunnel_link(id))?;
                }
                Hook::Clsact => {
                    if add_clsact(name)? {
                        mark_tunnel(loaded, id)?;
                    }
                    attach_clsact(loaded.program_mut(programs::INGRESS)?, name, TcAttachType::Ingress)?;
                }
            }
        }
    }
    match hook {
        Hook::Tcx => {
            let program = loaded.program_mut(programs::EGRESS)?;
            attach_tcx(program, &steering.name, TcAttachType::Egress, &pins.steering_link())?;
        }
        Hook::Clsact => {
            let added = add_clsact(&steering.name)?;
            mark_settings(loaded, if added { settings_flags::CLSACT_ADDED } else { 0 })?;
            attach_clsact(loaded.program_mut(programs::EGRESS)?, &steering.name, TcAttachType::Egress)?;
        }
    }
    Ok(hook)
}

/// How to attach: as `asked`, or as the kernel can. Records it in the settings.
pub fn choose(loaded: &Loaded, steering: &Device, asked: Option<Hook>) -> Result<Hook, DataplaneError> {
    let hook = asked.map_or_else(|| probe(&steering.name), Ok)?;
    if hook == Hook::Clsact {
        mark_settings(loaded, settings_flags::CLSACT)?;
    }
    Ok(hook)
}

/// Asks the kernel which programs tcx has on a device. A kernel without tcx refuses the request with EINVAL.
fn probe(steering: &InterfaceName) -> Result<Hook, DataplaneError> {
    match SchedClassifier::query_tcx(steering.as_str(), TcAttachType::Egress) {
        Ok(_) => Ok(Hook::Tcx),
        Err(error) if os_error(&error) == Some(libc::EINVAL) => Ok(Hook::Clsact),
        Err(error) => Err(DataplaneError::new(format!("asking for the programs on {steering}"), error)),
    }
}

pub(super) fn attach_tcx(
    program: &mut SchedClassifier,
    device: &InterfaceName,
    direction: TcAttachType,
    pin: &Path,
) -> Result<(), DataplaneError> {
    let failed = || format!("attaching to {device} by tcx");
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    fault::point("attaching by tcx");
    let id = program
        .attach_with_options(device.as_str(), direction, options)
        .map_err(|error| DataplaneError::new(failed(), error))?;
    let link = program.take_link(id).map_err(|error| DataplaneError::new(failed(), error))?;
    let link = FdLink::try_from(link).map_err(|error| DataplaneError::new(failed(), error))?;
    fault::point("pinning a link");
    let pinned = link.pin(pin);
    pinned.map_err(|error| DataplaneError::new(format!("pinning a link at {}", pin.display()), error))?;
    fault::point("attached by tcx");
    Ok(())
}

pub(super) fn attach_clsact(
    program: &mut SchedClassifier,
    device: &InterfaceName,
    direction: TcAttachType,
) -> Result<(), DataplaneError> {
    let failed = || format!("attaching to {device} by clsact");
    fault::point("attaching by clsact");
    let id = program
        .attach_with_options(
            device.as_str(),
            direction,
            TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, classid: None }),
        )
        .map_err(|error| DataplaneError::new(failed(), error))?;
    let link = program.take_link(id).map_err(|error| DataplaneError::new(failed(), error))?;
    // Dropping the link would detach the filter, which must outlive this process. The link holds no descriptor.
    mem::forget(link);
    fault::point("attached by clsact");
    Ok(())
}

/// What [`attach_again`] did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attached {
    /// The device got a clsact qdisc, which must be removed later.
    pub qdisc_added: bool,
}

/// Attaches `program` where an earlier program may be attached. On the same device it replaces that program in one
/// step: exactly one of the two sees each packet. `egress`: egress of the steering device, else ingress of a tunnel.
pub(super) fn attach_again(
    hook: Hook,
    program: &mut SchedClassifier,
    device: &InterfaceName,
    egress: bool,
    pin: &Path,
    same_device: bool,
) -> Result<Attached, DataplaneError> {
    let direction = if egress { TcAttachType::Egress } else { TcAttachType::Ingress };
    match hook {
        Hook::Tcx => {
            if same_device && replace_tcx(program, pin).is_ok() {
                return Ok(Attached { qdisc_added: false });
            }
            // The link's device is gone, or the link was never created.
            Pins::forget(pin)?;
            attach_tcx(program, device, direction, pin)?;
            Ok(Attached { qdisc_added: false })
        }
        Hook::Clsact => {
            if same_device && replace_clsact(program, device.as_str(), direction).is_ok() {
                return Ok(Attached { qdisc_added: false });
            }
            let qdisc_added = add_clsact(device)?;
            attach_clsact(program, device, direction)?;
            Ok(Attached { qdisc_added })
        }
    }
}

pub(super) fn replace_tcx(program: &mut SchedClassifier, pin: &Path) -> Result<(), ProgramError> {
    let link: FdLink = PinnedLink::from_pin(pin).map_err(std::io::Error::other)?.into();
    fault::point("replacing a program");
    let id = program.attach_to_link(link.try_into().map_err(std::io::Error::other)?)?;
    // The pin keeps the link.
    program.take_link(id).map(drop)
}

pub(super) fn replace_clsact(
    program: &mut SchedClassifier,
    device: &str,
    direction: TcAttachType,
) -> Result<(), ProgramError> {
    let link = SchedClassifierLink::attached(device, direction, PRIORITY, HANDLE, None)?;
    fault::point("replacing a program");
    let id = program.attach_to_link(link)?;
    // As in `attach_clsact`.
    mem::forget(program.take_link(id)?);
    Ok(())
}

/// Adds a clsact qdisc to the device. Returns false if the device has one already.
pub(super) fn add_clsact(device: &InterfaceName) -> Result<bool, DataplaneError> {
    fault::point("adding a clsact qdisc");
    match tc::qdisc_add_clsact(device.as_str()) {
        Ok(()) => {
            fault::point("added a clsact qdisc");
            Ok(true)
        }
        Err(error) if os_error(&error) == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(DataplaneError::new(format!("adding a clsact qdisc to {device}"), error)),
    }
}

fn mark_settings(loaded: &Loaded, flags: u32) -> Result<(), DataplaneError> {
    let state = Mapped::<State>::new(maps::STATE, loaded.array_data(maps::STATE)?)?;
    let record = &state.state().settings;
    record.set(Settings { flags: record.get().flags | flags, ..record.get() });
    Ok(())
}

fn mark_tunnel(loaded: &Loaded, id: TunnelId) -> Result<(), DataplaneError> {
    let state = Mapped::<State>::new(maps::STATE, loaded.array_data(maps::STATE)?)?;
    let record = &state.state().tunnels[id.index()];
    record.set(Tunnel { flags: record.get().flags | tunnel_flags::CLSACT_ADDED, ..record.get() });
    Ok(())
}

/// Removes the clsact filters, and the qdiscs that were added for them. Devices that no longer exist have nothing left
/// to remove.
pub fn detach(view: &View) -> Result<(), DataplaneError> {
    let settings = view.settings();
    if settings.flags & settings_flags::CLSACT == 0 {
        return Ok(());
    }
    let mut first = Ok(());
    let added = settings.flags & settings_flags::CLSACT_ADDED != 0;
    first = first.and(detach_from(settings.steering_ifindex, TcAttachType::Egress, programs::EGRESS, added));
    for (_, tunnel) in view.tunnel_records() {
        let added = tunnel.flags & tunnel_flags::CLSACT_ADDED != 0;
        first = first.and(detach_from(tunnel.ifindex, TcAttachType::Ingress, programs::INGRESS, added));
    }
    first
}

pub(super) fn detach_from(
    ifindex: u32,
    direction: TcAttachType,
    program: &str,
    added: bool,
) -> Result<(), DataplaneError> {
    let Some(name) = name_of(ifindex) else { return Ok(()) };
    fault::point("detaching by clsact");
    match tc::qdisc_detach_program(&name, direction, program) {
        Ok(()) => {}
        Err(tc::TcError::IoError(error)) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(DataplaneError::new(format!("detaching {program} from {name}"), error)),
    }
    if added {
        fault::point("deleting a clsact qdisc");
        match ask_about_clsact(ifindex, RTM_DELQDISC) {
            // A process that was killed had recorded it, and not added it yet.
            Err(error) if is_absent(&error) => {}
            deleted => {
                deleted.map_err(|error| DataplaneError::new(format!("deleting the clsact qdisc of {name}"), error))?;
            }
        }
    }
    Ok(())
}

/// Whether there is an interface with this index.
pub fn device_exists(ifindex: u32) -> bool {
    ifindex != 0 && name_of(ifindex).is_some()
}

pub(super) fn name_of(ifindex: u32) -> Option<String> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::index_to_name(socket, ifindex).ok()
}

/// Whether the device has a clsact or ingress qdisc.
pub(super) fn has_clsact(device: &Device) -> Result<bool, DataplaneError> {
    match ask_about_clsact(device.ifindex, RTM_GETQDISC) {
        Ok(()) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(DataplaneError::new(format!("looking for a clsact qdisc of {}", device.name), error)),
    }
}

/// Whether the kernel refused because there is no such qdisc. Source: `tc_get_qdisc` in `net/sched/sch_api.c`: if there
/// was one once, the placeholder that it left has another handle.
fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL))
}

const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;

/// Sends a request about the clsact qdisc of a device. Source: `linux/rtnetlink.h`, `linux/pkt_sched.h`.
fn ask_about_clsact(ifindex: u32, request: u16) -> std::io::Result<()> {
    const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
    const NLMSG_ERROR: u16 = 2;
    const RTM_NEWQDISC: u16 = 36;
    const CLSACT_HANDLE: u32 = 0xffff_0000;
    const CLSACT_PARENT: u32 = 0xffff_fff1;
    const LENGTH: u32 = 36;

    let mut message = Vec::with_capacity(LENGTH as usize);
    message.extend(LENGTH.to_ne_bytes());
    message.extend(request.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    for word in [1, 0, 0, ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0u32] {
        message.extend(word.to_ne_bytes());
    }
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut reply = [0; 256];
    let (received, _) = rustix::net::recv(&socket, &mut reply[..], RecvFlags::empty())?;
    match u16::from_ne_bytes([reply[4], reply[5]]) {
        RTM_NEWQDISC if received >= 16 => Ok(()),
        NLMSG_ERROR if received >= 20 => match i32::from_ne_bytes([reply[16], reply[17], reply[18], reply[19]]) {
            0 => Ok(()),
            code => Err(std::io::Error::from_raw_os_error(-code)),
        },
        _ => Err(std::io::ErrorKind::InvalidData.into()),
    }
}
