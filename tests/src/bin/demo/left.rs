//! Checks that the demonstration leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use lab::dump::{Dump, idle_shared_things};
use lab::netns::Netns;
use lab::sites::{Lab, Running};

/// How long the host may take until it looks as it did before.
const SETTLE: Duration = Duration::from_secs(20);
/// Time between two checks.
const LOOK: Duration = Duration::from_millis(200);

/// The state of the host before, and everything that was made since.
pub struct Left {
    host: Netns,
    before: Dump,
    idle_before: Vec<String>,
    sites: Vec<String>,
    processes: Vec<u32>,
    directories: Vec<PathBuf>,
}

impl Left {
    /// Records the state of the host before anything is made.
    pub fn look() -> Result<Self> {
        let host = Netns::current()?;
        let before = Dump::take(&host, &[])?;
        let idle_before = idle_shared_things()?;
        Ok(Self { host, before, idle_before, sites: Vec::new(), processes: Vec::new(), directories: Vec::new() })
    }

    /// Records that this lab must be removed at the end.
    pub fn expect_gone(&mut self, lab: &Lab) {
        self.sites.extend(lab.sites.iter().map(|site| site.name.clone()));
        self.directories.push(lab.dir().to_owned());
    }

    /// Records that these processes must end.
    pub fn expect_ended(&mut self, running: &[Running]) {
        self.processes.extend(running.iter().map(Running::pid));
    }

    /// Checks that nothing is left. Repeats the check for a while: the kernel removes things with a delay, sites of
    /// other programs come and go, and a second Ctrl-C kills the helper programs of the check.
    ///
    /// # Errors
    /// Something is left.
    pub fn check(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.look_again() {
                Err(_) if start.elapsed() < SETTLE => thread::sleep(LOOK),
                outcome => return outcome,
            }
        }
    }

    fn look_again(&self) -> Result<()> {
        // The names of a lab's namespaces contain the process id.
        let ours = format!("-{}-", std::process::id());
        let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names: Vec<String> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        let left: Vec<&String> = names.iter().filter(|name| name.contains(&ours)).collect();
        ensure!(left.is_empty(), "network namespaces are left: {left:?}");
        for directory in &self.directories {
            ensure!(!directory.exists(), "{} is left", directory.display());
        }
        for pid in &self.processes {
            ensure!(!Path::new("/proc").join(pid.to_string()).exists(), "process {pid} is left");
        }
        let idle = idle_shared_things()?;
        let left: Vec<&String> = idle.iter().filter(|thing| !self.idle_before.contains(thing)).collect();
        ensure!(left.is_empty(), "left: {left:?}");
        // The dump before was taken without sites, so everything that belongs to them now is left over.
        let sites: Vec<&str> = self.sites.iter().map(String::as_str).collect();
        match self.before.diff(&Dump::take(&self.host, &sites)?) {
            None => Ok(()),
            Some(difference) => bail!("the host is not as it was before:\n{difference}"),
        }
    }
}
