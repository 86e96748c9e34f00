//! Confirms to the kernel that the next hop of a tunnel's outer packets is reachable, as answers to probes show.
//!
//! Otherwise the kernel asks twice a minute (ARP, neighbour discovery). A bond hashes the request and the reply by MAC
//! addresses, so each always uses the same member. If that member fails just then, the kernel gives the neighbour up
//! three seconds later, and every tunnel stops, also those on working members.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use super::nanos::{Nanos, SECOND};
use crate::config::InterfaceName;
use crate::host::wireguard::kernel;
use crate::plan::Tunnel;

/// Interval between confirmations: the kernel would ask after 15 seconds at the earliest (`neigh_rand_reach_time()`,
/// net/core/neighbour.c).
const EVERY: Nanos = 5 * SECOND;
/// An older answer does not show that the next hop is reachable now.
const FRESH: Nanos = SECOND / 10;

/// `MSG_PROBE`, include/linux/socket.h: sends nothing. With `MSG_CONFIRM` it still confirms the next hop's neighbour
/// entry (`udp_sendmsg()`, net/ipv4/udp.c; `udpv6_sendmsg()`, net/ipv6/udp.c).
const MSG_PROBE: libc::c_int = 0x10;

#[derive(Debug)]
pub struct NextHop {
    /// Source address of outer packets.
    near: IpAddr,
    /// Destination of outer packets, unless the far end has roamed.
    far: SocketAddr,
    again_at: Nanos,
}

impl NextHop {
    pub fn new(planned: &Tunnel) -> Self {
        Self { near: planned.local_endpoint, far: planned.remote_endpoint, again_at: 0 }
    }

    /// Whether a confirmation is due, and the last answer to a probe, which came at `answered`, is fresh enough.
    pub fn is_due(&self, now: Nanos, answered: Option<Nanos>) -> bool {
        now >= self.again_at && answered.is_some_and(|at| now.saturating_sub(at) <= FRESH)
    }

    /// Confirms the next hop. `in_kernel`: the kernel's WireGuard carries the tunnel, and knows its current endpoint.
    pub fn confirm(&mut self, name: &InterfaceName, in_kernel: bool, now: Nanos) {
        self.again_at = now + EVERY;
        let moved_to = || kernel::peers(name.as_str()).ok()?.into_iter().find_map(|peer| peer.endpoint);
        let far = if in_kernel { moved_to() } else { None }.unwrap_or(self.far);
        if let Err(error) = confirm(self.near, far) {
            // This host's own address may have changed.
            tracing::trace!("confirming the next hop of {name}: {error}");
        }
    }
}

/// Confirms the next hop from the address `near` to `far`, in the calling thread's network namespace. Does nothing if
/// the kernel has no neighbour entry for it. Sends nothing.
fn confirm(near: IpAddr, far: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(near, 0))?;
    // Sends nothing: it looks up the route, and sets the destination for `send`.
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
            // Skip a family that this machine lacks.
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
