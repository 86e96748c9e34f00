//! `run`: brings everything up and keeps it up.

use std::fmt::Write as _;
use std::path::Path;

use crate::cli::RunArgs;
use crate::commands::{Failure, print};
use crate::control::session::{self, Options};
use crate::control::site::Paths;

/// Runs the site of the configuration at `path` until it is stopped. With `--dry-run`, prints what that would change.
pub async fn run(path: &Path, args: RunArgs) -> Result<(), Failure> {
    let config = crate::commands::load(path)?;
    if args.dry_run {
        let paths = Paths::of(&config.site.name);
        let changes = session::dry_run(&config, &paths, args.take_management_port).await?;
        let text = changes.iter().fold(format!("`run` of {} would:", config.site.name), |mut text, change| {
            let _ = write!(text, "\n  {change}");
            text
        });
        return print(text);
    }
    let paths = Paths::of(&config.site.name);
    let options = Options {
        file: path.to_owned(),
        persist: args.persist,
        confirm: args.confirm,
        take_management_port: args.take_management_port,
    };
    Ok(session::run(config, &paths, &options).await?)
}
