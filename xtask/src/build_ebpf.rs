//! `cargo xtask build-ebpf`: compiles the eBPF programs into `target/ebpf/ecmpvpn.o`, which the program embeds.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::fingerprint::{OBJECT, RECORD, fingerprint};
use crate::toolchain::{self, ToolchainChoice};

/// The triple of little-endian BPF.
const TARGET: &str = "bpfel-unknown-none";
/// BTF for names and lines; the instructions of Linux 5.1; unaligned access to packet words.
const FLAGS: &str = "-C target-cpu=v3 -C link-arg=--btf -C link-arg=--cpu-features=+allows-misaligned-mem-access";
/// Separate from the outer cargo's directory. Otherwise the two would wait for each other and rebuild each other's
/// crates.
const TARGET_DIR: &str = "target/ebpf/build";

/// Builds the object unless it fits the current sources; returns its path.
///
/// # Errors
/// No toolchain fits, or compiling fails; cargo has then printed the reason on stderr.
pub fn build_ebpf(choice: Option<ToolchainChoice>) -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask is not in a workspace")?;
    let object = workspace.join(OBJECT);
    let fingerprint = fingerprint(workspace).context("reading the eBPF sources")?;
    if object.is_file() && is_current(&workspace.join(RECORD), &fingerprint, choice) {
        return Ok(object);
    }

    let toolchain = toolchain::detect(choice)?;
    eprintln!("building the eBPF programs with {toolchain}");
    let status = toolchain
        .cargo()
        .current_dir(workspace)
        .args(["build", "--quiet", "--locked", "--release", "--package", "ecmpvpn-ebpf", "--bin", "ecmpvpn-ebpf"])
        .args(["-Z", "build-std=core", "--target", TARGET, "--target-dir", TARGET_DIR])
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &toolchain.linker)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", FLAGS)
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("compiling the eBPF programs failed with {toolchain}");
    }

    let built = workspace.join(TARGET_DIR).join(TARGET).join("release/ecmpvpn-ebpf");
    // Renamed into place, so that a build that runs at the same time never reads half an object.
    let fresh = object.with_extension("o.new");
    fs::copy(&built, &fresh).with_context(|| format!("copying {}", built.display()))?;
    fs::rename(&fresh, &object).with_context(|| format!("writing {}", object.display()))?;
    fs::write(workspace.join(RECORD), format!("{fingerprint}\n{}\n{toolchain}\n", toolchain.choice))
        .with_context(|| format!("writing {RECORD}"))?;
    Ok(object)
}

/// Whether the record says that the object was built from these sources and, if one is requested, with this toolchain.
fn is_current(record: &Path, fingerprint: &str, choice: Option<ToolchainChoice>) -> bool {
    let record = fs::read_to_string(record).unwrap_or_default();
    let mut lines = record.lines();
    let same = lines.next() == Some(fingerprint);
    same && choice.is_none_or(|choice| lines.next() == Some(choice.to_string().as_str()))
}
