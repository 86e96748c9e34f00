//! Runs the real `ecmpvpn` program inside a gateway's namespace.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;

use super::lab::Site;
use crate::log;
use crate::netns::unique;

/// How long `run` may take to come up or to take everything down.
const PATIENCE: Duration = Duration::from_secs(90);

/// The program under test: `ECMPVPN_BIN`, or else the one that cargo put beside this program.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("ECMPVPN_BIN") {
        return fs::canonicalize(&path).with_context(|| format!("ECMPVPN_BIN={}", PathBuf::from(&path).display()));
    }
    let here = env::current_exe()?;
    let beside = here.ancestors().skip(1).take(2).map(|dir| dir.join("ecmpvpn")).find(|path| path.is_file());
    beside.context("there is no ecmpvpn program beside this one: run `cargo build`, or set ECMPVPN_BIN")
}

/// `ecmpvpn WORDS… -c FILE` in the gateway's namespace. Files `hosts` and `resolv.conf` beside FILE replace those in
/// `/etc`.
pub(super) fn command(site: &Site, binary: &Path, words: &[&str]) -> Command {
    let mut command = site.gateway.command(binary);
    command.args(words).arg("-c").arg(&site.config).stdin(Stdio::null());
    // The program must not outlive a lab that is killed. The kernel sends the signal when the thread that started the
    // program ends, so that thread must last as long as the lab.
    // SAFETY: the closure makes one system call, which touches no memory.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?));
    }
    let names = ["hosts", "resolv.conf"].map(|name| (site.config.with_file_name(name), Path::new("/etc").join(name)));
    let replaced: Vec<(PathBuf, PathBuf)> = names.into_iter().filter(|(file, _)| file.exists()).collect();
    if !replaced.is_empty() {
        // SAFETY: the closure makes a few system calls in a process with one thread, which shares no memory or
        // descriptors.
        unsafe {
            command.pre_exec(move || {
                unshare_unsafe(UnshareFlags::NEWNS)?;
                mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
                replaced.iter().try_for_each(|(file, place)| Ok(mount_bind(file, place)?))
            });
        }
    }
    command
}

/// Runs a command that ends by itself. Returns its exit code, standard output and standard error.
pub(super) fn once(site: &Site, binary: &Path, words: &[&str]) -> Result<(i32, String, String)> {
    let output = command(site, binary, words)
        .output()
        .with_context(|| format!("starting {}: build it, or correct ECMPVPN_BIN", binary.display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap_or(-1);
    let complaint = text(&output.stderr);
    if code != 0 {
        log::note(format!("[{}] $ ecmpvpn {} -> {code} {complaint}", site.gateway.name(), words.join(" ")));
    }
    Ok((code, text(&output.stdout), complaint))
}

/// `ecmpvpn policy batch -` at one site: one process makes all changes and queries. It ends when this value is dropped.
#[derive(Debug)]
pub struct Batch {
    child: Child,
    lines: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    complaints: PathBuf,
}

impl Batch {
    pub(super) fn start(site: &Site, binary: &Path, dir: &Path) -> Result<Self> {
        let complaints = dir.join(unique("batch"));
        let mut child = command(site, binary, &["policy", "batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&complaints)?)
            .spawn()
            .context("starting ecmpvpn policy batch")?;
        let lines = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("its standard output is a pipe")?);
        Ok(Self { child, lines, answers, complaints })
    }

    /// Sends one line and returns what `policy show` reports after it.
    ///
    /// # Errors
    /// `policy batch` gave no answer that can be read.
    pub fn change(&mut self, line: &str) -> Result<Value> {
        let mut ask = || -> Result<Value> {
            let lines = self.lines.as_mut().context("the process is being ended")?;
            write!(lines, "{line}\nshow --json\n")?;
            let answer = serde_json::Deserializer::from_reader(&mut self.answers).into_iter().next();
            Ok(answer.context("the process gave no answer")??)
        };
        ask().with_context(|| {
            let complaints = fs::read_to_string(&self.complaints).unwrap_or_default();
            format!("`policy batch`, line {line:?}: {complaints}")
        })
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // The process ends at the end of its input.
        self.lines = None;
        let _ = self.child.wait();
    }
}

/// `ecmpvpn run` at one site. It is killed when this value is dropped.
#[derive(Debug)]
pub struct Running {
    site: String,
    child: Child,
    output: PathBuf,
    /// `ecmpvpn stats --json` with its output discarded. Only the exit code is used.
    probe: Command,
}

impl Running {
    pub(super) fn start(
        site: &Site,
        binary: &Path,
        dir: &Path,
        options: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Self> {
        let output = dir.join(unique("run"));
        let file = File::create(&output)?;
        // A lab has no terminal. Both outputs go into a file, from which a failing test prints them.
        let child = command(site, binary, &[&["run"], options].concat())
            .envs(env.iter().copied())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}: build it, or correct ECMPVPN_BIN", binary.display()))?;
        log::note(format!("[{}] $ ecmpvpn run & pid {}", site.gateway.name(), child.id()));
        let mut probe = command(site, binary, &["stats", "--json"]);
        probe.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { site: site.name.clone(), child, output, probe })
    }

    pub fn site(&self) -> &str {
        &self.site
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All output so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// The exit status, or `None` while the program runs.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("looking at `ecmpvpn run` of {}", self.site))
    }

    /// Waits until the output contains `words`.
    pub fn wait_until_said(&mut self, words: &str) -> Result<()> {
        let start = Instant::now();
        while !self.output().contains(words) {
            if let Some(status) = self.child.try_wait()? {
                bail!("`ecmpvpn run` of {} ended with {status}:\n{}", self.site, self.output());
            }
            if start.elapsed() > PATIENCE {
                bail!("`ecmpvpn run` of {} has not printed {words:?}:\n{}", self.site, self.output());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until `ecmpvpn stats` succeeds, which means that everything is in place.
    pub fn wait_until_up(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("`ecmpvpn run` of {} ended with {status}:\n{}", self.site, self.output());
            }
            if self.probe.status()?.success() {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                bail!("`ecmpvpn run` of {} is not up after {PATIENCE:?}:\n{}", self.site, self.output());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Sends `signal`, as Ctrl-C or a service manager would, and waits for the end.
    pub fn stop(mut self, signal: Signal) -> Result<ExitStatus> {
        self.signal(signal)?;
        self.wait()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        log::note(format!("kill -{} {} ({})", signal.as_raw(), pid, self.site));
        kill_process(pid, signal).with_context(|| format!("signalling `ecmpvpn run` of {}", self.site))
    }

    /// Waits until the program has ended by itself.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("`ecmpvpn run` of {} has not ended after {PATIENCE:?}:\n{}", self.site, self.output())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("ecmpvpn run of {} wrote:\n{}", self.site, self.output());
        }
        let killed: io::Result<()> = self.child.kill();
        if killed.is_ok() {
            // The program has ended, or ends now: this does not block for long.
            let _ = self.child.wait();
        }
    }
}
