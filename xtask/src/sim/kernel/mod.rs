//! The simulation's kernel: User-Mode Linux, built once from Debian's source package and kept outside the tree.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::fingerprint;
use crate::sh::{self, Cmd};
use crate::vm::kernel::Series;

/// Options in addition to the architecture's defaults.
const CONFIG: &str = include_str!("config");
/// The patch for the source of every series.
const COMMON_PATCH: &str = include_str!("common.patch");
/// Change this if kernels must be built again although source, configuration and patches are the same.
const RECIPE: &str = "2";
/// The folder with the user's own kernel sources. The file names are those of Debian's package:
/// `linux-source-6.12.tar.xz`.
const SOURCES: &str = "ECMPVPN_LINUX_SOURCES";
/// The directory for built kernels, instead of the user's cache directory.
const CACHE: &str = "ECMPVPN_CACHE";
/// Number of compiled files, to show the progress.
const OBJECTS: f64 = 1_120.0;
/// Time between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(20);

/// Debian's package with the source.
pub fn package(series: Series) -> String {
    format!("linux-source-{}", series.name())
}

/// The archive in that package.
fn archive(series: Series) -> String {
    format!("{}.tar.xz", package(series))
}

/// Where the package installs the archive.
pub fn packaged_source(series: Series) -> PathBuf {
    Path::new("/usr/src").join(archive(series))
}

/// The directory for built kernels.
///
/// # Errors
/// Neither a cache nor a home directory is known.
pub fn cache() -> Result<PathBuf> {
    let named = |variable: &str| std::env::var_os(variable).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let dir = named(CACHE)
        .or_else(|| Some(named("XDG_CACHE_HOME")?.join("ecmpvpn")))
        .or_else(|| Some(named("HOME")?.join(".cache/ecmpvpn")));
    dir.with_context(|| format!("there is no HOME to keep the simulation's kernel in: set {CACHE} to a directory"))
}

/// The kernel built from this source, configuration and patch; `None` if it is not built yet.
pub fn built(series: Series) -> Option<PathBuf> {
    let version = version(series).ok()?;
    Some(home(series, &version).ok()?.join("linux")).filter(|linux| linux.is_file())
}

/// Like [`built`], but builds the kernel if it is missing. One process builds, others wait for it.
pub fn get(series: Series) -> Result<PathBuf> {
    if let Some(linux) = built(series) {
        return Ok(linux);
    }
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the simulation runs on x86_64, and this machine is {}",
        std::env::consts::ARCH
    );
    let version = version(series)?;
    let home = home(series, &version)?;
    fs::create_dir_all(&home).with_context(|| format!("making {}", home.display()))?;
    let lock = File::create(home.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("locking the kernel's directory")?;
    let linux = home.join("linux");
    if !linux.is_file() {
        // Left by a build that was killed.
        for entry in fs::read_dir(&home)?.flatten().filter(|entry| entry.path().is_dir()) {
            let _ = fs::remove_dir_all(entry.path());
        }
        let step = sh::step(format!(
            "building the simulation's kernel, {} {version} (6 to 12 minutes on two cores, once)",
            package(series)
        ));
        build(series, &home, &linux).context("building the simulation's kernel")?;
        step.done(&linux.display().to_string());
    }
    Ok(linux)
}

/// The patch for the source of one series.
fn own_patch(series: Series) -> &'static str {
    match series {
        Series::V6_12 => include_str!("6.12.patch"),
        Series::V6_1 => include_str!("6.1.patch"),
    }
}

/// Options of [`CONFIG`] that a series does not have yet.
fn not_there_yet(series: Series) -> &'static [&'static str] {
    match series {
        Series::V6_12 => &[],
        Series::V6_1 => &["CONFIG_NETKIT=y"],
    }
}

/// The path of the source.
fn source(series: Series) -> Result<PathBuf> {
    let path = std::env::var_os(SOURCES)
        .map_or_else(|| packaged_source(series), |folder| Path::new(&folder).join(archive(series)));
    ensure!(
        path.is_file(),
        "there is no {}: `cargo xtask setup` installs {} where apt offers it; else set {SOURCES} to a folder that has {}",
        path.display(),
        package(series),
        archive(series)
    );
    Ok(path)
}

