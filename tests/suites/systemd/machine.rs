//! A small system of its own: Debian's systemd as PID 1 of pid, mount and cgroup namespaces, in the network namespace of
//! a lab's gateway. The unit and its paths are those of a real installation: `/usr/local/bin/ecmpvpn` is the program
//! under test, and `/etc/ecmpvpn` the folder of the site's configuration.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lab::cgroup::Cgroup;
use lab::dump::{PINS, any_path_contains};
use lab::log;
use lab::sites::{Lab, Site, binary};
use rustix::process::Signal;
use serde_json::Value;

/// The unit as it is installed.
const UNIT_FILE: &str = include_str!("../../../packaging/ecmpvpn.service");
const UNIT: &str = "ecmpvpn.service";
/// Makes the system and becomes its PID 1.
const PID_1: &str = include_str!("pid1.sh");
/// Enters the control group before it makes the namespace, whose root the group becomes.
const ENTER: &str = r#"echo 0 >"$1"/cgroup.procs && shift && exec unshare --cgroup sh -c "$@""#;
/// How long systemd may take to start, or to do what is asked.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a command printed, and its exit code.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub text: String,
}

/// The system. Dropping this value ends it with all that runs in it.
pub struct Machine<'a> {
    site: &'a Site,
    /// PID 1 as this process sees it.
    pid: u32,
    /// `unshare`, the parent of PID 1.
    parent: Child,
    /// All processes of the system, and no others.
    cgroup: Cgroup,
}

