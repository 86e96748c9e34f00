//! One run of the virtual machine: starts QEMU, passes its output on, and finds how it ended.
//!
//! The kernel's messages, the command's output and PID 1's reports use three separate channels. So output cannot be
//! taken for a report, and a kernel message cannot be taken for output.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::accel::Accel;
use super::death::{Died, is_stale_code};
use super::{initramfs, kernel};
use crate::sh;

/// After this time a boot counts as hung. An emulated boot takes 4 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// The same with KVM. A boot takes a second if KVM works. A nested KVM that does not work hangs.
const KVM_BOOT_LIMIT: Duration = Duration::from_secs(10);
/// Time limit for powering off after the command has ended.
const OFF_LIMIT: Duration = Duration::from_secs(10);
/// The emulated processor: the simplest one, with random numbers for the boot. With everything that QEMU can emulate
/// (`max`) the kernel chooses its AVX ciphers and `rep movsb`, which are slow when emulated: WireGuard carried 40
/// Mbit/s instead of 120 with this processor, and a veth pair 1.2 Gbit/s instead of 3.7.
const EMULATED_CPU: &str = "qemu64,+rdrand,+rdseed";
/// Boots to try. Rarely, an emulated boot dies in idle code.
const BOOTS: u32 = 3;

/// What to run, and on what.
#[derive(Debug, Clone)]
pub struct Request {
    pub series: kernel::Series,
    pub cpus: u32,
    pub memory_mib: u32,
    /// For the command alone, without the boot.
    pub timeout: Duration,
    /// Source on this host, destination in the virtual machine.
    pub copies: Vec<(PathBuf, PathBuf)>,
    /// `KEY=VALUE` for the command.
    pub env: Vec<String>,
    /// Empty: an interactive shell.
    pub command: Vec<String>,
}

/// How one boot ended.
enum End {
    /// The command ran and exited with this status.
    Exited(i32),
    /// The machine died before the command had printed anything: another boot is tried.
    Died(String),
}

enum Event {
    Output(Vec<u8>),
    Report(String),
    /// A line that QEMU itself printed.
    Qemu(String),
    Closed,
}

/// Gets the command's output as it arrives.
pub type Sink<'a> = dyn FnMut(&[u8]) -> io::Result<()> + 'a;

/// Runs `request` and passes the command's output to `sink` as it arrives; returns the command's exit status.
pub fn run(request: &Request, dir: &Path, accel: Accel, sink: &mut Sink<'_>) -> Result<i32> {
    run_boots(request, dir, accel, BOOTS, sink)
}

fn run_boots(request: &Request, dir: &Path, accel: Accel, boots: u32, sink: &mut Sink<'_>) -> Result<i32> {
    let kernel = kernel::get(request.series, dir)?;
    let base = initramfs::base(&kernel, dir)?;
    let run_dir = RunDir::new(dir)?;
    let nonce = nonce()?;
    let interactive = request.command.is_empty();
    let (rows, columns) = terminal_size();
    let files = [("init", initramfs::init(&nonce, &rows, &columns)), ("vm/command", script(request)?)];
    let extra = initramfs::extra(dir, &run_dir.0, &request.copies, &files)?;
    let initrd = run_dir.0.join("initrd");
    let mut joined = File::create(&initrd)?;
    for part in [&base, &extra] {
        io::copy(&mut File::open(part)?, &mut joined)?;
    }
    drop(joined);

    let console = run_dir.0.join("console.log");
    let mut last = String::new();
    for boot in 1..=boots {
        let boot_limit = if accel == Accel::Kvm { KVM_BOOT_LIMIT } else { BOOT_LIMIT };
        let mut qemu = command(request, &kernel.image, &initrd, &console, accel);
        let end = if interactive {
            attended(&mut qemu)
        } else {
            unattended(&mut qemu, request, &nonce, &console, boot_limit, sink)
        };
        let kept = dir.join("console.log");
        if console.exists() {
            fs::rename(&console, &kept)?;
        }
        match end? {
            End::Exited(status) => return Ok(status),
            End::Died(why) => {
                sh::note(format!(
                    "boot {boot} of {boots} on {}: {why}; kernel messages: {}",
                    kernel.package,
                    kept.display()
                ));
                last = why;
            }
        }
    }
    bail!("the virtual machine died {boots} times before the command printed anything: {last}")
}

/// Whether a machine boots and runs `request` at the first try.
pub fn boots(request: &Request, dir: &Path, accel: Accel) -> bool {
    run_boots(request, dir, accel, 1, &mut |_| Ok(())).is_ok_and(|status| status == 0)
}

