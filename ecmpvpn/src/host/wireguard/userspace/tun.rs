//! A TUN device with the interface that gotatun needs.
//!
//! gotatun's own TUN code is not used: it adopts a device that exists, ends the tunnel at a malformed packet, and polls
//! the MTU. Reading needs no offload flags: the device announces no offload features, so the kernel segments and
//! checksums every packet that is redirected to it (`validate_xmit_skb()`, net/core/dev.c).

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::{Arc, Weak};
use std::time::Duration;

use gotatun::packet::{Ip, Packet, PacketBufPool};
use gotatun::tun::{IpRecv, IpSend, MtuWatcher};
use tokio::io::unix::AsyncFd;

use crate::config::InterfaceName;
use crate::fault;

use super::error::UserspaceError;

/// The most packets to read from the queue before other tasks get a turn.
const BATCH: usize = 64;

/// One TUN device. It exists as long as a clone of this value.
#[derive(Clone)]
pub(super) struct Tun {
    queue: Arc<AsyncFd<File>>,
    name: InterfaceName,
    mtu: u16,
}

impl Tun {
    /// Makes a new device; never adopts an existing one. gotatun pads packets up to `mtu` bytes.
    pub(super) fn create(name: &InterfaceName, mtu: u16) -> Result<Self, UserspaceError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|source| UserspaceError::NoTun { name: name.clone(), source })?;
        fault::point("making a TUN device");
        let queue = set_interface(&file, name).and_then(|()| register(file)).map_err(|source| {
            if source.raw_os_error() == Some(libc::EBUSY) {
                UserspaceError::NameTaken { name: name.clone() }
            } else {
                UserspaceError::Create { name: name.clone(), source }
            }
        })?;
        fault::point("made a TUN device");
        Ok(Self { queue: Arc::new(queue), name: name.clone(), mtu })
    }

    /// A handle that can wait until the device is gone.
    pub(super) fn closed(&self) -> Closed {
        Closed(Arc::downgrade(&self.queue))
    }

    /// Reads and drops all packets until the device is gone.
    pub(super) async fn discard(self) {
        let mut buffer = [0; 64];
        while let Ok(mut ready) = self.queue.readable().await {
            match ready.try_io(|queue| queue.get_ref().read(&mut buffer)) {
                Ok(Err(e)) if is_gone(&e) => break,
                Ok(Err(e)) => tracing::debug!("reading from {}: {e}", self.name),
                // A packet was dropped, or there was none.
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }
}

fn register(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: the File owns its descriptor, gives the same one every time, and is neither moved out nor replaced.
    unsafe { AsyncFd::register(file) }.map_err(io::Error::from)
}

/// Makes a new device, with the open `/dev/net/tun` as its queue.
fn set_interface(file: &File, name: &InterfaceName) -> io::Result<()> {
    // SAFETY: an ifreq is plain integers and bytes, of which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = from.cast_signed();
    }
    // IFF_TUN_EXCL is the sign bit of the 16-bit field.
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = libc::c_short::from_ne_bytes(u16::try_from(flags).expect("16 bits").to_ne_bytes());
    // SAFETY: TUNSETIFF takes an ifreq, which lives until the call returns, and the descriptor is open.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the error says that somebody deleted the device (drivers/net/tun.c gives EBADFD).
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::ENODEV))
}

impl IpSend for Tun {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        let packet = packet.into_bytes();
        loop {
            let mut ready = self.queue.writable().await?;
            match ready.try_io(|queue| queue.get_ref().write(&packet)) {
                Err(_would_block) => {}
                Ok(Err(e)) if is_gone(&e) => {
                    tracing::error!("tunnel {}: its device was deleted", self.name);
                    return Err(e);
                }
                Ok(Err(e)) => {
                    // EIO while the device is down. Do not return the error: gotatun would end the tunnel at some
                    // errors, for a single packet.
                    tracing::trace!("tunnel {}: a received packet is dropped: {e}", self.name);
                    return Ok(());
                }
                Ok(Ok(_)) => return Ok(()),
            }
        }
    }
}

impl IpRecv for Tun {
    async fn recv<'a>(
        &'a mut self,
        pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        let mut batch = Vec::with_capacity(BATCH);
        while batch.is_empty() {
            let mut ready = self.queue.readable().await?;
            for _ in 0..BATCH {
                let mut packet = pool.get();
                match ready.try_io(|queue| queue.get_ref().read(&mut packet)) {
                    Err(_would_block) => break,
                    Ok(Err(e)) if is_gone(&e) => {
                        tracing::error!("tunnel {}: its device was deleted", self.name);
                        return Err(e);
                    }
                    Ok(Err(e)) => {
                        tracing::debug!("reading from {}: {e}", self.name);
                        break;
                    }
                    Ok(Ok(length)) => {
                        packet.truncate(length);
                        // Skip what is not an IP packet: it has no peer.
                        batch.extend(packet.try_into_ip().ok());
                    }
                }
            }
        }
        Ok(batch.into_iter())
    }

    fn mtu(&self) -> MtuWatcher {
        MtuWatcher::new(self.mtu)
    }
}

/// Refers to a device without keeping it.
pub(super) struct Closed(Weak<AsyncFd<File>>);

impl Closed {
    /// Waits up to two seconds until the device is gone. Returns whether it is.
    pub(super) async fn wait(self) -> bool {
        for _ in 0..2_000 {
            if self.0.strong_count() == 0 {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        false
    }
}
