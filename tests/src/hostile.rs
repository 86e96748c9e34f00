//! What a user without privilege may do on a gateway: send echo requests that look like probes, and hold locks.

use std::fs::{self, File, OpenOptions, Permissions};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::dump::{PINS, RUN_DIR};
use crate::netns::Netns;
use crate::sites::{Lab, Site};

/// `nobody`.
pub const NOBODY: u32 = 65_534;
/// Length of a probe, from the ICMP header on.
const PROBE: usize = 44;
/// Time between two bursts of a flood.
const BURST: Duration = Duration::from_millis(2);

/// Runs `body` in a thread inside `ns`, as a user without any privilege, and waits for it.
///
/// # Errors
/// Those of `body`, and if this process is not root.
pub fn as_nobody<T: Send>(ns: &Netns, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    ns.run(|| {
        // These change only this thread, which ends with the closure.
        set_thread_groups(&[])?;
        set_thread_res_gid(Gid::from_raw(NOBODY), Gid::from_raw(NOBODY), Gid::from_raw(NOBODY))?;
        set_thread_res_uid(Uid::from_raw(NOBODY), Uid::from_raw(NOBODY), Uid::from_raw(NOBODY))?;
        body()
    })
}

/// Lets every user of `ns` send echo requests, as most distributions do.
///
/// # Errors
/// The setting cannot be written.
pub fn allow_ping(ns: &Netns) -> Result<()> {
    ns.sysctl("net/ipv4/ping_group_range", "0 2147483647")
}

/// Opens a socket that sends echo requests from `near` to `far`, which needs no privilege. The kernel sets their
/// identifier; 0: one that is free.
///
/// # Errors
/// The user may not, or the identifier is taken.
pub fn ping_socket([near, far]: [Ipv4Addr; 2], identifier: u16) -> Result<UdpSocket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let open = || -> Result<UdpSocket> {
        let fd: OwnedFd = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, Some(ipproto::ICMP))?;
        bind(&fd, &SocketAddr::new(near.into(), identifier))?;
        connect(&fd, &SocketAddr::new(far.into(), 0))?;
        // The system calls are the same.
        Ok(UdpSocket::from(fd))
    };
    open().with_context(|| format!("a ping socket from {near} to {far}"))
}

/// An echo request with this payload, from the ICMP header on. The kernel fills in identifier and checksum.
pub fn echo_request(payload: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0, 0, 0, 0, 1], payload].concat()
}

/// The payload of the number `at` of the forged reports, in the current format or in that of the version before.
pub fn forged(at: u32, former: bool) -> Vec<u8> {
    let secret = [1, u64::MAX, u64::from(at) << 20][at as usize % 3];
    // Age of the last arrival, and whether the tunnel is to be left and has been left.
    let age = [0, 1, 5_000, 0xffff][at as usize / 3 % 4];
    let flags = (age << 16) + at % 4;
    let rotation = [0, 1, u32::MAX][at as usize / 12 % 3];
    let count = [0, u32::MAX, at][at as usize / 36 % 3];
    if former {
        let count = u64::from(count).to_be_bytes();
        return [b"ecmpvpn\x02", &secret.to_be_bytes(), &count, &words([flags, rotation])[..]].concat();
    }
    let tag = [words([0; 3]), words([at.wrapping_mul(0x9e37_79b9); 3])][at as usize / 108 % 2].clone();
    [b"ecm\x03", &secret.to_be_bytes()[..], &words([flags, rotation, count]), &tag].concat()
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// What a flood consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// Anybody's pings: they do not look like probes.
    Pings,
    /// Forged reports with the public mark.
    Reports,
    /// Forged reports that are cut off somewhere.
    Truncated,
}

impl Flood {
    pub const ALL: [Self; 3] = [Self::Pings, Self::Reports, Self::Truncated];

    /// The message number `at`, from the ICMP header on.
    fn message(self, at: u32) -> Vec<u8> {
        echo_request(&match self {
            Self::Pings => vec![0xc3; 56],
            Self::Reports => forged(at, false),
            Self::Truncated => forged(at, false)[..at as usize % (PROBE - 8)].to_vec(),
        })
    }

