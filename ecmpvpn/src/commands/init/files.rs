//! Writes the sites' folders: all of them or none, and never over existing files.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context as _, anyhow};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use crate::commands::Failure;
use crate::config::{self, Config, ConfigError, preshared_key_file, private_key_file, render};
use crate::{fault, file};

/// Name of the configuration in a site's folder.
const CONFIGURATION: &str = "ecmpvpn.toml";

/// A site's folder. `texts` has further files besides configuration and keys: file names, and texts without secrets.
pub(super) struct Folder<'a> {
    pub(super) site: &'a Config,
    pub(super) texts: Vec<(&'a str, String)>,
}

impl Folder<'_> {
    fn name(&self) -> &str {
        &self.site.site.name
    }
}

/// Writes `folders` into `output`. Each has the name of its site.
pub(super) fn write(output: &Path, folders: &[Folder<'_>]) -> Result<(), Failure> {
    for folder in folders {
        let folder = output.join(folder.name());
        if folder.symlink_metadata().is_ok() {
            return Err(exists(&folder));
        }
    }
    let made = fs::symlink_metadata(output).is_err();
    fs::create_dir_all(output)
        .map_err(file::advised)
        .with_context(|| format!("making the folder {}", output.display()))?;
    let written = write_into(output, folders);
    if written.is_err() && made {
        // The folder should be empty. If it is not, `remove_dir` fails and it stays.
        let _ = fs::remove_dir(output);
    }
    written
}

fn write_into(output: &Path, folders: &[Folder<'_>]) -> Result<(), Failure> {
    // Nobody else can read it from the start, and it is removed if anything below fails.
    file::sweep(output);
    let draft = tempfile::Builder::new()
        .prefix(file::INIT)
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(output)
        .map_err(file::advised)
        .with_context(|| format!("making a folder in {}", output.display()))?;
    // While it is locked, no other `init` takes it for one that was left.
    let locked =
        File::open(draft.path()).and_then(|folder| Ok(flock(&folder, FlockOperation::LockExclusive).map(|()| folder)?));
    let _locked = locked.with_context(|| format!("locking {}", draft.path().display()))?;
    for folder in folders {
        let path = draft.path().join(folder.name());
        write_site(&path, folder.site)?;
        for (name, text) in &folder.texts {
            create(&path.join(name), 0o644, text.as_bytes())?;
        }
    }
    let places: Vec<_> =
        folders.iter().map(|folder| (draft.path().join(folder.name()), output.join(folder.name()))).collect();
    for (at, (from, to)) in places.iter().enumerate() {
        rename(from, to).inspect_err(|_| {
            // Move them back into the draft, which is removed with its content.
            for (from, to) in &places[..at] {
                let _ = fs::rename(to, from);
            }
        })?;
    }
    Ok(())
}

/// Writes the files of one site and reads them back: files that cannot be used are not left behind.
fn write_site(folder: &Path, site: &Config) -> Result<(), Failure> {
    let peer = &site.peers[0];
    DirBuilder::new().mode(0o700).create(folder).with_context(|| format!("making {}", folder.display()))?;
    let configuration = folder.join(CONFIGURATION);
    create(&configuration, 0o644, render(site).as_bytes())?;
    create(&folder.join(private_key_file(&site.site.name)), 0o600, site.site.private_key.to_base64().as_bytes())?;
    if let Some(key) = &peer.preshared_key {
        create(&folder.join(preshared_key_file(&peer.name)), 0o600, key.to_base64().as_bytes())?;
    }
    let read_back = config::load(&configuration).map_err(|error| {
        // The draft is removed before the user reads this, so its lines mean nothing.
        let problems: Vec<String> = match error {
            ConfigError::Invalid(problems) => {
                problems.list.iter().map(|problem| without_lines(&problem.message)).collect()
            }
            error => vec![error.to_string()],
        };
        Failure::usage(anyhow!(
            "these options make no sound configuration for {}: {}",
            site.site.name,
            problems.join("; ")
        ))
    })?;
    if read_back == *site {
        Ok(())
    } else {
        Err(anyhow!("{CONFIGURATION} reads back as another configuration: please report this").into())
    }
}

/// A message about a configuration, without the numbers of its lines.
fn without_lines(message: &str) -> String {
    let mut parts = message.split(" on line ");
    let mut text = parts.next().unwrap_or_default().to_owned();
    parts.for_each(|part| text.push_str(part.trim_start_matches(|digit: char| digit.is_ascii_digit())));
    text
}

/// Creates a file with `content` and a line end. Its mode is set before its content is written.
fn create(path: &Path, mode: u32, content: &[u8]) -> Result<(), Failure> {
    let write = || -> io::Result<()> {
        fault::write("writing a file of init")?;
        let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content)?;
        if content.ends_with(b"\n") { Ok(()) } else { file.write_all(b"\n") }
    };
    Ok(write().map_err(file::advised).with_context(|| format!("writing {}", path.display()))?)
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    fault::point("naming a folder of init");
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(exists(to)),
        // The file system does not support `NOREPLACE`. `rename` still does not replace a folder that is not empty.
        Err(Errno::INVAL) if to.symlink_metadata().is_err() => {
            Ok(fs::rename(from, to).with_context(|| format!("making {}", to.display()))?)
        }
        Err(error) => Err(anyhow::Error::new(error).context(format!("making {}", to.display())).into()),
    }
}

fn exists(folder: &Path) -> Failure {
    Failure::usage(anyhow!("{} exists already: remove it, or name another folder with --output", folder.display()))
}
