//! Runs the binary under test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

/// Environment variable that names the binary under test.
const BINARY: &str = "ECMPVPN_BIN";

pub const INIT: [&str; 9] = [
    "init",
    "--a-endpoint",
    "10.2.3.4",
    "--b-endpoint",
    "10.5.6.7",
    "--a-prefix",
    "10.10.0.0/16,fd00:10::/48",
    "--b-prefix",
    "10.20.0.0/16,fd00:20::/48",
];

/// The binary that `ECMPVPN_BIN` names, or else the one that was built beside this test.
pub fn binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY) {
        return Ok(path.into());
    }
    let test = std::env::current_exe()?;
    let beside = test.ancestors().nth(2).context("a test is in target/PROFILE/deps")?.join("ecmpvpn");
    ensure!(beside.is_file(), "{} is missing: run `cargo build -p ecmpvpn`, or set {BINARY}", beside.display());
    Ok(beside)
}

/// The result of a run of the binary.
pub struct Ran {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

pub fn command(folder: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(binary()?);
    command.current_dir(folder).env_remove("ECMPVPN_LOG").stdin(Stdio::null());
    Ok(command)
}

pub fn run(folder: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> anyhow::Result<Ran> {
    ran(command(folder)?.args(args).output()?)
}

pub fn ran(output: Output) -> anyhow::Result<Ran> {
    Ok(Ran {
        status: output.status.code().context("ended by a signal")?,
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

pub fn folder() -> anyhow::Result<TempDir> {
    Ok(tempfile::tempdir()?)
}

/// Makes a folder and runs `init` in it.
pub fn sites() -> anyhow::Result<TempDir> {
    let folder = folder()?;
    let ran = run(folder.path(), INIT)?;
    ensure!(ran.status == 0, "init ended with {}: {}", ran.status, ran.stderr);
    Ok(folder)
}
