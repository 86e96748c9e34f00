//! The run directory of a site: its lock, and the paths of the files in it.
//!
//! Only the owner may enter the directory or open the lock. Whoever can open a file can hold a lock on it, so that others
//! could keep `run` and `down` from working.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::config::is_site_name;
use crate::{fault, file};

const JOURNAL: &str = "journal.json";
const RELOAD: &str = "reload.json";
const UNCONFIRMED: &str = "unconfirmed";
const UNCONFIRMED_RELOAD: &str = "unconfirmed-reload";
const APPLIED: &str = "applied.json";
/// The start of the names of the files that request a reload. The number of the request follows.
const REQUEST: &str = "request-";

/// The standard root. Each site has a directory below.
pub const RUN_ROOT: &str = "/run/ecmpvpn";

/// Why the run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    #[error(
        "{site} is already running (pid {pid}): `ecmpvpn reload` applies a changed configuration, `ecmpvpn down` stops it"
    )]
    AlreadyRunning {
        site: String,
        /// The process that runs it; 0 if it has not written its pid yet.
        pid: i32,
    },
    #[error("{operation} {}", .path.display())]
    Io {
        /// For example `opening`.
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "pid {pid} was asked to stop {site}, but still runs after {seconds} s: look at its log, or end it yourself"
    )]
    DoesNotStop { site: String, pid: i32, seconds: u64 },
}

/// The run directory of one site, locked until this is dropped. Dropping it leaves the files; [`RunDir::remove`]
/// removes them.
#[derive(Debug)]
pub struct RunDir {
    site: String,
    root: PathBuf,
    lock: File,
}

impl RunDir {
    /// Makes the directory that has the run directories of all sites. `root` is usually [`RUN_ROOT`].
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_root(root: &Path) -> io::Result<()> {
        make_private(root)
    }

