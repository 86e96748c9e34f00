//! `reload`: makes a running `run` apply a changed configuration.

use std::path::Path;

use anyhow::anyhow;

use crate::commands::Failure;
use crate::config;
use crate::control::reload;
use crate::control::site::Paths;
use crate::exit::Exit;

/// Reloads the site of the configuration at `path`.
pub async fn run(path: &Path) -> Result<(), Failure> {
    let site = config::load(path)?.site.name;
    let Some(outcome) = reload::ask(&site, &Paths::of(&site)).await? else {
        return Err(anyhow!("`ecmpvpn run` of {site} is not running: start it; it continues with what is up").into());
    };
    let exit = [Exit::Done, Exit::Failed, Exit::Usage, Exit::Host].into_iter().find(|exit| *exit as u8 == outcome.exit);
    match exit.unwrap_or(Exit::Failed) {
        Exit::Done => {
            tracing::info!("{}", outcome.text);
            Ok(())
        }
        exit => Err(Failure { exit, error: anyhow!(outcome.text) }),
    }
}