/// The source's version: that of the package, or path, size and time of the user's own archive.
pub fn version(series: Series) -> Result<String> {
    let path = source(series)?;
    if path == packaged_source(series) {
        let version = Cmd::new("dpkg-query").args(["-W", "-f", "${Version}", &package(series)]).output()?;
        return Ok(version.trim().to_owned());
    }
    let meta = fs::metadata(&path)?;
    let modified = meta.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{}-{}-{}", path.display(), meta.len(), modified.as_secs()))
}

fn home(series: Series, version: &str) -> Result<PathBuf> {
    let key = fingerprint::of([RECIPE, version, CONFIG, COMMON_PATCH, own_patch(series)]);
    Ok(cache()?.join("sim").join(format!("{}-{key}", series.name())))
}

fn build(series: Series, home: &Path, linux: &Path) -> Result<()> {
    let work = tempfile::Builder::new().prefix("build-").tempdir_in(home)?;
    let tar =
        Cmd::new("tar").args(["-x", "--strip-components=1", "-f"]).arg(source(series)?).arg("-C").arg(work.path());
    tar.quiet().run()?;
    fs::write(work.path().join("ecmpvpn.config"), CONFIG)?;
    fs::write(work.path().join("ecmpvpn.patch"), [COMMON_PATCH, own_patch(series)].concat())?;
    let log = home.join("build.log");
    let configure = "patch -p1 --forward <ecmpvpn.patch && make ARCH=um defconfig && \
                     ARCH=um scripts/kconfig/merge_config.sh -m .config ecmpvpn.config && make ARCH=um olddefconfig";
    Cmd::new("sh").args(["-c", configure]).dir(work.path()).quiet().run()?;
    let config = fs::read_to_string(work.path().join(".config"))?;
    let missing: Vec<_> = missing(&config).into_iter().filter(|line| !not_there_yet(series).contains(line)).collect();
    ensure!(missing.is_empty(), "this source does not support {}", missing.join(" "));
    compile(work.path(), &log).with_context(|| format!("see {}", log.display()))?;
    let partial = home.join("linux.partial");
    Cmd::new("strip").arg("-o").arg(&partial).arg(work.path().join("linux")).quiet().run()?;
    fs::rename(partial, linux)?;
    Ok(())
}

/// Options of [`CONFIG`] that a finished configuration lacks.
fn missing(config: &str) -> Vec<&'static str> {
    let asked = CONFIG.lines().filter(|line| line.starts_with("CONFIG_") && line.ends_with("=y"));
    asked.filter(|line| !config.lines().any(|found| found == *line)).collect()
}

/// Runs make, shows the progress, and keeps make's output in `log`.
fn compile(dir: &Path, log: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    let mut make = Cmd::new("make")
        .args(["ARCH=um", &format!("-j{jobs}"), "linux"])
        .dir(dir)
        .into_inner()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(log)?)
        .spawn()
        .context("starting make: `cargo xtask setup` installs what is needed")?;
    let mut log = File::options().append(true).open(log)?;
    let (mut objects, mut said) = (0_u32, Instant::now());
    for line in BufReader::new(make.stdout.take().context("make has no output")?).lines() {
        let line = line?;
        writeln!(log, "{line}")?;
        objects += u32::from(line.trim_start().starts_with("CC ") || line.trim_start().starts_with("AS "));
        if said.elapsed() >= PROGRESS {
            sh::note(format!("{:.0}%", (f64::from(objects) / OBJECTS * 100.0).min(99.0)));
            said = Instant::now();
        }
    }
    let status = make.wait()?;
    if !status.success() {
        bail!("make failed ({status})");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_configuration_lacks_is_named() {
        let all = CONFIG.lines().flat_map(|line| [line, "\n"]).collect::<String>();
        assert!(missing(&all).is_empty());
        let without = all.replace("CONFIG_WIREGUARD=y\n", "# CONFIG_WIREGUARD is not set\n");
        assert_eq!(missing(&without), ["CONFIG_WIREGUARD=y"]);
    }

    #[test]
    fn the_key_depends_on_every_part() {
        let key = |parts: [&str; 4]| fingerprint::of(parts);
        let base = key(["1", "v", "c", "p"]);
        for other in [
            ["2", "v", "c", "p"],
            ["1", "w", "c", "p"],
            ["1", "v", "d", "p"],
            ["1", "v", "c", "q"],
            ["1v", "", "c", "p"],
        ] {
            assert_ne!(base, key(other));
        }
    }
}
