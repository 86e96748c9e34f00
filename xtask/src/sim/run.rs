//! One run of the simulation: starts User-Mode Linux, passes the command's output on, and finds how it ended.
//!
//! Output and kernel messages go to files, so that a writer never waits. A signal from a pipe's reader would come at a
//! different moment in each run. The command and its exit status go through the run's directory, which has the same
//! name in the simulation in every run.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sh;
use crate::vm::kernel::Series;
use crate::vm::run::{RunDir, Sink, panic_line};

/// Time between two checks for output.
const LOOK: Duration = Duration::from_millis(10);
/// Simulated runs begin at this time, 2026-01-01 00:00 UTC; nanoseconds since 1970.
const BEGIN: u64 = 1_767_225_600_000_000_000;
const INIT: &str = include_str!("init.sh");

/// How time passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// As on this machine.
    Real,
    /// Time jumps from one event to the next. Random numbers come from `seed`.
    Simulated { seed: u64 },
}

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct Request {
    pub series: Series,
    pub clock: Clock,
    pub memory_mib: u32,
    /// In this machine's time, including the boot.
    pub timeout: Duration,
    /// `KEY=VALUE` for the command.
    pub env: Vec<String>,
    /// Empty: an interactive shell.
    pub command: Vec<String>,
}

/// Runs `request` on the kernel `linux`, with the run's files below `dir`; returns the command's exit status.
pub fn run(request: &Request, linux: &Path, dir: &Path, sink: &mut Sink<'_>) -> Result<i32> {
    let run_dir = RunDir::new(dir)?;
    let init = install_init(linux)?;
    fs::write(run_dir.path().join("command"), script(request)?)?;
    let here = std::env::current_dir().context("finding the current directory")?;
    let needed: Vec<String> = [here, sh::root(), sh::target()].map(|dir| format!("{}\n", dir.display())).into();
    fs::write(run_dir.path().join("needed"), needed.concat())?;
    let interactive = request.command.is_empty();
    let (out, console) = (run_dir.path().join("out"), run_dir.path().join("console.log"));
    let mut uml = command(request, linux, &init, run_dir.path());
    if interactive {
        sh::note("a shell in the simulation's kernel, in real time; `exit` ends it");
        uml.stderr(File::create(&console)?);
    } else {
        uml.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&console)?).process_group(0);
    }
    let child = uml.spawn().with_context(|| format!("starting {}", linux.display()))?;
    let mut child = Ended(child);
    let began = Instant::now();
    let mut output = if interactive { None } else { Some(File::open(&out)?) };
    let mut pass_on = |sink: &mut Sink<'_>| -> Result<()> {
        let mut bytes = Vec::new();
        if let Some(output) = &mut output {
            output.read_to_end(&mut bytes)?;
        }
        if bytes.is_empty() { Ok(()) } else { sink(&bytes).context("passing on the command's output") }
    };
    while child.0.try_wait()?.is_none() {
        pass_on(sink)?;
        ensure!(
            began.elapsed() < request.timeout,
            "the command in the simulation took longer than {} s (--timeout); kernel messages end with:\n{}",
            request.timeout.as_secs(),
            sh::tail(&text(&console), 5)
        );
        thread::sleep(LOOK);
    }
    pass_on(sink)?;
    if let Ok(status) = fs::read_to_string(run_dir.path().join("status")) {
        return status.trim().parse().with_context(|| format!("PID 1 reported {status:?}"));
    }
    let messages = text(&console);
    let why = panic_line(&messages).unwrap_or_else(|| "it ended without a panic".to_owned());
    bail!("the simulation died while the command ran: {why}\n{}", sh::tail(&messages, 25))
}

/// Installs PID 1's script beside the kernel. The path is constant, since it influences the kernel's random numbers.
fn install_init(linux: &Path) -> Result<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let home = linux.parent().context("the kernel is in a directory")?;
    let init = home.join("init.sh");
    if fs::read_to_string(&init).is_ok_and(|found| found == INIT) {
        return Ok(init);
    }
    let mut file = tempfile::NamedTempFile::new_in(home)?;
    std::io::Write::write_all(&mut file, INIT.as_bytes())?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
    file.persist(&init)?;
    Ok(init)
}

/// The command's directory, environment and words as a shell script.
fn script(request: &Request) -> Result<String> {
    let here = std::env::current_dir().context("finding the current directory")?;
    let mut lines = vec![format!("cd {} || cd /\n", sh::quote(&here.to_string_lossy()))];
    for variable in &request.env {
        let (key, value) = variable.split_once('=').with_context(|| format!("--env {variable}: expected KEY=VALUE"))?;
        lines.push(format!("export {key}={}\n", sh::quote(value)));
    }
    let words: Vec<String> = request.command.iter().map(|word| sh::quote(word)).collect();
    lines.push(if words.is_empty() { "exec bash -i\n".to_owned() } else { format!("exec {}\n", words.join(" ")) });
    Ok(lines.concat())
}

fn command(request: &Request, linux: &Path, init: &Path, run_dir: &Path) -> Command {
    // setpriv: the simulation is killed when this process ends, however it ends. Its processes end with it.
    let mut uml = Command::new("setpriv");
    uml.args(["--pdeathsig", "KILL"]).arg(linux).current_dir(run_dir);
    uml.arg(format!("mem={}M", request.memory_mib));
    uml.args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"]).arg(format!("init={}", init.display()));
    uml.args(["uml_dir=./", "umid=uml", "panic=-1", "oops=panic", "con=null"]);
    if request.command.is_empty() {
        uml.args(["con0=fd:0,fd:1", "ssl=null", "quiet", "sim.interactive"]);
    } else {
        uml.args(["con0=null,fd:2", "ssl=null", "ssl0=null,fd:1"]);
    }
    if let Clock::Simulated { seed } = request.clock {
        uml.args([
            "time-travel=inf-cpu".to_owned(),
            format!("time-travel-start={BEGIN}"),
            format!("random_seed={seed}"),
        ]);
    }
    uml
}

fn text(file: &Path) -> String {
    fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// Killed when dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(clock: Clock) -> Request {
        Request {
            series: Series::V6_12,
            clock,
            memory_mib: 512,
            timeout: Duration::from_secs(1),
            env: vec!["A=b c".to_owned()],
            command: ["echo", "it's $x"].map(str::to_owned).to_vec(),
        }
    }

    #[test]
    fn the_script_carries_environment_and_words() {
        let text = script(&request(Clock::Real)).unwrap();
        assert!(text.ends_with("export A='b c'\nexec echo 'it'\\''s $x'\n"), "{text}");
        assert!(script(&Request { env: vec!["A".to_owned()], ..request(Clock::Real) }).is_err());
    }

    #[test]
    fn only_a_simulated_run_is_seeded() {
        let line = |clock| format!("{:?}", command(&request(clock), Path::new("/l"), Path::new("/i"), Path::new("/r")));
        assert!(line(Clock::Simulated { seed: 7 }).contains("random_seed=7"));
        assert!(!line(Clock::Real).contains("random_seed") && !line(Clock::Real).contains("time-travel"));
    }
}
