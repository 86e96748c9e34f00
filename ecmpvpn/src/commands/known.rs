//! Finds the site that a command is about.
//!
//! Commands on a running site need only the site's name: the journal and the maps in the kernel know the rest. So a
//! configuration that cannot be used does not stop them.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::anyhow;

use crate::cli::DEFAULT_CONFIG;
use crate::cli::site::SiteArgs;
use crate::commands::{Failure, print, warn};
use crate::config::{self, Config, ConfigError};
use crate::dataplane::Pins;
use crate::host::{RUN_ROOT, RunDir};

/// What a command line says about the site.
#[derive(Clone, Copy, Debug)]
pub struct Invocation<'a> {
    /// The configuration.
    pub file: &'a Path,
    /// `--site`
    pub name: Option<&'a str>,
    /// Whether the command is a line of a batch. Then standard output is for reports alone.
    pub is_batch: bool,
}

/// A site, and its configuration if that can be used.
pub struct Known {
    pub name: String,
    /// The configuration, or why there is none of this site.
    config: Result<Config, anyhow::Error>,
}

impl<'a> Invocation<'a> {
    pub fn new(file: &'a Path, site: &'a SiteArgs) -> Self {
        Self { file, name: site.site.as_deref(), is_batch: false }
    }

    /// Writes what was done to standard output, or in a batch to standard error.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn say(&self, text: impl Display) -> Result<(), Failure> {
        if self.is_batch {
            let _ = writeln!(io::stderr(), "{text}");
            return Ok(());
        }
        print(text)
    }

    /// Finds the site: by `--site`, else by the configuration, even if only its name can be read. Without `-c` it may
    /// also be the only site of this host.
    ///
    /// # Errors
    /// The name is in none of these places.
    pub fn find(&self) -> Result<Known, Failure> {
        self.find_among(self.file == Path::new(DEFAULT_CONFIG), known_here)
    }

    /// `is_default`: nobody asked for this very file, so another site than the file's may be meant.
    fn find_among(&self, is_default: bool, known: impl FnOnce() -> BTreeSet<String>) -> Result<Known, Failure> {
        let error = match (config::load(self.file), self.name) {
            (Ok(config), None) => return Ok(Known { name: config.site.name.clone(), config: Ok(config) }),
            (Ok(config), Some(name)) => {
                let of = &config.site.name;
                let other = (of != name).then(|| anyhow!("{} is the configuration of {of}", self.file.display()));
                return Ok(Known { name: name.to_owned(), config: other.map_or(Ok(config), Err) });
            }
            (Err(error), Some(name)) => return Ok(Known { name: name.to_owned(), config: Err(error.into()) }),
            (Err(error), None) => error,
        };
        if let Some(name) = config::site_name(self.file) {
            return Ok(Known { name, config: Err(error.into()) });
        }
        let why = anyhow!("{error}");
        Ok(Known { name: only(known(), is_default, error, self.file)?, config: Err(why) })
    }
}

impl Known {
    /// The configuration, if it can be used.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref().ok()
    }

    /// The configuration.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn into_config(self) -> Result<Config, Failure> {
        self.config.map_err(Failure::usage)
    }

    /// If there is no configuration, warns of `consequence`.
    pub fn warn(&self, consequence: &str) {
        if let Err(error) = &self.config {
            let error = format!("{error:#}");
            let first = error.lines().next().unwrap_or_default();
            warn(format_args!("{consequence}, because {first}"));
        }
    }
}

/// The names of the sites that are up on this host, or of which something is left.
fn known_here() -> BTreeSet<String> {
    RunDir::sites(Path::new(RUN_ROOT)).into_iter().chain(Pins::sites()).collect()
}

/// The only one of the sites that are `known`, for a default configuration that names none. A file that was asked for
/// never stands for another site: its path may be mistyped.
///
/// # Errors
/// The file was asked for, or there are several sites, or none. Then the configuration's own error says most.
fn only(known: BTreeSet<String>, is_default: bool, error: ConfigError, file: &Path) -> Result<String, Failure> {
    let names = known.into_iter().collect::<Vec<_>>();
    let has = match names.as_slice() {
        [] => return Err(error.into()),
        [one] if is_default => return Ok(one.clone()),
        [one] => format!("is this about {one}, which is on this host? Then add `--site {one}`"),
        several => format!("this host has several sites: add `--site` with one of {}", several.join(", ")),
    };
    let reason = match error {
        ConfigError::Missing { .. } => "does not exist".to_owned(),
        ConfigError::Unreadable { source, .. } => format!("cannot be read ({source})"),
        ConfigError::Invalid(_) => "names no site that can be read".to_owned(),
    };
    Err(Failure::usage(anyhow!("{} {reason}; {has}", file.display())))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const SOUND_HEAD: &str = "[site]\nname = \"site-a\"\nprivate_key_file = \"gone.key\"\n";

    fn find(text: Option<&str>, name: Option<&str>, is_default: bool, known: &[&str]) -> Result<Known, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ecmpvpn.toml");
        if let Some(text) = text {
            fs::write(&file, text).unwrap();
        }
        let known = known.iter().map(|name| (*name).to_owned()).collect();
        let found = Invocation { file: &file, name, is_batch: false }.find_among(is_default, || known);
        found.map_err(|failure| format!("{:#}", failure.error).replace(&file.display().to_string(), "FILE"))
    }

    #[test]
    fn a_name_is_enough() {
        for (text, name, known, expected) in [
            (None, Some("b"), &["a", "c"][..], "b"),
            (Some("[site]\nname = \"a\"\n"), Some("b"), &[], "b"),
            (Some(SOUND_HEAD), None, &["x", "y"], "site-a"),
            (Some("junk\n[site]\nname = \"site-a\"\n"), None, &[], "site-a"),
            (Some("[site]\nname = \"site-a\"\nseed = = 3\n[bond\n"), None, &[], "site-a"),
            (None, None, &["x"], "x"),
            (Some("[site]\nname = \"../etc\"\n"), None, &["x"], "x"),
        ] {
            let found = find(text, name, true, known).unwrap_or_else(|error| panic!("{text:?} {name:?}: {error}"));
            assert_eq!((found.name.as_str(), found.config().is_some()), (expected, false), "{text:?} {name:?}");
        }
    }

    #[test]
    fn without_a_name_the_error_says_which_sites_there_are() {
        let several = "this host has several sites: add `--site` with one of x, y";
        let other = "is this about x, which is on this host? Then add `--site x`";
        for (text, is_default, known, expected) in [
            (None, true, &["x", "y"][..], format!("FILE does not exist; {several}")),
            (
                Some("[site]\nname = \"a/b\"\n"),
                true,
                &["x", "y"],
                format!("FILE names no site that can be read; {several}"),
            ),
            (None, false, &["x"], format!("FILE does not exist; {other}")),
            (Some("junk"), false, &["x"], format!("FILE names no site that can be read; {other}")),
            (
                None,
                true,
                &[],
                "there is no configuration FILE: write one with `ecmpvpn init`, or name yours with `-c FILE`"
                    .to_owned(),
            ),
        ] {
            assert_eq!(find(text, None, is_default, known).err(), Some(expected), "{text:?}");
        }
    }
}
