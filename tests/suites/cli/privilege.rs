//! Commands of a user without privilege.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use anyhow::ensure;
use ecmpvpn::exit::Exit;
use tempfile::TempDir;

use super::stage::{Ran, command, ran, sites};

/// A user that owns nothing: `nobody`.
const NOBODY: u32 = 65534;

/// Two sites whose configurations everybody may read; their keys belong to root.
fn readable_sites() -> anyhow::Result<TempDir> {
    let folder = sites()?;
    for path in [folder.path().to_owned(), folder.path().join("site-a")] {
        fs::set_permissions(path, Permissions::from_mode(0o755))?;
    }
    fs::set_permissions(folder.path().join("site-a/ecmpvpn.toml"), Permissions::from_mode(0o644))?;
    Ok(folder)
}

fn as_nobody(folder: &Path, line: &str) -> anyhow::Result<Ran> {
    let words = line.split(' ').chain(["-c", "site-a/ecmpvpn.toml"]);
    ran(command(folder)?.args(words).uid(NOBODY).gid(NOBODY).output()?)
}

pub fn what_lacks_privilege_says_so_before_anything_else() -> anyhow::Result<()> {
    let folder = readable_sites()?;
    for (line, capability) in [
        ("run", "CAP_NET_ADMIN"),
        ("run --dry-run", "CAP_NET_ADMIN"),
        ("reload", "CAP_NET_ADMIN"),
        ("confirm", "CAP_NET_ADMIN"),
        ("down", "CAP_NET_ADMIN"),
        ("rotate", "CAP_NET_ADMIN"),
        ("rotate --abort", "CAP_NET_ADMIN"),
        ("rotate --apply site-a/ecmpvpn.toml", "CAP_NET_ADMIN"),
        ("stats", "CAP_BPF"),
        ("policy show", "CAP_BPF"),
        ("policy weight wg0 2", "CAP_BPF"),
        ("explain 10.10.0.1 10.20.0.1 --sport 1 --dport 2", "CAP_BPF"),
    ] {
        let ran = as_nobody(folder.path(), line)?;
        let said = ran.stderr.starts_with(&format!("ecmpvpn: this needs {capability} "))
            && ran.stderr.ends_with(": run it as root, for example with sudo\n")
            && ran.stderr.lines().count() == 1;
        ensure!(ran.status == Exit::Host as i32 && said, "{line} ended with {}: {}", ran.status, ran.stderr);
    }
    Ok(())
}

pub fn check_says_which_file_it_may_not_read() -> anyhow::Result<()> {
    let folder = readable_sites()?;
    for line in ["check", "plan"] {
        let ran = as_nobody(folder.path(), line)?;
        let sentence = "private_key_file in [site] names site-a/site-a.key, which this user may not read: run the \
            command with sudo";
        ensure!(ran.status != 0 && ran.stderr.contains(sentence), "{line} ended with {}: {}", ran.status, ran.stderr);
    }
    Ok(())
}
