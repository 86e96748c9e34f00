//! Which kernels the virtual machine can run, and where they come from: Debian's own packages, unpacked and never
//! installed. An unpacked kernel is used without the network.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::sh::{self, Cmd};

/// A kernel series that the suites run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Series {
    /// tcx, netkit, WireGuard, bonding: everything the program can use.
    #[value(name = "6.12")]
    V6_12,
    /// Before tcx: the clsact path.
    #[value(name = "6.1")]
    V6_1,
}

/// Every series, newest first.
pub const ALL: [Series; 2] = [Series::V6_12, Series::V6_1];

impl Series {
    /// The series as it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        }
    }

    /// What the suites may rely on, in the words of `ECMPVPN_REQUIRE`: a test that misses one of these fails.
    pub fn features(self) -> &'static str {
        match self {
            Self::V6_12 => "wireguard,bonding,tun,tcx",
            Self::V6_1 => "wireguard,bonding,tun",
        }
    }

    /// The prefix of its packages' names. The names of Debian's stable kernels have an ABI number, those of backports
    /// have the kernel's release.
    fn package_prefix(self) -> &'static str {
        match self {
            Self::V6_12 => "linux-image-6.12.",
            Self::V6_1 => "linux-image-6.1.0-",
        }
    }
}

const PACKAGE_SUFFIX: &str = "-cloud-amd64";

/// Address of a mirror of Debian's security archive, for systems whose own apt sources do not offer the packages.
const MIRROR: &str = "ECMPVPN_DEBIAN_MIRROR";
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Name of its package; changes with every update.
    pub package: String,
    /// The compressed image that QEMU boots.
    pub image: PathBuf,
    /// `lib/modules/<release>`.
    pub modules: PathBuf,
}

/// The kernel of `series` in `dir`. Fetches it if it is missing.
pub fn get(series: Series, dir: &Path) -> Result<Kernel> {
    if let Some(kernel) = find(dir) {
        return Ok(kernel);
    }
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the virtual machine runs Debian's amd64 cloud kernels, and this machine is {}",
        std::env::consts::ARCH
    );
    fs::create_dir_all(dir)?;
    let step = sh::step(format!("fetching a {} kernel", series.name()));
    let scratch = tempfile::tempdir_in(dir)?;
    let package = download(series, dir, scratch.path()).with_context(|| {
        format!(
            "no {} kernel in {}, and none could be fetched; it needs the network once (try `apt-get update`)",
            series.name(),
            dir.display()
        )
    })?;
    let archive = sh::only_file_with_extension(scratch.path(), "deb")?;
    let unpacked = scratch.path().join("unpacked");
    Cmd::new("dpkg-deb").arg("-x").arg(&archive).arg(&unpacked).run()?;
    fs::write(unpacked.join("package"), &package)?;
    let home = dir.join("kernel");
    if home.exists() {
        fs::remove_dir_all(&home)?;
    }
    fs::rename(&unpacked, &home)?;
    step.done(&package);
    find(dir).with_context(|| format!("{package} holds no kernel image and modules"))
}

fn find(dir: &Path) -> Option<Kernel> {
    let home = dir.join("kernel");
    let package = fs::read_to_string(home.join("package")).ok()?;
    let image = first_entry(&home.join("boot"), "vmlinuz-")?;
    let modules = ["lib/modules", "usr/lib/modules"].iter().find_map(|sub| first_entry(&home.join(sub), ""))?;
    Some(Kernel { package, image, modules })
}

fn first_entry(dir: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(dir).ok()?;
    entries.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).map(|entry| entry.path())
}

/// Downloads the newest package of `series` into `into` and returns its name.
fn download(series: Series, dir: &Path, into: &Path) -> Result<String> {
    let system: &[String] = &[];
    if let Some(package) = newest(series, system)? {
        match fetch(&package, into, system) {
            Ok(()) => return Ok(package),
            Err(error) => sh::note(format!("{error:#}; trying {MIRROR}")),
        }
    }
    let private = private_apt(dir)?;
    Cmd::new("apt-get").args(&private).args(["-q", "update"]).quiet().retried(3)?;
    let Some(package) = newest(series, &private)? else {
        bail!("Debian's archive has no package named {}*{PACKAGE_SUFFIX}", series.package_prefix());
    };
    fetch(&package, into, &private)?;
    Ok(package)
}

fn fetch(package: &str, into: &Path, options: &[String]) -> Result<()> {
    Cmd::new("apt-get")
        .args(options)
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
        .dir(into)
        .quiet()
        .retried(3)
}

/// Options for apt with separate sources and state, so that the system's are not touched and no privilege is needed.
fn private_apt(dir: &Path) -> Result<Vec<String>> {
    ensure!(
        Path::new(DEBIAN_KEYRING).exists(),
        "Debian's archive keys are missing; `sudo apt-get install debian-archive-keyring`"
    );
    let mirror = std::env::var(MIRROR).with_context(|| {
        format!(
            "apt offers no such kernel: add Debian 12's `bookworm-security` to its sources, or set {MIRROR} to the \
             address of a mirror of it"
        )
    })?;
    let home = dir.join("apt");
    for sub in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(home.join(sub))?;
    }
    let sources = home.join("sources.list");
    fs::write(&sources, format!("deb [signed-by={DEBIAN_KEYRING}] {mirror} bookworm-security main\n"))?;
    let options = [
        format!("Dir::State={}", home.join("state").display()),
        format!("Dir::Cache={}", home.join("cache").display()),
        format!("Dir::Etc::SourceList={}", sources.display()),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        "Dir::State::Status=/dev/null".to_owned(),
        "APT::Architecture=amd64".to_owned(),
        "APT::Sandbox::User=root".to_owned(),
    ];
    Ok(options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect())
}

fn newest(series: Series, options: &[String]) -> Result<Option<String>> {
    let pattern = format!("^{}.*{PACKAGE_SUFFIX}$", series.package_prefix().replace('.', "\\."));
    let listing = Cmd::new("apt-cache").args(options).args(["search", "--names-only", &pattern]).output()?;
    Ok(newest_of(series, &listing))
}

/// The newest signed image in the lines that `apt-cache search` prints.
fn newest_of(series: Series, listing: &str) -> Option<String> {
    listing
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with(series.package_prefix()) && name.ends_with(PACKAGE_SUFFIX))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

/// The numbers in a name, so that 6.12.117 sorts after 6.12.99.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|run| run.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_is_by_number_and_skips_debug_unsigned_and_meta_packages() {
        let listing = "linux-image-6.12-cloud-amd64 - Linux for x86-64 cloud (meta-package)\n\
                       linux-image-6.12.99+deb12-cloud-amd64 - Linux 6.12 for x86-64 cloud (signed)\n\
                       linux-image-6.12.117+deb12-cloud-amd64 - Linux 6.12 for x86-64 cloud (signed)\n\
                       linux-image-6.12.118+deb12-cloud-amd64-dbg - Debug symbols\n\
                       linux-image-6.12.118+deb12-cloud-amd64-unsigned - Linux 6.12 for x86-64 cloud\n\
                       linux-image-6.1.0-56-cloud-amd64 - Linux 6.1 for x86-64 cloud (signed)\n";
        assert_eq!(newest_of(Series::V6_12, listing).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest_of(Series::V6_1, listing).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest_of(Series::V6_12, ""), None);
    }
}
