//! Network namespaces that clean up after themselves.
//!
//! `setns(2)` enters a namespace, never `ip netns exec`: that command remounts `/sys`, which hides every pin below
//! `/sys/fs/bpf`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::log;

/// The directory where `ip netns` looks for names.
const NAMES: &str = "/run/netns";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Makes a name that no other lab uses, in this process or in another one.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// A network namespace with its loopback up. Dropping this value removes the namespace and every link in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    fd: OwnedFd,
    /// This value made the namespace and must remove its name.
    ours: bool,
}

impl Netns {
    /// Makes a namespace `PREFIX-PID-COUNTER` that `ip netns` can see.
    pub fn new(prefix: &str) -> Result<Self> {
        let name = unique(prefix);
        let fd = thread::spawn(create)
            .join()
            .expect("making a namespace does not panic")
            .with_context(|| format!("making network namespace {name}"))?;
        let ns = Self { name, fd, ours: true };
        ns.publish().with_context(|| format!("naming network namespace {}", ns.name))?;
        log::note(format!("[{}] namespace made", ns.name));
        ns.ip("link set lo up")?;
        Ok(ns)
    }

    /// The namespace of this thread, for reading. Dropping this value does not remove the namespace.
    pub fn current() -> Result<Self> {
        let fd = File::open("/proc/thread-self/ns/net").context("opening the current network namespace")?.into();
        Ok(Self { name: "the host's namespace".to_owned(), fd, ours: false })
    }

    /// The file name below `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    fn publish(&self) -> io::Result<()> {
        fs::create_dir_all(NAMES)?;
        File::create_new(self.path())?;
        mount_bind(format!("/proc/self/fd/{}", self.fd.as_raw_fd()), self.path())?;
        Ok(())
    }

    /// Runs `body` in a thread inside the namespace, and waits for it. A panic of `body` continues in the caller.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    enter(self.fd.as_fd()).expect("setns into our own namespace");
                    body()
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Starts `body` in a thread inside the namespace.
    pub fn spawn<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let fd = self.fd.try_clone().expect("duplicating a namespace's descriptor");
        thread::spawn(move || {
            enter(fd.as_fd()).expect("setns into our own namespace");
            drop(fd);
            body()
        })
    }

    /// Makes a command that will run inside the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.fd.try_clone().expect("duplicating a namespace's descriptor");
        // SAFETY: the closure makes one system call and touches no memory that another thread could hold locked.
        unsafe {
            command.pre_exec(move || enter(fd.as_fd()));
        }
        command
    }

    /// Runs a program inside the namespace and returns its standard output. An error contains its standard error.
    pub fn exec<S: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let mut command = self.command(program);
        command.args(args).stdin(Stdio::null());
        self.finish(&mut command, true)
    }

    /// As [`Netns::exec`], for a program that changes nothing. The log contains it only if it fails.
    pub fn query(&self, program: &str, words: &str) -> Result<String> {
        let mut command = self.command(program);
        command.args(words.split_whitespace()).stdin(Stdio::null());
        self.finish(&mut command, false)
    }

    /// As [`Netns::query`], for a program that reads commands from its standard input.
    pub fn query_batch(&self, program: &str, words: &str, commands: &[&str]) -> Result<String> {
        self.finish(&mut self.batch(program, words, commands)?, false)
    }

    /// Runs several `ip` or `tc` commands in one process, up to the first that fails. Starting a process is slow in an
    /// emulated machine.
    pub fn apply(&self, program: &str, commands: &[String]) -> Result<()> {
        for command in commands {
            log::note(format!("[{}] $ {program} {command} (batch)", self.name));
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        self.finish(&mut self.batch(program, "-batch -", &commands)?, true).map(drop)
    }

    fn batch(&self, program: &str, words: &str, commands: &[&str]) -> Result<Command> {
        let (reader, mut writer) = io::pipe()?;
        // A pipe holds 64 KiB, which is more than any batch here.
        writer.write_all(commands.join("\n").as_bytes())?;
        let mut command = self.command(program);
        command.args(words.split_whitespace()).stdin(reader);
        Ok(command)
    }

    /// Runs `ip WORDS…`. The words are split at white space.
    pub fn ip(&self, words: &str) -> Result<String> {
        self.exec("ip", words.split_whitespace())
    }

    /// Runs `tc WORDS…`. The words are split at white space.
    pub fn tc(&self, words: &str) -> Result<String> {
        self.exec("tc", words.split_whitespace())
    }

    /// Writes a kernel setting, such as `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        log::note(format!("[{}] sysctl {key}={value}", self.name));
        self.run(|| fs::write(Path::new("/proc/sys").join(key), value))
            .with_context(|| format!("writing {key} = {value} in {}", self.name))
    }

    fn finish(&self, command: &mut Command, log_success: bool) -> Result<String> {
        let words: Vec<OsString> =
            std::iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_owned).collect();
        let line = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
        let output = command
            .output()
            .with_context(|| format!("starting `{line}` in {}: is the program installed?", self.name))?;
        let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if log_success || !output.status.success() {
            log::note(format!("[{}] $ {line} -> {} {complaint}", self.name, output.status.code().unwrap_or(-1)));
        }
        if !output.status.success() {
            bail!("`{line}` in {}: {}: {complaint}", self.name, output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("what happened in {}:", self.name);
            for line in log::lines(&[&self.name]) {
                eprintln!("  {line}");
            }
        }
        if !self.ours {
            return;
        }
        let path = self.path();
        // A lazy unmount: a descriptor that is still open elsewhere cannot keep the name.
        if let Err(e) = unmount(&path, UnmountFlags::DETACH) {
            eprintln!("unmounting {}: {e}", path.display());
        }
        if let Err(e) = fs::remove_file(&path) {
            eprintln!("removing {}: {e}", path.display());
        }
    }
}

/// Makes a namespace and returns a descriptor of it. The calling thread moves into it, and must end right after.
fn create() -> io::Result<OwnedFd> {
    // SAFETY: only the network namespace of this short-lived thread changes. No memory or descriptors are unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

fn enter(ns: BorrowedFd<'_>) -> io::Result<()> {
    Ok(move_into_link_name_space(ns, Some(LinkNameSpaceType::Network))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_lives_as_long_as_its_guard() {
        let ns = Netns::new("guard").expect("needs root");
        let path = ns.path();
        ns.ip("link add guard0 type veth peer name guard1").unwrap();
        let seen = ns.run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        assert!(seen.contains("guard0") && seen.contains("guard1"), "{seen}");
        assert!(!fs::read_to_string("/proc/self/net/dev").unwrap().contains("guard0"));
        assert!(ns.exec("ip", ["netns", "list"]).unwrap().contains(ns.name()));
        assert!(path.exists());
        drop(ns);
        assert!(!path.exists());
    }

    #[test]
    fn a_failing_command_names_itself_and_its_complaint() {
        let ns = Netns::new("fails").expect("needs root");
        let error = ns.ip("link set nothere up").unwrap_err().to_string();
        assert!(error.contains("ip link set nothere up") && error.contains("nothere"), "{error}");
        assert!(log::lines(&[ns.name()]).iter().any(|line| line.contains("ip link set nothere up")));
    }

    #[test]
    fn sysctls_belong_to_the_namespace() {
        let read = || fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        let (a, b) = (Netns::new("sysctl").unwrap(), Netns::new("sysctl").unwrap());
        a.sysctl("net/ipv4/ip_forward", "1").unwrap();
        b.sysctl("net/ipv4/ip_forward", "0").unwrap();
        assert_eq!((a.run(read).trim(), b.run(read).trim()), ("1", "0"));
    }
}