/// The command's environment and words as a shell script.
fn script(request: &Request) -> Result<String> {
    let mut lines = Vec::new();
    for variable in &request.env {
        let (key, value) = variable.split_once('=').with_context(|| format!("--env {variable}: expected KEY=VALUE"))?;
        lines.push(format!("export {key}={}\n", sh::quote(value)));
    }
    let words: Vec<String> = request.command.iter().map(|word| sh::quote(word)).collect();
    lines.push(if words.is_empty() { "exec bash -i\n".to_owned() } else { format!("exec {}\n", words.join(" ")) });
    Ok(lines.concat())
}

fn command(request: &Request, image: &Path, initrd: &Path, console: &Path, accel: Accel) -> Command {
    let interactive = request.command.is_empty();
    // setpriv: QEMU is killed when this process ends, however it ends.
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]);
    qemu.args(["-no-reboot", "-nic", "none"]);
    qemu.args(match accel {
        Accel::Kvm => ["-accel", "kvm", "-cpu", "max"],
        Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU],
    });
    qemu.args(["-smp", &request.cpus.to_string(), "-m", &request.memory_mib.to_string()]);
    qemu.arg("-kernel").arg(image).arg("-initrd").arg(initrd);
    // no_timer_check: on a busy machine the emulated timer may fail the kernel's check, and the kernel would panic.
    // An oops ends the run: later output could not be trusted.
    let mut append =
        "console=ttyS0 panic=-1 oops=panic mitigations=off no_timer_check random.trust_cpu=on init_on_alloc=0"
            .to_owned();
    if interactive {
        append.push_str(" vm.interactive");
    }
    qemu.arg("-append").arg(append);
    qemu.arg("-chardev").arg(format!("file,id=console,path={}", escaped(console))).args(["-serial", "chardev:console"]);
    qemu.args(["-device", "virtio-serial-pci"]);
    if interactive {
        qemu.args(["-chardev", "stdio,id=out,signal=off", "-device", "virtconsole,chardev=out"]);
    } else {
        qemu.args(["-chardev", "file,id=out,path=/dev/stdout"]);
        qemu.args(["-device", "virtserialport,chardev=out,name=out"]);
    }
    qemu.args(["-chardev", "file,id=control,path=/dev/stderr"]);
    qemu.args(["-device", "virtserialport,chardev=control,name=control"]);
    qemu
}

/// A path, escaped for QEMU's option syntax.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn attended(qemu: &mut Command) -> Result<End> {
    sh::note("a shell in the virtual machine; `exit` ends it");
    let output =
        qemu.stderr(Stdio::piped()).spawn().and_then(Child::wait_with_output).map_err(|error| no_qemu(&error))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match said.lines().rev().find_map(|line| line.trim_end().rsplit_once(" exit ")?.1.parse().ok()) {
        Some(status) => Ok(End::Exited(status)),
        None => bail!("the virtual machine reported no exit status ({}): {}", output.status, sh::tail(&said, 5)),
    }
}

fn no_qemu(error: &io::Error) -> anyhow::Error {
    anyhow::anyhow!("starting qemu-system-x86_64: {error}; `cargo xtask setup` installs it")
}

fn unattended(
    qemu: &mut Command,
    request: &Request,
    nonce: &str,
    console: &Path,
    boot_limit: Duration,
    sink: &mut Sink<'_>,
) -> Result<End> {
    let child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| no_qemu(&error))?;
    let mut child = Killed(child);
    let (sender, events) = mpsc::channel();
    if let (Some(out), Some(err)) = (child.0.stdout.take(), child.0.stderr.take()) {
        let reports = sender.clone();
        let nonce = format!("{nonce} ");
        thread::spawn(move || read_output(out, &sender));
        thread::spawn(move || read_reports(err, &nonce, &reports));
    }

    let mut deadline = Instant::now() + boot_limit;
    let (mut started, mut printed, mut status, mut qemu_said) = (false, false, None, String::new());
    loop {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Output(bytes)) => {
                printed = true;
                sink(&bytes).context("passing on the command's output")?;
            }
            Ok(Event::Report(report)) if report == "start" => {
                started = true;
                deadline = Instant::now() + request.timeout;
            }
            Ok(Event::Report(report)) => {
                let code = report.strip_prefix("exit ").and_then(|code| code.parse::<i32>().ok());
                status = Some(code.with_context(|| format!("PID 1 reported `{report}`"))?);
                deadline = Instant::now() + OFF_LIMIT;
            }
            Ok(Event::Qemu(line)) => {
                qemu_said.push_str(&line);
                qemu_said.push('\n');
            }
            // One reader has ended. The channel is disconnected when the second one has ended too.
            Ok(Event::Closed) => {}
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if status.is_some() => break,
            Err(RecvTimeoutError::Timeout) if !started => {
                return Ok(End::Died(format!("it did not boot within {} s", boot_limit.as_secs())));
            }
            Err(RecvTimeoutError::Timeout) => bail!(
                "the command in the virtual machine took longer than {} s (--timeout); kernel messages end with:\n{}",
                request.timeout.as_secs(),
                sh::tail(&console_text(console), 5)
            ),
        }
    }
    if let Some(status) = status {
        return Ok(End::Exited(status));
    }
    // Without a kernel message QEMU itself failed, and another try would fail too.
    let text = console_text(console);
    ensure!(!text.is_empty(), "QEMU failed: {}", sh::tail(&qemu_said, 5));
    let why = panic_line(&text).unwrap_or_else(|| format!("it ended without a panic: {}", sh::tail(&qemu_said, 1)));
    if printed {
        let by_stale_code = is_stale_code(&text);
        return Err(Died { why: format!("{why}\n{}", sh::tail(&text, 25)), by_stale_code }.into());
    }
    Ok(End::Died(why))
}

