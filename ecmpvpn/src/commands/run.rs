//! `run`: brings everything up and keeps it up.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::{fs, io};

use anyhow::Context as _;
use rustix::process::{getegid, geteuid};

use crate::cli::RunArgs;
use crate::commands::{Failure, print};
use crate::config::{self, Config};
use crate::control::health::NICE;
use crate::control::session::{self, Options};
use crate::control::site::Paths;
use crate::control::{resolve, trial};
use crate::error::chain;
use crate::host::privilege::{self, Needs};
use crate::host::{self, RunDir, sandbox};

/// Gives up every capability that the site of the configuration at `path` does not need, and the right to write
/// elsewhere than the site does, for the whole process. First does what needs more.
pub fn confine(path: &Path) -> Result<(), Failure> {
    let config = config::load(path)?;
    host::remember_ssh_sessions();
    host::remember_namespace();
    if config.bond.is_some() {
        host::load_bonding();
    }
    if config.steering.restore_order {
        host::holding::load_driver();
    }
    let site = &config.site.name;
    let run_root = Paths::of(site).run_root;
    let journal = RunDir::journal_path_of(&run_root, site);
    let mut needs = Needs { mount: privilege::mounts_bpffs(&journal, site), files_of_others: false };
    let mut confine = || -> io::Result<()> {
        // A reload and new keys must find the same files that were found now.
        let is_readable = privilege::as_if_confined(needs, || config::load(path).is_ok())?;
        needs.files_of_others = !is_readable || belongs_to_another(path)?;
        privilege::confine(needs, NICE)
    };
    confine().context("giving up the capabilities that are not needed")?;
    // A restricted process cannot mount.
    if !needs.mount {
        let folder = || path.canonicalize().map(|file| file.parent().map(Path::to_owned).unwrap_or_default());
        match folder().and_then(|folder| sandbox::restrict(&run_root, &folder)) {
            Ok(true) => {}
            Ok(false) => tracing::debug!("this kernel does not limit where `run` may write: it has no Landlock"),
            // As in a container that forbids the system calls.
            Err(error) => tracing::warn!("`run` may write everywhere, because Landlock was refused: {}", chain(&error)),
        }
    }
    Ok(())
}

/// Whether the configuration at `path` can be replaced, with the same owner, only with a privilege.
fn belongs_to_another(path: &Path) -> io::Result<bool> {
    let (file, folder) = (fs::metadata(path)?, fs::metadata(path.canonicalize()?.parent().unwrap_or(path))?);
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    Ok([file.uid(), folder.uid()] != [user; 2] || file.gid() != group)
}

/// The configuration that `run` brings up, and its text: that of the file, or the one before a `reload --confirm` that was
/// cut off.
fn configured(path: &Path) -> Result<(Config, String), Failure> {
    let site = config::site_name(path);
    let former = site.and_then(|site| {
        let text = trial::former(&RunDir::unconfirmed_reload_path(&Paths::of(&site).run_root, &site))?;
        let running = RunDir::holder(&Paths::of(&site).run_root, &site).ok().flatten();
        running.is_none().then_some(text)
    });
    let Some(text) = former else { return Ok(config::load_with_text(path)?) };
    match config::load_as(path, &text) {
        Ok(config) => {
            tracing::warn!(
                "`run` ended before its `reload --confirm` was confirmed: the configuration before that is in force \
                 again; {} still has the new one, which `ecmpvpn reload` applies",
                path.display()
            );
            Ok((config, text))
        }
        Err(error) => {
            tracing::warn!(
                "the configuration before a reload that was not confirmed cannot be used: {}",
                chain(&error)
            );
            Ok(config::load_with_text(path)?)
        }
    }
}

/// Runs the site of the configuration at `path` until it is stopped. With `--dry-run`, prints what that would change.
pub async fn run(path: &Path, args: RunArgs) -> Result<(), Failure> {
    let (mut config, text) = configured(path)?;
    resolve::resolve(&mut config, None)?;
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
        text,
        persist: args.persist,
        confirm: args.confirm,
        take_management_port: args.take_management_port,
    };
    Ok(session::run(config, &paths, &options).await?)
}
