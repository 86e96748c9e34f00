//! Tells the kernel that the next hop of a tunnel's outer packets is there, which answers to probes show.
//!
//! Else it asks by itself twice a minute (ARP, neighbour discovery), and a bond hashes what is asked, and what is answered, by
//! MAC addresses: both have one member each. If just that member goes silent when it is time to ask, the kernel gives the
//! neighbour up three seconds later, and every tunnel stands still with it, those on sound members too.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use super::nanos::Nanos;
use crate::config::InterfaceName;
use crate::host::wireguard::kernel;
use crate::plan::Tunnel;

const SECOND: Nanos = 1_000_000_000;
/// So often it is confirmed: the kernel would ask after 15 seconds at the earliest (`neigh_rand_reach_time()`, net/core/
/// neighbour.c).
const EVERY: Nanos = 5 * SECOND;
/// An answer that is older shows nothing of now.
const FRESH: Nanos = SECOND / 10;

/// `MSG_PROBE`, include/linux/socket.h: nothing is sent. With `MSG_CONFIRM` the next hop's entry is confirmed all the same
/// (`udp_sendmsg()`, net/ipv4/udp.c; `udpv6_sendmsg()`, net/ipv6/udp.c).
const MSG_PROBE: libc::c_int = 0x10;

/// One tunnel's.
#[derive(Debug)]
pub struct NextHop {
    /// Where outer packets leave from.
    near: IpAddr,
    /// Where they go, unless the far end has moved.
    far: SocketAddr,
    again_at: Nanos,
}

impl NextHop {
    pub fn new(planned: &Tunnel) -> Self {
        Self { near: planned.local_endpoint, far: planned.remote_endpoint, again_at: 0 }
    }

    /// Whether it is time, and the last answer to a probe, which came at `answered`, shows that it is there.
    pub fn is_due(&self, now: Nanos, answered: Option<Nanos>) -> bool {
        now >= self.again_at && answered.is_some_and(|at| now.saturating_sub(at) <= FRESH)
    }

    /// Confirms it; `in_kernel`: the kernel knows where the tunnel goes now.
    pub fn confirm(&mut self, name: &InterfaceName, in_kernel: bool, now: Nanos) {
        self.again_at = now + EVERY;
        let moved_to = || kernel::peers(name.as_str()).ok()?.into_iter().find_map(|peer| peer.endpoint);
        let far = if in_kernel { moved_to() } else { None }.unwrap_or(self.far);
        if let Err(error) = confirm(self.near, far) {
            // This end's own address may be another one now.
            tracing::trace!("confirming the next hop of {name}: {error}");
        }
    }
}

/// Confirms the next hop from the address `near` to `far`, in the calling thread's network namespace. Where the kernel has no
/// entry for it, nothing happens. Sends nothing.
fn confirm(near: IpAddr, far: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(near, 0))?;
    // Routes and addresses only; `send` takes the destination from here.
    socket.connect(far)?;
    let flags = libc::MSG_CONFIRM | MSG_PROBE;
    // SAFETY: no memory is passed.
    match unsafe { libc::send(socket.as_raw_fd(), std::ptr::null(), 0, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_a_fresh_answer_confirms_and_not_all_the_time() {
        let hop = NextHop { near: [127, 0, 0, 1].into(), far: ([127, 0, 0, 1], 9).into(), again_at: 100 * SECOND };
        let due = |now, answered| hop.is_due(now, answered);
        assert!(due(100 * SECOND, Some(100 * SECOND)) && due(100 * SECOND + FRESH, Some(100 * SECOND)));
        assert!(!due(101 * SECOND, Some(100 * SECOND)) && !due(101 * SECOND, None));
        assert!(!due(99 * SECOND, Some(99 * SECOND)));
    }

    #[test]
    fn confirming_sends_nothing() {
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            // A machine may have no IPv6.
            let Ok(receiver) = UdpSocket::bind(SocketAddr::new(address, 0)) else { continue };
            receiver.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            confirm(address, receiver.local_addr().unwrap()).unwrap();
            let error = receiver.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn an_address_that_is_not_here_is_an_error() {
        assert!(confirm("192.0.2.1".parse().unwrap(), "192.0.2.2:9".parse().unwrap()).is_err());
    }
}
