//! `run`: brings everything up and keeps it.

use std::fmt::Write as _;
use std::path::Path;

use crate::cli::RunArgs;
use crate::commands::{Failure, print};
use crate::config;
use crate::control::session::{self, Places};

/// Runs the site of the configuration at `path` until it is told to stop; with `--dry-run` says what that would change.
pub async fn run(path: &Path, args: RunArgs) -> Result<(), Failure> {
    let config = config::load(path)?;
    if args.dry_run {
        let changes = session::dry_run(&config).await?;
        let text = changes.iter().fold(format!("`run` of {} would:", config.site.name), |mut text, change| {
            let _ = write!(text, "\n  {change}");
            text
        });
        return print(text);
    }
    Ok(session::run(&config, &Places::of(&config.site.name), args.persist).await?)
}
