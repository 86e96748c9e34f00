//! Packets that no well-behaved socket sends.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::netns::Netns;

/// Sends raw packets out of a link of `ns`. Each begins with its network header. Their Ethernet type is IPv4.
pub fn inject(ns: &Netns, link: &str, packets: &[&[u8]]) -> io::Result<()> {
    inject_as(ns, link, 0x0800, packets)
}

/// Sends raw packets out of a link of `ns`. Each begins with what follows the Ethernet header.
pub fn inject_as(ns: &Netns, link: &str, ethertype: u16, packets: &[&[u8]]) -> io::Result<()> {
    let link = CString::new(link)?;
    ns.run(|| {
        // SAFETY: `socket` takes no pointers.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and open, and no other code owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: a sockaddr_ll consists of integers, for which zero is a valid value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::c_ushort::try_from(libc::AF_PACKET).expect("17");
        address.sll_protocol = ethertype.to_be();
        // SAFETY: the string ends in NUL and lives until the call returns.
        address.sll_ifindex = unsafe { libc::if_nametoindex(link.as_ptr()) }.cast_signed();
        for packet in packets {
            // SAFETY: both buffers live until the call returns, and have the given lengths.
            let sent = unsafe {
                libc::sendto(
                    socket.as_raw_fd(),
                    packet.as_ptr().cast(),
                    packet.len(),
                    0,
                    (&raw const address).cast(),
                    libc::socklen_t::try_from(size_of_val(&address)).expect("20"),
                )
            };
            if sent < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    })
}
