//! `confirm`: keeps what `run --confirm` brought up.

use std::io;
use std::path::Path;

use anyhow::{Context as _, anyhow};

use crate::commands::Failure;
use crate::config;
use crate::control::session::{Places, SessionError};
use crate::host::RunDir;

/// Confirms the site of the configuration at `path`.
pub fn run(path: &Path) -> Result<(), Failure> {
    let site = config::load(path)?.site.name;
    let places = Places::of(&site);
    if RunDir::holder(&places.run_root, &site).map_err(SessionError::from)?.is_none() {
        return Err(anyhow!("no `ecmpvpn run` of {site} is there to be confirmed").into());
    }
    let waiting = RunDir::unconfirmed_path(&places.run_root, &site);
    match std::fs::remove_file(&waiting) {
        Ok(()) => {
            tracing::info!("{site} is confirmed: it stays up");
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(anyhow!("{site} does not wait to be confirmed: it was already, or `run` had no --confirm").into())
        }
        Err(error) => Err(error).with_context(|| format!("removing {}", waiting.display()))?,
    }
}
