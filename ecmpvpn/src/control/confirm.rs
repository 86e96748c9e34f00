//! `run --confirm`: everything is undone unless `ecmpvpn confirm` is run in time, even if the process that brought the
//! site up is killed meanwhile. The file `unconfirmed` exists until then; `ecmpvpn confirm` removes it.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

use super::down::down;
use super::site::{Paths, SessionError};
use super::syslog::{self, Severity};
use crate::file;
use crate::host::RunDir;
use crate::host::run_dir::RunDirError;

/// How often the file is checked.
const POLL: Duration = Duration::from_millis(200);
/// How long a running process may take to undo everything by itself.
const GRACE: Duration = Duration::from_secs(30);
/// This program, even if its file was replaced since.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The confirmation that `run --confirm` waits for.
pub struct Confirmation {
    file: PathBuf,
    seconds: Option<u32>,
    /// When the time ends. `None`: it has not begun, the site is confirmed, or no confirmation is required.
    until: Option<Instant>,
    begun: bool,
    guard: Option<Child>,
}

impl Confirmation {
    /// Requires a confirmation within `seconds`, if that is given, and starts the guard: a process that undoes
    /// everything if this one cannot. Call it before anything is changed. The time begins with [`Self::begin`].
    pub fn ask(run_dir: &RunDir, config: &Path, seconds: Option<u32>) -> Result<Self, SessionError> {
        let mut confirmation = Self { file: run_dir.unconfirmed(), seconds, until: None, begun: false, guard: None };
        if seconds.is_none() {
            if confirmation.file.exists() {
                tracing::warn!(
                    "an earlier `run --confirm` still waits for `ecmpvpn confirm`: without it everything is undone"
                );
            }
            return Ok(confirmation);
        }
        let io = |source| SessionError::Io { operation: "asking for a confirmation", source };
        file::replace(&confirmation.file, b"").map_err(io)?;
        let mut guard = Command::new(THIS_PROGRAM);
        guard.arg("-c").arg(config).args(["confirm", "--guard", run_dir.site()]);
        guard.args(["--within", &seconds.unwrap_or_default().to_string()]);
        // Detached from the terminal: closing the terminal would end the guard, and the shell would wait for the guard.
        guard.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        confirmation.guard = Some(guard.spawn().map_err(io)?);
        Ok(confirmation)
    }

    /// Starts the time. Call it when everything is up.
    pub fn begin(&mut self) {
        let Some(seconds) = self.seconds else { return };
        self.until = Some(Instant::now() + Duration::from_secs(u64::from(seconds)));
        self.begun = true;
        // If this fails the guard counts from its own start, and acts only if this process is gone.
        if let Err(error) = file::replace(&self.file, b"up") {
            tracing::warn!("writing {}: {error}", self.file.display());
        }
        tracing::info!("everything is undone in {seconds} s, unless `ecmpvpn confirm` is run before");
    }

    /// Whether the time runs and the confirmation may still come.
    pub fn is_awaited(&self) -> bool {
        self.until.is_some()
    }

    /// Returns when the time is over without a confirmation: the seconds that were given. Otherwise never returns.
    pub async fn is_missing(&mut self) -> u32 {
        while let Some(until) = self.until {
            if !self.file.exists() {
                tracing::info!("confirmed: it stays up");
                self.until = None;
            } else if Instant::now() >= until {
                return self.seconds.unwrap_or_default();
            } else {
                tokio::time::sleep(POLL).await;
            }
        }
        std::future::pending().await
    }
}

impl Drop for Confirmation {
    /// A site that did not come up needs no confirmation: removes the file. The guard ends when the file is gone; waits
    /// for it, so that it leaves no zombie.
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else { return };
        if !self.begun {
            let _ = fs::remove_file(&self.file);
        }
        if !self.file.exists() {
            let _ = guard.wait();
        }
    }
}

/// Confirms `site`, both a `run` and a `reload`. Returns whether one of them was waiting for a confirmation.
///
/// # Errors
/// A file cannot be removed.
pub fn confirm(site: &str, paths: &Paths) -> io::Result<bool> {
    let remove = |path: PathBuf| match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    };
    let run = remove(RunDir::unconfirmed_path(&paths.run_root, site))?;
    Ok(remove(RunDir::unconfirmed_reload_path(&paths.run_root, site))? || run)
}

/// The work of the guard: waits for the confirmation. If it does not come, undoes everything and logs that to syslog:
/// the person who started `run` may have lost the connection.
///
/// # Errors
/// Not everything could be undone.
pub async fn guard(site: &str, paths: &Paths, seconds: u32) -> Result<(), SessionError> {
    let done = wait_or_undo(site, paths, seconds).await;
    let unconfirmed = format!("{site} was not confirmed within {seconds} s");
    match &done {
        Ok(false) => {}
        Ok(true) => syslog::log(Severity::Warning, &format!("{unconfirmed}: everything is undone")),
        Err(error) => {
            let why = crate::error::chain(error);
            let text = format!("{unconfirmed}, and undoing failed: {why}; run `ecmpvpn down` to try again");
            syslog::log(Severity::Error, &text);
        }
    }
    done.map(drop)
}

/// Waits for the confirmation. Returns whether everything was undone because it did not come.
async fn wait_or_undo(site: &str, paths: &Paths, seconds: u32) -> Result<bool, SessionError> {
    let file = RunDir::unconfirmed_path(&paths.run_root, site);
    let asked = Duration::from_secs(u64::from(seconds));
    let mut since = Instant::now();
    let mut up = false;
    // The file is gone when the site is confirmed, or undone by the process that asked for it.
    while let Ok(text) = fs::read_to_string(&file) {
        if !up && !text.is_empty() {
            (up, since) = (true, Instant::now());
        }
        let is_there = RunDir::holder(&paths.run_root, site)?.is_some();
        // A running process still brings the site up, waits, or undoes everything by itself: give it more time.
        let within = if is_there { asked + GRACE } else { asked };
        if (up || !is_there) && since.elapsed() >= within {
            undo(site, paths).await?;
            return Ok(true);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(false)
}

/// Takes everything down. Asks a running process to end, and kills it if it does not.
async fn undo(site: &str, paths: &Paths) -> Result<(), SessionError> {
    let asked_in_vain = match down(site, paths).await {
        Err(SessionError::State(RunDirError::DoesNotStop { pid, .. })) => pid,
        done => return done.map(drop),
    };
    // Kill only the process that was asked: another one may run by now.
    if let Some(hung) = RunDir::holder(&paths.run_root, site)?.filter(|holder| holder.pid == asked_in_vain) {
        hung.kill().map_err(|source| SessionError::Io { operation: "ending a process that hangs", source })?;
    }
    down(site, paths).await.map(drop)
}