    /// Takes the lock of `site`. `root` is usually [`RUN_ROOT`].
    pub fn lock(root: &Path, site: &str) -> Result<Self, RunDirError> {
        let dir = root.join(site);
        loop {
            match make_private(root).and_then(|()| make_private(&dir)) {
                // A process that just ended has removed the directory.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                made => made.map_err(io_error("creating", &dir))?,
            }
            fault::point("made the run directory");
            let path = dir.join("lock");
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let is_made = if path.exists() { Ok(()) } else { fault::write("making the lock") };
            let mut lock = match is_made.and_then(|()| options.open(&path)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => {
                    // These stay if they are not empty.
                    let _ = fs::remove_dir(&dir).and_then(|()| fs::remove_dir(root));
                    return Err(io_error("opening", &path)(e));
                }
                Ok(lock) => lock,
            };
            fault::point("made the lock");
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    if others_may_open(&lock) {
                        // An earlier version made it so. Somebody without privilege may hold it.
                        replace(&path, &lock)?;
                        continue;
                    }
                    let pid = lock_holder(&lock).unwrap_or_else(|| read_pid(&mut lock));
                    return Err(RunDirError::AlreadyRunning { site: site.to_owned(), pid });
                }
                Err(e) => return Err(io_error("locking", &path)(e.into())),
            }
            // The previous holder may have removed the file after this process opened it. Then the lock is worthless:
            // try again.
            if !is_still(&path, &lock) {
                continue;
            }
            let pid = std::process::id().to_string();
            lock.set_permissions(Permissions::from_mode(0o600)).map_err(io_error("setting the mode of", &path))?;
            // The kernel knows who holds the lock. On a full disk the number is missing, and `down` works nevertheless.
            let written = fault::write("writing the pid").and_then(|()| lock.set_len(0));
            if let Err(error) = written.and_then(|()| lock.write_all(pid.as_bytes())) {
                tracing::debug!("writing {}: {error}", path.display());
            }
            return Ok(Self { site: site.to_owned(), root: root.to_owned(), lock });
        }
    }

    /// As [`RunDir::lock`]. If another process holds the lock, sends it SIGTERM and waits until it ends, at most
    /// `patience`. Also returns the pid of the process that was stopped, if any. Blocks.
    pub fn lock_stopping(root: &Path, site: &str, patience: Duration) -> Result<(Self, Option<i32>), RunDirError> {
        let deadline = Instant::now() + patience;
        let mut stopped = None;
        loop {
            match Self::lock(root, site) {
                Ok(run_dir) => return Ok((run_dir, stopped)),
                Err(RunDirError::AlreadyRunning { pid, .. }) if Instant::now() < deadline => {
                    if stopped.is_none() {
                        stopped = terminate(root, site, pid);
                    }
                }
                Err(RunDirError::AlreadyRunning { site, pid }) if stopped.is_some() => {
                    return Err(RunDirError::DoesNotStop { site, pid, seconds: patience.as_secs() });
                }
                Err(e) => return Err(e),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn site(&self) -> &str {
        &self.site
    }

    pub fn path(&self) -> PathBuf {
        self.root.join(&self.site)
    }

    pub fn journal_path(&self) -> PathBuf {
        Self::journal_path_of(&self.root, &self.site)
    }

    /// The path of a site's journal. `root` is usually [`RUN_ROOT`].
    pub fn journal_path_of(root: &Path, site: &str) -> PathBuf {
        root.join(site).join(JOURNAL)
    }

    /// Where the running process writes the result of a reload.
    pub fn reload_path(root: &Path, site: &str) -> PathBuf {
        root.join(site).join(RELOAD)
    }

    /// The file that requests a reload under `number`. The running process removes it when it begins that reload.
    pub fn request_path(root: &Path, site: &str, number: u64) -> PathBuf {
        root.join(site).join(format!("{REQUEST}{number}"))
    }

    /// The numbers of the reloads that are requested.
    pub fn requests(root: &Path, site: &str) -> Vec<u64> {
        let entries = fs::read_dir(root.join(site)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix(REQUEST)?.parse().ok()).collect()
    }

    /// Where the running process writes what its configuration says.
    pub fn applied_path(root: &Path, site: &str) -> PathBuf {
        root.join(site).join(APPLIED)
    }

    /// As [`Self::unconfirmed_path`].
    pub fn unconfirmed(&self) -> PathBuf {
        Self::unconfirmed_path(&self.root, &self.site)
    }

    /// The file that exists while `run --confirm` waits to be confirmed.
    pub fn unconfirmed_path(root: &Path, site: &str) -> PathBuf {
        root.join(site).join(UNCONFIRMED)
    }

    /// The file that exists while a `reload --confirm` waits to be confirmed.
    pub fn unconfirmed_reload_path(root: &Path, site: &str) -> PathBuf {
        root.join(site).join(UNCONFIRMED_RELOAD)
    }

    /// The process that runs `site`, if there is one.
    pub fn holder(root: &Path, site: &str) -> Result<Option<Holder>, RunDirError> {
        let path = root.join(site).join("lock");
        let lock = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io_error("opening", &path))?,
        };
        Ok(lock_holder(&lock).and_then(|pid| Holder::open(&lock, pid)))
    }

    /// The sites that have a run directory: they are up, or something of them is left to undo.
    pub fn sites(root: &Path) -> Vec<String> {
        let names = fs::read_dir(root).into_iter().flatten().flatten().filter_map(|entry| {
            let is_site = [JOURNAL, "lock"].iter().any(|file| entry.path().join(file).exists());
            entry.file_name().into_string().ok().filter(|name| is_site && is_site_name(name))
        });
        names.collect()
    }

    /// Removes the directory. Call it when nothing is left to undo.
    pub fn remove(self) -> Result<(), RunDirError> {
        let dir = self.path();
        for number in Self::requests(&self.root, &self.site) {
            // Who requested it sees that this process has ended.
            let _ = fs::remove_file(Self::request_path(&self.root, &self.site, number));
        }
        file::sweep(&dir);
        for name in [JOURNAL, RELOAD, UNCONFIRMED, UNCONFIRMED_RELOAD, APPLIED, "lock"] {
            let path = dir.join(name);
            fault::point("removing a file of the run directory");
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("removing", &path)(e)),
                _ => {}
            }
        }
        // Fails, as it should, if there are other files or other sites in the directory.
        fault::point("removing the run directory");
        let _ = fs::remove_dir(&dir);
        fault::point("removing the run root");
        let _ = fs::remove_dir(&self.root);
        drop(self.lock);
        Ok(())
    }
}

