//! `reload`: makes a running `run` apply a changed configuration.

use anyhow::anyhow;

use crate::cli::ReloadArgs;
use crate::commands::{Failure, Invocation, print, warn};
use crate::control::reload::{self, Wish};
use crate::control::site::Paths;
use crate::exit::Exit;

/// Reloads the site. The running process reads the configuration, and says what is wrong with it.
pub async fn run(invocation: Invocation<'_>, args: &ReloadArgs) -> Result<(), Failure> {
    let site = invocation.find()?.name;
    let wish = match args {
        ReloadArgs { dry_run: true, .. } => Wish::Show,
        ReloadArgs { confirm: Some(seconds), .. } => Wish::Try { seconds: *seconds },
        ReloadArgs { .. } => Wish::Apply,
    };
    let Some(outcome) = reload::ask(&site, &Paths::of(&site), wish).await? else {
        return Err(anyhow!("`ecmpvpn run` of {site} is not running: start it; it continues with what is up").into());
    };
    let exit = [Exit::Done, Exit::Failed, Exit::Usage, Exit::Host].into_iter().find(|exit| *exit as u8 == outcome.exit);
    match exit.unwrap_or(Exit::Failed) {
        Exit::Done if args.dry_run => print(outcome.text),
        Exit::Done => {
            outcome.warnings.iter().for_each(warn);
            print(outcome.text)
        }
        exit => Err(Failure { exit, error: anyhow!(outcome.text) }),
    }
}
