//! `confirm`: keeps what `run --confirm` brought up.

use anyhow::{Context as _, anyhow};

use crate::cli::ConfirmArgs;
use crate::commands::{Failure, Invocation, print};
use crate::control::confirm;
use crate::control::site::{Paths, SessionError};
use crate::host::RunDir;

/// Confirms the site. With `--guard`, waits for the confirmation of the named site.
pub async fn run(invocation: Invocation<'_>, args: &ConfirmArgs) -> Result<(), Failure> {
    if let Some(site) = &args.guard {
        return Ok(confirm::guard(site, &Paths::of(site), args.within.unwrap_or_default()).await?);
    }
    let site = invocation.find()?.name;
    let paths = Paths::of(&site);
    if confirm::confirm(&site, &paths).with_context(|| format!("confirming {site}"))? {
        return print(format_args!("{site} is confirmed: it stays up"));
    }
    Err(match RunDir::holder(&paths.run_root, &site).map_err(SessionError::from)? {
        None => anyhow!("`ecmpvpn run` of {site} is not running, so there is nothing to confirm"),
        Some(_) => anyhow!("{site} does not wait for a confirmation: it has one already, or `run` had no --confirm"),
    }
    .into())
}