/// A process that runs a site.
#[derive(Debug)]
pub struct Holder {
    pub pid: i32,
    process: OwnedFd,
}

impl Holder {
    /// `None`: `pid` does not hold `lock` any more.
    fn open(lock: &File, pid: i32) -> Option<Self> {
        let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // The pidfd now refers to one process. Check again that it has the lock: the pid may have been reused meanwhile.
        (lock_holder(lock) == Some(pid)).then_some(Self { pid, process })
    }

    /// Asks it to read its configuration again.
    pub fn reload(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.process, Signal::HUP)?)
    }

    /// Kills it (SIGKILL).
    pub fn kill(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.process, Signal::KILL)?)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        // A pidfd is readable once the process has ended.
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

fn read_pid(lock: &mut File) -> i32 {
    let mut text = String::new();
    // May be empty for a moment: the holder writes its pid right after it took the lock.
    let _ = lock.read_to_string(&mut text);
    text.trim().parse().unwrap_or(0)
}

/// The process that holds `lock`, as the kernel knows it. It may have another pid namespace; then this is `None`.
/// Reads only: a lock that is taken in order to look at it keeps another process from taking it.
/// Source: `lock_get_status()`, fs/locks.c.
fn lock_holder(lock: &File) -> Option<i32> {
    let metadata = lock.metadata().ok()?;
    let device = rustix::fs::Dev::from(metadata.dev());
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // For example `3: FLOCK  ADVISORY  WRITE 1234 00:19:4711 0 EOF`. A waiting process has `->` after the number.
    locks.lines().find_map(|line| match line.split_whitespace().collect::<Vec<_>>().as_slice() {
        [_, "FLOCK", _, _, pid, on, ..] if *on == file => pid.parse().ok(),
        _ => None,
    })
}

/// Whether others than the owner may open the file.
fn others_may_open(lock: &File) -> bool {
    lock.metadata().is_ok_and(|metadata| others_may_use(&metadata))
}

fn others_may_use(metadata: &fs::Metadata) -> bool {
    metadata.mode() & 0o077 != 0
}

/// Makes a directory that only its owner may enter, or makes an existing one so.
fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    if others_may_use(&fs::metadata(dir)?) { fs::set_permissions(dir, Permissions::from_mode(0o700)) } else { Ok(()) }
}

/// Whether `file` is the one that is at `path` now.
fn is_still(path: &Path, file: &File) -> bool {
    fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|ours| ours.ino() == now.ino()))
}

/// Replaces a lock that others could open, unless a process of the same owner holds it.
fn replace(path: &Path, lock: &File) -> Result<(), RunDirError> {
    let owner = lock.metadata().map_err(io_error("reading", path))?.uid();
    let holder = lock_holder(lock);
    let privileged = |pid: i32| fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() == owner);
    if holder.is_some_and(privileged) {
        // From now on nobody else can open it.
        return lock.set_permissions(Permissions::from_mode(0o600)).map_err(io_error("setting the mode of", path));
    }
    if !is_still(path, lock) {
        return Ok(());
    }
    tracing::warn!("{} is held by a process of another user, and is replaced", path.display());
    fs::remove_file(path).map_err(io_error("replacing", path))
}

