//! `run --confirm`: everything is undone unless `ecmpvpn confirm` comes in time, also if the process that brought it up is
//! killed meanwhile. A file stands for the question; whoever confirms removes it.

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
use crate::host::RunDir;
use crate::host::run_dir::StateError;

/// How often the word is looked for.
const POLL: Duration = Duration::from_millis(200);
/// How long a process that is there may take to undo everything by itself.
const GRACE: Duration = Duration::from_secs(30);
/// This program, also where its file was replaced since.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The word that `run --confirm` waits for.
pub struct Confirmation {
    file: PathBuf,
    seconds: Option<u32>,
    /// Until when; `None`: the time has not begun, it came, or none is asked for.
    until: Option<Instant>,
    begun: bool,
    guard: Option<Child>,
}

impl Confirmation {
    /// Asks for the word, if it is wanted within so many `seconds`, and starts the process that undoes everything where
    /// this one cannot. To be called before anything is changed; the time begins with [`Self::begin`].
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
        let io = |source| SessionError::Io { operation: "asking to be confirmed", source };
        fs::write(&confirmation.file, "").map_err(io)?;
        let mut guard = Command::new(THIS_PROGRAM);
        guard.arg("-c").arg(config).args(["confirm", "--guard", run_dir.site()]);
        guard.args(["--within", &seconds.unwrap_or_default().to_string()]);
        // Away from the terminal, whose end would end it, and which would wait for it.
        guard.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        confirmation.guard = Some(guard.spawn().map_err(io)?);
        Ok(confirmation)
    }

    /// Everything is up: the time begins.
    pub fn begin(&mut self) {
        let Some(seconds) = self.seconds else { return };
        self.until = Some(Instant::now() + Duration::from_secs(u64::from(seconds)));
        self.begun = true;
        // Without it the guard counts from when it began, and only where this process is gone.
        if let Err(error) = fs::write(&self.file, "up") {
            tracing::warn!("writing {}: {error}", self.file.display());
        }
        tracing::info!("everything is undone in {seconds} s, unless `ecmpvpn confirm` comes before");
    }

    /// Whether the word may still come.
    pub fn is_awaited(&self) -> bool {
        self.until.is_some()
    }

    /// Returns when the time is over without the word, else never: the seconds that there were.
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
    /// What did not come up needs no confirmation. The guard goes as soon as the file does; it is waited for so that it
    /// does not stay behind.
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

/// Whether something waits to be confirmed at `site`; it is confirmed now.
///
/// # Errors
/// The file cannot be removed.
pub fn confirm(site: &str, paths: &Paths) -> io::Result<bool> {
    match fs::remove_file(RunDir::unconfirmed_path(&paths.run_root, site)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the guard does: waits until the word comes, and where it does not, sees that everything is undone, and says so in
/// the system's log: whoever started `run` may have been cut off.
///
/// # Errors
/// It cannot be undone.
pub async fn guard(site: &str, paths: &Paths, seconds: u32) -> Result<(), SessionError> {
    let done = wait_or_undo(site, paths, seconds).await;
    let unconfirmed = format!("{site} was not confirmed within {seconds} s");
    match &done {
        Ok(false) => {}
        Ok(true) => syslog::log(Severity::Warning, &format!("{unconfirmed}: everything is undone")),
        Err(error) => {
            let why = crate::error::chain(error);
            let text = format!("{unconfirmed}, and undoing failed, which `ecmpvpn down` tries again: {why}");
            syslog::log(Severity::Error, &text);
        }
    }
    done.map(drop)
}

/// Whether it was undone.
async fn wait_or_undo(site: &str, paths: &Paths, seconds: u32) -> Result<bool, SessionError> {
    let file = RunDir::unconfirmed_path(&paths.run_root, site);
    let asked = Duration::from_secs(u64::from(seconds));
    let mut since = Instant::now();
    let mut up = false;
    // Gone: confirmed, or undone by who asked.
    while let Ok(text) = fs::read_to_string(&file) {
        if !up && !text.is_empty() {
            (up, since) = (true, Instant::now());
        }
        let is_there = RunDir::holder(&paths.run_root, site)?.is_some();
        // One that is there brings up, waits, or undoes by itself.
        let within = if is_there { asked + GRACE } else { asked };
        if (up || !is_there) && since.elapsed() >= within {
            undo(site, paths).await?;
            return Ok(true);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(false)
}

/// Takes everything down. Who runs it is asked to end, and made to where that does not help.
async fn undo(site: &str, paths: &Paths) -> Result<(), SessionError> {
    let asked_in_vain = match down(site, paths).await {
        Err(SessionError::State(StateError::DoesNotStop { pid, .. })) => pid,
        done => return done.map(drop),
    };
    // Another one that runs by now has nothing to do with this.
    if let Some(hung) = RunDir::holder(&paths.run_root, site)?.filter(|holder| holder.pid == asked_in_vain) {
        hung.kill().map_err(|source| SessionError::Io { operation: "ending a process that hangs", source })?;
    }
    down(site, paths).await.map(drop)
}
