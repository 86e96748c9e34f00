//! The run directory of a site: its lock, and the paths of the files in it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

const JOURNAL: &str = "journal.json";
const RELOAD: &str = "reload.json";
const UNCONFIRMED: &str = "unconfirmed";
const APPLIED: &str = "applied.json";

/// The standard root. Each site has a directory below.
pub const RUN_ROOT: &str = "/run/ecmpvpn";

/// Why the run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    #[error("ecmpvpn is already running for {site} (pid {pid}): stop it with `ecmpvpn down -c …`")]
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
    /// Takes the lock of `site`. `root` is usually [`RUN_ROOT`].
    pub fn lock(root: &Path, site: &str) -> Result<Self, RunDirError> {
        let dir = root.join(site);
        loop {
            fs::create_dir_all(&dir).map_err(io_error("creating", &dir))?;
            let path = dir.join("lock");
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let mut lock = match options.open(&path) {
                // A process that just ended has removed the directory.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(io_error("opening", &path))?,
            };
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(RunDirError::AlreadyRunning { site: site.to_owned(), pid: read_pid(&mut lock) });
                }
                Err(e) => return Err(io_error("locking", &path)(e.into())),
            }
            // The previous holder may have removed the file after this process opened it. Then the lock is worthless:
            // try again.
            let same = fs::metadata(&path).is_ok_and(|now| lock.metadata().is_ok_and(|ours| ours.ino() == now.ino()));
            if !same {
                continue;
            }
            let pid = std::process::id().to_string();
            lock.set_len(0).and_then(|()| lock.write_all(pid.as_bytes())).map_err(io_error("writing", &path))?;
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

    /// The process that runs `site`, if there is one.
    pub fn holder(root: &Path, site: &str) -> Result<Option<Holder>, RunDirError> {
        let path = root.join(site).join("lock");
        let mut lock = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io_error("opening", &path))?,
        };
        let pid = read_pid(&mut lock);
        let Some(process) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            return Ok(None);
        };
        // The pidfd now refers to one process. Check that a process still has the lock: the pid may have been reused.
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(Holder { pid, process })),
            Ok(()) => Ok(None),
            Err(e) => Err(io_error("locking", &path)(e.into())),
        }
    }

    /// Removes the directory. Call it when nothing is left to undo.
    pub fn remove(self) -> Result<(), RunDirError> {
        let dir = self.path();
        for name in [JOURNAL, RELOAD, UNCONFIRMED, APPLIED, "lock"] {
            let path = dir.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("removing", &path)(e)),
                _ => {}
            }
        }
        // Fails, as it should, if there are other files or other sites in the directory.
        let _ = fs::remove_dir(&dir);
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

/// Sends SIGTERM to the holder of the lock, and returns its pid. `None`: it is gone already.
fn terminate(root: &Path, site: &str, pid: i32) -> Option<i32> {
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    // The pidfd now refers to one process. Check again that it has the lock: the pid may have been reused meanwhile.
    match RunDir::lock(root, site) {
        Err(RunDirError::AlreadyRunning { pid: holder, .. }) if holder == pid => {
            pidfd_send_signal(&process, Signal::TERM).ok().map(|()| pid)
        }
        _ => None,
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::Io { operation, path, source }
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
            "ecmpvpn is already running for site-a (pid {}): stop it with `ecmpvpn down -c …`",
            std::process::id()
        );
        assert_eq!(second.to_string(), expected);
        RunDir::lock(root.path(), "site-b").expect("another site is another lock");
        drop(first);
        RunDir::lock(root.path(), "site-a").expect("the lock ends with its holder");
    }

    #[test]
    fn remove_leaves_nothing_but_other_peoples_files() {
        let root = tempfile::tempdir().unwrap();
        let run_root = root.path().join("run");
        let a = RunDir::lock(&run_root, "site-a").unwrap();
        let b = RunDir::lock(&run_root, "site-b").unwrap();
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
        // `exec` keeps the pid that is written, and with it the locked descriptor 9.
        let script = format!("exec 9>>{0}; flock 9; echo $$ > {0}; echo locked; exec sleep 60", lock.display());
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
