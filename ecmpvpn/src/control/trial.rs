//! `reload --confirm`: the former configuration returns unless `ecmpvpn confirm` is run in time. The file
//! `unconfirmed-reload` exists until then, and has the text of the former configuration; `ecmpvpn confirm` removes it. If
//! `run` is killed meanwhile, the next one finds the text there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Config;
use crate::file;
use crate::plan::Plan;

/// How often the file is checked.
const POLL: Duration = Duration::from_millis(200);

/// What the file has if the former text is not known.
const UNKNOWN: &str = "up";

/// A configuration that waits for its confirmation. Dropping this removes the file.
pub struct Trial {
    file: PathBuf,
    pub seconds: u32,
    until: Instant,
    /// What was in force before.
    pub config: Config,
    pub plan: Plan,
    pub text: String,
}

/// The text of the configuration before a trial that was cut off; `None`: there was no trial, or it is confirmed, or the
/// text was not known.
pub fn former(file: &Path) -> Option<String> {
    fs::read_to_string(file).ok().filter(|text| !text.is_empty() && text != UNKNOWN)
}

impl Trial {
    /// Starts the time.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(file: PathBuf, seconds: u32, config: Config, plan: Plan, text: String) -> io::Result<Self> {
        file::replace(&file, if text.is_empty() { UNKNOWN } else { &text }.as_bytes())?;
        let until = Instant::now() + Duration::from_secs(u64::from(seconds));
        Ok(Self { file, seconds, until, config, plan, text })
    }

    /// Whether the confirmation may still come.
    pub fn is_pending(&self) -> bool {
        self.file.exists()
    }

    /// Waits for the confirmation. Returns whether it came in time.
    pub async fn is_confirmed(&self) -> bool {
        while self.is_pending() {
            if Instant::now() >= self.until {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}
