//! A raw ICMP socket, bound to one tunnel's device.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, bind, connect, ipproto, send, socket_with};
use rustix::time::{ClockId, clock_gettime};
use socket2::SockRef;

use super::filter;
use super::nanos::Nanos;
use crate::config::InterfaceName;

/// DSCP class selector 6 (network control), as a value of the TOS byte.
const CS6: u8 = 48 << 2;
/// `TC_PRIO_CONTROL`; source: `include/uapi/linux/pkt_sched.h`.
const PRIORITY: libc::c_int = 7;
/// `ICMP_FILTER`, include/uapi/linux/icmp.h: one bit for each ICMP type; a set bit blocks the type.
const ICMP_FILTER: libc::c_int = 1;
const ACCEPTED: u32 = 1 << 0 | 1 << 8;
/// Upper bound of the time that an answer is taken to have waited in the socket: the wall clock may be set meanwhile.
const LONGEST_WAIT: Nanos = 1_000_000_000;

#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens a socket bound to `device`, from `near` to `far`, in the calling thread's network namespace. It receives
    /// what has the form of a probe, or of the answer to one with this `identifier`.
    pub fn open(device: &InterfaceName, near: Ipv4Addr, far: Ipv4Addr, identifier: u16) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP))?;
        SockRef::from(&fd).attach_filter(&filter::program(identifier))?;
        set(&fd, libc::SOL_RAW, ICMP_FILTER, &(!ACCEPTED).to_ne_bytes())?;
        set(&fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_str().as_bytes())?;
        set(&fd, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1_i32.to_ne_bytes())?;
        rustix::net::sockopt::set_ip_tos(&fd, CS6)?;
        // Must come after the TOS byte, which also sets the priority.
        set(&fd, libc::SOL_SOCKET, libc::SO_PRIORITY, &PRIORITY.to_ne_bytes())?;
        bind(&fd, &SocketAddrV4::new(near, 0))?;
        connect(&fd, &SocketAddrV4::new(far, 0))?;
        Ok(Self(fd))
    }

    pub fn send(&self, message: &[u8]) -> io::Result<()> {
        send(&self.0, message, SendFlags::empty())?;
        Ok(())
    }

    /// Receives one packet. Returns its length, and when it arrived by the monotonic clock.
    ///
    /// # Errors
    /// `WouldBlock` if there is no packet.
    pub fn receive(&self, buffer: &mut [u8], now: Clocks) -> io::Result<(usize, Nanos)> {
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut control = [0_u64; 8];
        // SAFETY: a msghdr is integers and pointers, of which all zeroes is a valid value.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the header points to memory of the lengths that it gives, which lives until the call returns.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        let waited = arrival(&message).map_or(0, |at| now.wall.saturating_sub(at).min(LONGEST_WAIT));
        Ok((length, now.monotonic.saturating_sub(waited)))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The kernel's timestamp of a received message, by the wall clock.
fn arrival(message: &libc::msghdr) -> Option<Nanos> {
    // SAFETY: recvmsg filled in the header and its control buffer, which is aligned and still there; the macros stay
    // within the length that it wrote.
    let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) {
        return None;
    }
    // SAFETY: a message of this type holds one timespec.
    let at = unsafe { ptr::read_unaligned(libc::CMSG_DATA(header).cast::<libc::timespec>()) };
    nanos(at.tv_sec, at.tv_nsec)
}

/// Both clocks, read at the same moment.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// The clock for timeouts and round trips.
    pub monotonic: Nanos,
    /// The clock of the kernel's packet timestamps.
    pub wall: Nanos,
}

impl Clocks {
    pub fn read() -> Self {
        let read = |clock| {
            let now = clock_gettime(clock);
            nanos(now.tv_sec, now.tv_nsec).unwrap_or(0)
        };
        Self { monotonic: read(ClockId::Monotonic), wall: read(ClockId::Realtime) }
    }
}

fn nanos(seconds: i64, nanoseconds: i64) -> Option<Nanos> {
    Nanos::try_from(seconds).ok()?.checked_mul(1_000_000_000)?.checked_add(Nanos::try_from(nanoseconds).ok()?)
}

fn set(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the value has that many bytes, and the kernel copies them before the call returns.
    match unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value.as_ptr().cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

const _: () = assert!(size_of::<libc::timespec>() + 16 <= 64);