impl<'a> Machine<'a> {
    /// Starts the system at site A. `drop_in` is added to the unit's section `[Service]`.
    pub fn boot(lab: &'a Lab, drop_in: &str) -> Result<Self> {
        let site = &lab.sites[0];
        let units = lab.dir().join("units");
        let drop_ins = units.join(format!("{UNIT}.d"));
        fs::create_dir_all(&drop_ins)?;
        fs::write(units.join(UNIT), UNIT_FILE)?;
        fs::write(drop_ins.join("test.conf"), format!("[Service]\n{drop_in}"))?;
        let cgroup = Cgroup::new("systemd")?;
        let output = lab.dir().join("pid1");
        let file = File::create(&output)?;
        let mut unshare = site.gateway.command("unshare");
        unshare.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "sh", "-c", ENTER, "enter"]);
        unshare.arg(cgroup.path()).args([PID_1, "pid1.sh"]);
        unshare.arg(&units).arg(site.config.parent().context("no folder")?).arg(binary()?);
        unshare.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        // SAFETY: the closure makes one system call, which touches no memory.
        unsafe {
            unshare.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let parent = unshare.spawn().context("starting unshare")?;
        log::note(format!("[{}] systemd starts", site.gateway.name()));
        let mut machine = Self { site, pid: 0, parent, cgroup };
        machine.wait_until_started().with_context(|| fs::read_to_string(&output).unwrap_or_default())?;
        Ok(machine)
    }

    fn wait_until_started(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            // systemd moves itself to this group.
            if let [pid] = *self.cgroup.processes("init.scope") {
                self.pid = pid;
                if self.systemctl(&["is-active", "basic.target"])?.code == 0 {
                    return Ok(());
                }
            }
            if let Some(status) = self.parent.try_wait()? {
                bail!("systemd ended with {status}");
            }
            ensure!(start.elapsed() < PATIENCE, "systemd has not started");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A command inside.
    fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = self.site.gateway.command("nsenter");
        command.arg("--target").arg(self.pid.to_string()).args(["--mount", "--pid", "--cgroup", "--", program]);
        command.args(words).stdin(Stdio::null());
        command
    }

    fn answer(&self, program: &str, words: &[&str]) -> Result<(i32, String, String)> {
        let output = self.command(program, words).output().with_context(|| format!("starting {program}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        log::note(format!("[{}] $ {program} {} -> {code}", self.site.gateway.name(), words.join(" ")));
        Ok((code, text(&output.stdout), text(&output.stderr)))
    }

    /// `systemctl WORDS…`.
    pub fn systemctl(&self, words: &[&str]) -> Result<Answer> {
        let (code, output, complaint) = self.answer("systemctl", words)?;
        Ok(Answer { code, text: output + &complaint })
    }

    /// `systemctl VERB ecmpvpn.service`.
    ///
    /// # Errors
    /// It failed. The error has the journal.
    pub fn unit(&self, verb: &str) -> Result<()> {
        let Answer { code, text } = self.systemctl(&[verb, UNIT])?;
        ensure!(code == 0, "`systemctl {verb}` ended with {code}: {text}\n{}", self.journal()?);
        Ok(())
    }

    /// A property of the unit, as `systemctl show` prints it.
    pub fn property(&self, name: &str) -> Result<String> {
        let Answer { code, text } = self.systemctl(&["show", "--value", "--property", name, UNIT])?;
        ensure!(code == 0, "`systemctl show` ended with {code}: {text}");
        Ok(text.trim_end().to_owned())
    }

    /// Checks properties of the unit.
    pub fn assert_properties(&self, expected: &[(&str, &str)]) -> Result<()> {
        for (name, value) in expected {
            let found = self.property(name)?;
            ensure!(found == *value, "{name} is {found:?} and not {value:?}:\n{}", self.journal()?);
        }
        Ok(())
    }

    /// Waits until a property of the unit has this value.
    pub fn wait_for(&self, name: &str, value: &str) -> Result<()> {
        let start = Instant::now();
        while self.property(name)? != value {
            ensure!(start.elapsed() < PATIENCE, "{name} is not {value}:\n{}", self.journal()?);
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// `ecmpvpn WORDS…` of the standard configuration, outside of the unit. Returns its exit code, standard output and
    /// standard error.
    pub fn ecmpvpn(&self, words: &[&str]) -> Result<(i32, String, String)> {
        self.answer("/usr/local/bin/ecmpvpn", words)
    }

    /// What `ecmpvpn stats --json` reports.
    pub fn stats(&self) -> Result<Value> {
        let (code, output, complaint) = self.ecmpvpn(&["stats", "--json"])?;
        ensure!(code == 0, "`ecmpvpn stats --json` ended with {code}: {complaint}\n{}", self.journal()?);
        serde_json::from_str(&output).with_context(|| format!("reading `ecmpvpn stats --json`: {output}"))
    }

    /// Everything that systemd and the unit have logged.
    pub fn journal(&self) -> Result<String> {
        Ok(self.answer("journalctl", &["--no-pager", "--quiet", "--output", "short-monotonic"])?.1)
    }

    /// A file or folder as processes of the system see it.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join("root").join(path.trim_start_matches('/'))
    }

    /// The folder of the unit's process below `/proc`.
    pub fn process(&self) -> Result<PathBuf> {
        let pid = self.property("MainPID")?;
        ensure!(pid != "0", "no process runs:\n{}", self.journal()?);
        Ok(self.path(&format!("/proc/{pid}")))
    }

    /// PID 1 as this process sees it, and the control group of the system.
    pub fn traces(&self) -> [PathBuf; 2] {
        [Path::new("/proc").join(self.pid.to_string()), self.cgroup.path().to_owned()]
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // After a test that failed half-way: the record of what is to be undone is inside.
        if self.pid != 0 && any_path_contains(Path::new(PINS), &self.site.name) {
            let _ = self.ecmpvpn(&["down"]);
        }
        // Everything ends with PID 1, and its parent after it. Without PID 1, the parent still waits for it.
        if self.pid == 0 || self.cgroup.kill().is_err() {
            let _ = self.parent.kill();
        }
        let _ = self.parent.wait();
    }
}

/// The unit's command without `--persist`, as its first lines say for the userspace backend.
pub fn without_persist() -> Result<String> {
    let line = UNIT_FILE.lines().find(|line| line.starts_with("ExecStart=")).context("no ExecStart")?;
    let shorter = line.replace(" --persist", "");
    ensure!(shorter != line, "{line}");
    Ok(format!("ExecStart=\n{shorter}\n"))
}