    /// Sends `rate` messages a second, over all `sockets` in turn, until `stop` or for `lasts`. Returns how many were
    /// sent, and how long it took.
    pub fn send(self, sockets: &[UdpSocket], rate: u32, lasts: Duration, stop: &AtomicBool) -> (u32, Duration) {
        let start = Instant::now();
        let (mut at, mut sent) = (0, 0);
        while start.elapsed() < lasts && !stop.load(Ordering::Relaxed) {
            let due = (start.elapsed().as_secs_f64() * f64::from(rate)).ceil();
            while f64::from(at) < due {
                let socket = &sockets[at as usize % sockets.len()];
                // A busy tunnel may have no room.
                sent += u32::from(socket.send(&self.message(at)).is_ok());
                at += 1;
            }
            thread::sleep(BURST);
        }
        (sent, start.elapsed())
    }
}

/// Files and directories that are ours or above them, at one site.
///
/// # Errors
/// The configuration has no folder.
pub fn reachable(site: &Site) -> Result<Vec<PathBuf>> {
    let name = &site.name;
    let roots = [RUN_DIR, PINS, "/sys/fs/bpf/ecmpvpn"];
    let mut paths = roots.map(PathBuf::from).to_vec();
    let folder = site.config.parent().context("no folder")?;
    for below in [Path::new(RUN_DIR).join(name), Path::new("/sys/fs/bpf/ecmpvpn").join(name), folder.to_owned()] {
        walk(&below, &mut paths);
    }
    Ok(paths)
}

/// Adds a path, and everything below it that this user can list.
pub fn walk(path: &Path, paths: &mut Vec<PathBuf>) {
    paths.push(path.to_owned());
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), paths);
        } else {
            paths.push(entry.path());
        }
    }
}

/// Opens a path in every way that open(2) knows, and locks what was opened, shared and exclusive.
pub fn lock(path: &Path) -> Vec<File> {
    let ways = [(true, false), (false, true), (true, true)];
    let open = |(read, write): (bool, bool)| {
        OpenOptions::new().read(read).write(write).custom_flags(libc::O_NONBLOCK).open(path).ok()
    };
    let opened: Vec<File> = ways.into_iter().filter_map(open).collect();
    for file in &opened {
        // A second descriptor of the file can have only a shared lock, or none.
        for operation in [FlockOperation::NonBlockingLockShared, FlockOperation::NonBlockingLockExclusive] {
            let _ = flock(file, operation);
        }
        // A lock for reading needs a descriptor for reading, and so on.
        for kind in [libc::F_RDLCK, libc::F_WRLCK] {
            let _ = lock_record(file, kind);
        }
    }
    opened
}

/// Locks a whole file by an open file description lock.
fn lock_record(file: &File, kind: libc::c_int) -> std::io::Result<()> {
    // SAFETY: a struct flock consists of integers, for which zero is a valid value: all of the file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    // SAFETY: the structure lives until the call returns.
    match unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Lets every user read the configurations and list their folders, as below `/etc`. Key files stay as they are.
///
/// # Errors
/// A mode cannot be set.
pub fn expose_configurations(lab: &Lab) -> Result<()> {
    for site in &lab.sites {
        let open = Permissions::from_mode(0o755);
        for above in site.config.ancestors().skip(1).take_while(|path| path.starts_with(lab.dir())) {
            fs::set_permissions(above, open.clone())?;
        }
        fs::set_permissions(&site.config, Permissions::from_mode(0o644))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forged_report_is_as_long_as_a_probe() {
        for at in [0, 1, 107, 108, 5_000] {
            assert_eq!(Flood::Reports.message(at).len(), PROBE);
            assert!(Flood::Truncated.message(at).len() < PROBE && Flood::Pings.message(at).len() != PROBE);
        }
    }

    #[test]
    fn nobody_has_no_privilege() {
        let ns = Netns::new("nobody").expect("needs root");
        let refused = as_nobody(&ns, || Ok(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").is_err())).unwrap();
        assert!(refused && rustix::process::geteuid().is_root());
    }
}
