//! `cargo xtask setup`: installs what is missing, and only that. It uses root only for apt.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};

use crate::packages::{self, Package};
use crate::sh::{self, Cmd};
use crate::vm::kernel::Series;
use crate::{sim, toolchain};

/// Arguments of `cargo xtask setup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only print what is missing; exit status 1 if something is
    #[arg(long)]
    check: bool,
    /// Leave out what only the emulated machines need
    #[arg(long)]
    no_vm: bool,
    /// Leave out the simulation; building its kernel takes 6 to 12 minutes
    #[arg(long)]
    no_sim: bool,
}

/// A group of things that a task may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A C compiler.
    Build,
    /// Compiler and linker for the eBPF programs.
    Ebpf,
    /// Tools for the lab in namespaces.
    Lab,
    /// The simulation's kernel, and the tools that build it.
    Sim,
    /// QEMU and the tools that make a root file system.
    Vm,
    /// cargo-deny.
    Lint,
    /// A C++ compiler, for libFuzzer.
    Fuzz,
}

/// `cargo xtask setup`; returns the exit status.
pub fn main(args: &Args) -> Result<i32> {
    let mut parts = vec![Part::Build, Part::Ebpf, Part::Lab, Part::Lint, Part::Fuzz];
    if !args.no_vm {
        parts.push(Part::Vm);
    }
    if !args.no_sim {
        parts.push(Part::Sim);
    }
    if args.check {
        let missing = missing(&parts);
        for thing in &missing {
            println!("missing: {thing}");
        }
        if missing.is_empty() {
            println!("nothing is missing");
        }
        return Ok(i32::from(!missing.is_empty()));
    }
    ensure(&parts)?;
    sh::note("everything that is needed is installed");
    Ok(0)
}

/// Installs what `parts` need and this machine lacks.
pub fn ensure(parts: &[Part]) -> Result<()> {
    let missing = missing_packages(parts);
    if !missing.is_empty() {
        let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
        apt_install(&names, "tools that building and testing need")?;
        let left = missing_packages(parts);
        ensure!(left.is_empty(), "apt has installed {names:?}, yet `{}` is not there", left[0].brings);
    }
    if parts.contains(&Part::Ebpf) && toolchain::detect(None).is_err() {
        ebpf_toolchain()?;
    }
    if parts.contains(&Part::Lint) && !has_cargo_deny() {
        let step = sh::step("installing cargo-deny (a few minutes)");
        cargo().args(packages::CARGO_DENY_INSTALL).quiet().retried(2)?;
        step.done("");
    }
    if parts.contains(&Part::Sim) {
        simulation(Series::V6_12)?;
    }
    Ok(())
}

/// Installs the source of the simulation's kernel from apt if it is missing, and builds the kernel if it is not built.
pub fn simulation(series: Series) -> Result<()> {
    if sim::kernel::built(series).is_none() && sim::kernel::version(series).is_err() {
        let package = sim::kernel::package(series);
        apt_install(&[package.as_str()], "the source of the simulation's kernel")?;
    }
    sim::kernel::get(series).map(drop)
}

/// What `parts` need and this machine lacks, as text.
fn missing(parts: &[Part]) -> Vec<String> {
    let mut missing: Vec<String> = missing_packages(parts)
        .iter()
        .map(|package| format!("{} (package {})", package.brings, package.name))
        .collect();
    if parts.contains(&Part::Ebpf)
        && let Err(why) = toolchain::detect(None)
    {
        missing.push(format!("{why:#}"));
    }
    if parts.contains(&Part::Lint) && !has_cargo_deny() {
        missing.push("cargo-deny".to_owned());
    }
    if parts.contains(&Part::Sim) && sim::kernel::built(Series::V6_12).is_none() {
        missing.push("the simulation's kernel, which is built in 6 to 12 minutes".to_owned());
    }
    missing
}

fn missing_packages(parts: &[Part]) -> Vec<Package> {
    let of = |part: &Part| match part {
        Part::Build => packages::BUILD,
        Part::Lab => packages::LAB,
        Part::Vm => packages::VM,
        Part::Sim => packages::SIM,
        Part::Fuzz => packages::FUZZ,
        Part::Ebpf | Part::Lint => &[],
    };
    parts.iter().flat_map(of).filter(|package| !is_there(package.brings)).copied().collect()
}

fn is_there(what: &str) -> bool {
    if what.starts_with('/') { Path::new(what).exists() } else { sh::which(what).is_some() }
}

fn has_cargo_deny() -> bool {
    cargo_bin("cargo-deny").is_some()
}

/// Looks for the program also where `cargo install` puts it, which PATH may lack.
fn cargo_bin(name: &str) -> Option<std::path::PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(std::path::PathBuf::from);
    let home = home.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cargo")))?;
    sh::which(name).or_else(|| Some(home.join("bin").join(name)).filter(|file| file.is_file()))
}

/// The cargo that runs this program. It gets no target directory that it would share with a running build.
fn cargo() -> Cmd {
    Cmd::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).env_remove("CARGO_TARGET_DIR")
}

/// Installs Debian's compiler if apt offers it, else rustup's; then a linker for it.
fn ebpf_toolchain() -> Result<()> {
    if !toolchain::has_compiler() {
        ebpf_compiler()?;
    }
    if toolchain::detect(None).is_ok() {
        return Ok(());
    }
    let llvm = missing_of(&toolchain::LINKER_PACKAGES);
    if !llvm.is_empty() {
        if !offered(&llvm)? {
            add_llvm_source()?;
        }
        apt_install(&llvm, "LLVM, which the linker of the eBPF programs is built with")?;
    }
    let step = sh::step("installing bpf-linker (about 70 s)");
    let (variable, value) = toolchain::LINKER_ENVIRONMENT;
    cargo().args(toolchain::LINKER_INSTALL).arg("--force").env(variable, value).quiet().retried(2)?;
    step.done("");
    toolchain::detect(None).map(|_| ())
}

