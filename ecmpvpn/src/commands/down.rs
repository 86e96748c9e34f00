//! `down`: removes everything that `run` made.

use std::path::Path;

use crate::commands::Failure;
use crate::config;
use crate::control::down::{self, TakenDown};
use crate::control::site::Paths;

/// Takes down the site of the configuration at `path`.
pub async fn run(path: &Path) -> Result<(), Failure> {
    let site = config::load(path)?.site.name;
    match down::down(&site, &Paths::of(&site)).await? {
        TakenDown { stopped: None, undone: 0 } => tracing::info!("nothing of {site} is up"),
        TakenDown { stopped: Some(pid), undone: 0 } => {
            tracing::info!("{site} is down: ecmpvpn (pid {pid}) was stopped");
        }
        TakenDown { undone, .. } => tracing::info!("{site} is down: {undone} changes were undone"),
    }
    Ok(())
}