/// Sends SIGTERM to the holder of the lock, and returns its pid. `None`: it is gone already.
fn terminate(root: &Path, site: &str, pid: i32) -> Option<i32> {
    let holder = RunDir::holder(root, site).ok()??;
    (holder.pid == pid).then_some(())?;
    pidfd_send_signal(&holder.process, Signal::TERM).ok().map(|()| pid)
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::Io { operation, path, source: file::advised(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_process_that_holds_the_first() {
        let root = tempfile::tempdir().unwrap();
        let first = RunDir::lock(root.path(), "site-a").unwrap();
        let second = RunDir::lock(root.path(), "site-a").unwrap_err();
        let expected = format!(
            "site-a is already running (pid {}): `ecmpvpn reload` applies a changed configuration, `ecmpvpn down` stops it",
            std::process::id()
        );
        assert_eq!(second.to_string(), expected);
        RunDir::lock(root.path(), "site-b").expect("another site is another lock");
        drop(first);
        RunDir::lock(root.path(), "site-a").expect("the lock ends with its holder");
    }

    /// Finding A4: the directory had mode 0755 and the lock 0644.
    #[test]
    fn nobody_else_can_open_the_lock() {
        let root = tempfile::tempdir().unwrap();
        let (run_root, mode) = (root.path().join("run"), |path: &Path| fs::metadata(path).unwrap().mode() & 0o777);
        let dir = run_root.join("site-a");
        fs::create_dir_all(&dir).unwrap();
        let lock = File::create(dir.join("lock")).unwrap();
        for (path, mode) in [(run_root.as_path(), 0o755), (&dir, 0o755), (&dir.join("lock"), 0o644)] {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        let first = RunDir::lock(&run_root, "site-a").unwrap();
        assert_eq!([mode(&run_root), mode(&dir), mode(&dir.join("lock"))], [0o700, 0o700, 0o600]);
        assert!(RunDir::lock(&run_root, "site-a").is_err() && !others_may_open(&lock));
        drop(first);
    }

    /// Finding A15: looking for the holder took the lock for a moment.
    #[test]
    fn looking_for_the_holder_takes_no_lock() {
        let root = tempfile::tempdir().unwrap();
        assert!(RunDir::holder(root.path(), "site-a").unwrap().is_none());
        let first = RunDir::lock(root.path(), "site-a").unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(RunDir::holder(root.path(), "site-a").unwrap().map(|holder| holder.pid), Some(pid));
        drop(first);
        let looking = std::thread::spawn({
            let root = root.path().to_owned();
            move || (0..2_000).for_each(|_| drop(RunDir::holder(&root, "site-a").unwrap()))
        });
        while !looking.is_finished() {
            RunDir::lock(root.path(), "site-a").expect("nobody else takes the lock");
        }
        looking.join().unwrap();
        assert!(RunDir::holder(root.path(), "site-a").unwrap().is_none());
    }

    #[test]
    fn remove_leaves_nothing_but_other_peoples_files() {
        let root = tempfile::tempdir().unwrap();
        let run_root = root.path().join("run");
        let a = RunDir::lock(&run_root, "site-a").unwrap();
        let b = RunDir::lock(&run_root, "site-b").unwrap();
        fs::create_dir(run_root.join("empty")).unwrap();
        let mut sites = RunDir::sites(&run_root);
        sites.sort();
        assert_eq!(sites, ["site-a", "site-b"]);
        fs::remove_dir(run_root.join("empty")).unwrap();
        a.remove().unwrap();
        assert!(!run_root.join("site-a").exists() && run_root.join("site-b/lock").exists());
        b.remove().unwrap();
        assert!(!run_root.exists());
    }

    #[test]
    fn stopping_ends_the_holder_and_takes_its_lock() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("site-a");
        fs::create_dir_all(&dir).unwrap();
        let lock = dir.join("lock");
        // Without a fork, the process that locks the file is the one that is started.
        let script = format!("exec flock --no-fork {} sh -c 'echo locked; exec sleep 60'", lock.display());
        let mut holder = std::process::Command::new("bash")
            .args(["-c", &script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("bash and flock are there");
        let mut line = [0_u8; 7];
        holder.stdout.take().unwrap().read_exact(&mut line).unwrap();
        let pid = i32::try_from(holder.id()).unwrap();
        let (run_dir, stopped) =
            RunDir::lock_stopping(root.path(), "site-a", Duration::from_secs(10)).expect("the holder ends on SIGTERM");
        assert_eq!(stopped, Some(pid));
        assert!(!holder.wait().unwrap().success());
        run_dir.remove().unwrap();
    }
}