fn ebpf_compiler() -> Result<()> {
    // All of them, also those that are installed: the release's first version may be too old, and apt then upgrades it.
    if offered(&toolchain::DEBIAN_PACKAGES)? {
        apt_install(&toolchain::DEBIAN_PACKAGES, "a compiler that can build the eBPF programs")?;
        if toolchain::has_compiler() {
            return Ok(());
        }
        sh::note("that compiler is too old, or too new, for the linker");
    }
    ensure!(
        sh::which("rustup").is_some(),
        "apt does not offer {} with LLVM {}, and rustup is not installed: install rustup (https://rustup.rs), then run \
         this again",
        toolchain::DEBIAN_PACKAGES.join(" "),
        toolchain::LLVM
    );
    let step = sh::step(format!("installing {} through rustup", toolchain::RUSTUP_TOOLCHAIN));
    Cmd::new("rustup")
        .args(["toolchain", "install", toolchain::RUSTUP_TOOLCHAIN, "--profile", "minimal", "--component", "rust-src"])
        .quiet()
        .retried(3)?;
    step.done("");
    Ok(())
}

/// The packages among `names` that are not installed.
fn missing_of<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let installed = |name: &str| {
        let query = Cmd::new("dpkg-query").args(["-W", "-f", "${db:Status-Status}", name]).output();
        query.is_ok_and(|status| status.trim() == "installed")
    };
    names.iter().copied().filter(|name| !installed(name)).collect()
}

/// Whether apt offers a version of each. Fetches apt's lists first, since old lists have old versions.
fn offered(names: &[&str]) -> Result<bool> {
    static FETCHED: AtomicBool = AtomicBool::new(false);
    if sh::which("apt-get").is_none() {
        return Ok(false);
    }
    if !FETCHED.load(Ordering::Relaxed) {
        match apt_update() {
            Ok(()) => FETCHED.store(true, Ordering::Relaxed),
            Err(error) => sh::note(format!("{error:#}; continuing with the existing lists")),
        }
    }
    candidates(names)
}

fn candidates(names: &[&str]) -> Result<bool> {
    if names.is_empty() {
        return Ok(true);
    }
    let policy = Cmd::new("apt-cache").arg("policy").args(names).env("LC_ALL", "C").output()?;
    Ok(have_candidates(&policy, names.len()))
}

/// Whether `apt-cache policy` names a candidate for each of `count` packages. It prints nothing about unknown packages.
fn have_candidates(policy: &str, count: usize) -> bool {
    let known = policy.lines().filter_map(|line| line.trim().strip_prefix("Candidate: "));
    known.filter(|version| *version != "(none)").count() == count
}

fn apt_install(names: &[&str], why: &str) -> Result<()> {
    if sh::which("apt-get").is_none() {
        bail!("{why} are missing and there is no apt here: install what these packages contain: {}", names.join(" "));
    }
    ensure!(
        offered(names)?,
        "apt does not offer all of {}: enable the release's own sources (on Ubuntu `universe` too)",
        names.join(" ")
    );
    let step = sh::step(format!("installing {why}: {}", names.join(" ")));
    apt_get()?.args(["install", "-y", "-q", "--no-install-recommends"]).args(names).quiet().retried(3)?;
    step.done("");
    Ok(())
}

fn apt_update() -> Result<()> {
    let step = sh::step("fetching apt's package lists");
    apt_get()?.args(["-q", "update"]).quiet().retried(3)?;
    step.done("");
    Ok(())
}

fn apt_get() -> Result<Cmd> {
    Ok(as_root("apt writes to the system")?.args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get"]))
}

/// `env` as root. Says so if that needs sudo.
fn as_root(why: &str) -> Result<Cmd> {
    if !sh::is_root() {
        ensure!(sh::which("sudo").is_some(), "{why}, and there is no sudo: run `cargo xtask setup` as root");
        sh::note(format!("sudo is needed: {why}"));
    }
    Ok(Cmd::root("env"))
}

/// Adds LLVM's own package source, for an Ubuntu release whose archive lacks the version.
fn add_llvm_source() -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let code_name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let code_name = code_name.context("this distribution has no code name, so LLVM's packages cannot be found")?;
    let key = "/etc/apt/keyrings/ecmpvpn-llvm.asc";
    let list = "/etc/apt/sources.list.d/ecmpvpn-llvm.list";
    let source = format!("deb [signed-by={key}] {}\n", packages::LLVM_SOURCE.replace("{}", code_name));
    sh::note(format!("apt has no {}; adding {list}: {}", toolchain::LINKER_PACKAGES[0], source.trim_end()));
    let script = format!(
        "set -e; mkdir -p /etc/apt/keyrings; curl -fsSL {} -o {key}; printf %s {} >{list}",
        packages::LLVM_KEY,
        sh::quote(&source)
    );
    as_root("LLVM's package source is added to apt's")?.args(["sh", "-c", &script]).quiet().retried(3)?;
    apt_update()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_counted() {
        let policy = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0\ncargo-web:\n  Candidate: (none)\n";
        assert!(have_candidates(policy, 1));
        assert!(!have_candidates(policy, 2));
        assert!(!have_candidates("", 1));
    }

    #[test]
    fn what_is_not_there_is_named() {
        assert!(is_there("sh") && is_there("/proc/self") && !is_there("no-such-program") && !is_there("/no/such/file"));
    }
}