fn read_output(mut from: impl Read, to: &Sender<Event>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.send(Event::Output(buffer[..length].to_vec())).is_err() {
            return;
        }
    }
    let _ = to.send(Event::Closed);
}

fn read_reports(from: impl Read, nonce: &str, to: &Sender<Event>) {
    for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        let event = line.strip_prefix(nonce).map(|report| Event::Report(report.to_owned()));
        if to.send(event.unwrap_or(Event::Qemu(line))).is_err() {
            return;
        }
    }
    let _ = to.send(Event::Closed);
}

fn console_text(console: &Path) -> String {
    fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The line in which the kernel says why it panicked, without its time stamp.
pub fn panic_line(console: &str) -> Option<String> {
    let line = console.lines().find(|line| line.contains("Kernel panic"))?;
    Some(line[line.find("Kernel panic")?..].trim_end().to_owned())
}

/// Writes to stdout and flushes it.
pub fn to_stdout(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// Kills the child when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory for one run's files, named after this process. Making it also removes those of dead processes.
pub struct RunDir(PathBuf);

impl RunDir {
    /// A new one below `dir`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(dir: &Path) -> Result<Self> {
        let runs = dir.join("runs");
        fs::create_dir_all(&runs)?;
        for entry in fs::read_dir(&runs)?.flatten() {
            let pid = entry.file_name().to_string_lossy().split('-').next().unwrap_or_default().to_owned();
            if !Path::new("/proc").join(&pid).exists() {
                // Another process may be removing it too.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let prefix = format!("{}-", std::process::id());
        Ok(Self(tempfile::Builder::new().prefix(&prefix).tempdir_in(&runs)?.keep()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn nonce() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("reading a random number")?;
    Ok(uuid.trim().replace('-', ""))
}

/// Rows and columns of the terminal, for the interactive shell.
fn terminal_size() -> (String, String) {
    let size = Command::new("stty").arg("size").stdin(Stdio::inherit()).stderr(Stdio::null()).output();
    let text = size.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    match text.split_once(' ') {
        Some((rows, columns)) => (rows.to_owned(), columns.to_owned()),
        None => ("24".to_owned(), "80".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_panic_line_is_found() {
        let console =
            "[    0.1] booting\n[    1.2] Kernel panic - not syncing: Attempted to kill the idle task!\r\nend\n";
        assert_eq!(panic_line(console).unwrap(), "Kernel panic - not syncing: Attempted to kill the idle task!");
        assert_eq!(panic_line("fine"), None);
    }

    #[test]
    fn words_and_environment_are_quoted_in_the_script() {
        let request = Request {
            series: kernel::Series::V6_12,
            cpus: 1,
            memory_mib: 512,
            timeout: Duration::from_secs(1),
            copies: Vec::new(),
            env: vec!["A=b c".to_owned()],
            command: ["echo", "it's $x"].map(str::to_owned).to_vec(),
        };
        assert_eq!(script(&request).unwrap(), "export A='b c'\nexec echo 'it'\\''s $x'\n");
        assert!(script(&Request { env: vec!["A".to_owned()], ..request }).is_err());
    }

    #[test]
    fn only_lines_with_the_nonce_are_reports() {
        let (sender, events) = mpsc::channel();
        read_reports(&b"n0 start\nqemu: warning\nn0 exit 3\nexit 0\n"[..], "n0 ", &sender);
        drop(sender);
        let reports: Vec<String> = events
            .iter()
            .filter_map(|event| if let Event::Report(report) = event { Some(report) } else { None })
            .collect();
        assert_eq!(reports, ["start", "exit 3"]);
    }
}
