//! Which compiler and linker build the eBPF programs. No other file has these versions.
//!
//! `bpfel-unknown-none` has no prebuilt `core`, so the compiler needs its own source. bpf-linker reads the
//! compiler's LLVM bitcode, so its LLVM must have the compiler's major version and must not be older. An older one
//! stops with "Invalid record".

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The rustup toolchain that builds the eBPF programs: rustc 1.99 with LLVM 22.1.8.
pub const RUSTUP_TOOLCHAIN: &str = "nightly-2026-07-15";
/// Debian packages of the compiler, its `core` source and cargo.
pub const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "libstd-rust-web-dev"];
/// The major version of LLVM that bpf-linker is built with, and that the compiler must have.
pub const LLVM: u32 = 22;
/// Debian packages that bpf-linker is built with: LLVM 22.1.8.
pub const LINKER_PACKAGES: [&str; 2] = ["llvm-22-dev", "libpolly-22-dev"];
/// An environment variable for the build of bpf-linker: where those packages put LLVM.
pub const LINKER_ENVIRONMENT: (&str, &str) = ("LLVM_PREFIX", "/usr/lib/llvm-22");
/// Arguments of the cargo that builds bpf-linker.
pub const LINKER_INSTALL: [&str; 7] =
    ["install", "bpf-linker", "--version", "0.13.0", "--no-default-features", "--features", "llvm-22"];

/// Where the compiler comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ToolchainChoice {
    /// A pinned nightly with rust-src, through rustup.
    Rustup,
    /// Debian's rustc-web and its companions, in /usr/bin.
    Debian,
}

impl fmt::Display for ToolchainChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rustup => "rustup",
            Self::Debian => "debian",
        })
    }
}

/// An LLVM release: major, minor, patch.
pub type LlvmVersion = (u32, u32, u32);

/// A compiler that can build the eBPF programs, and a linker that reads what it writes.
#[derive(Clone, Debug)]
pub struct Toolchain {
    pub choice: ToolchainChoice,
    /// The compiler's version line.
    pub rustc: String,
    /// The compiler's LLVM.
    pub llvm: LlvmVersion,
    /// Path of bpf-linker.
    pub linker: PathBuf,
    /// The linker's LLVM.
    pub linker_llvm: LlvmVersion,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { choice, rustc, linker, .. } = self;
        let (llvm, linker_llvm) = (show(self.llvm), show(self.linker_llvm));
        write!(f, "{choice}: {rustc} (LLVM {llvm}), {} (LLVM {linker_llvm})", linker.display())
    }
}

impl Toolchain {
    /// This toolchain's cargo, without the variables that an outer cargo has set.
    pub fn cargo(&self) -> Command {
        let mut cargo = tool(self.choice, "cargo");
        if self.choice == ToolchainChoice::Debian {
            // The packages' compiler is stable: this variable allows `-Z build-std`.
            cargo.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
        }
        cargo
    }
}

/// The toolchain to build with: the requested one, else rustup's, else Debian's.
///
/// # Errors
/// No toolchain fits. The message says what was found, what is needed and what installs it.
pub fn detect(choice: Option<ToolchainChoice>) -> Result<Toolchain> {
    let tried = match choice {
        Some(choice) => vec![choice],
        None => vec![ToolchainChoice::Rustup, ToolchainChoice::Debian],
    };
    let mut found = Vec::new();
    for choice in tried {
        match probe(choice) {
            Ok(toolchain) => return Ok(toolchain),
            Err(why) => found.push(format!("  {choice}: {why:#}")),
        }
    }
    bail!(
        "no toolchain here can build the eBPF programs.\n{}\n\
         Needed: rustup's {RUSTUP_TOOLCHAIN} with rust-src, or the Debian packages {}; and a bpf-linker whose LLVM is \
         the compiler's, or a later patch of it ({} and `{}={} cargo {}` make one).\n\
         `cargo xtask setup` installs what is missing.",
        found.join("\n"),
        DEBIAN_PACKAGES.join(" "),
        LINKER_PACKAGES.join(" "),
        LINKER_ENVIRONMENT.0,
        LINKER_ENVIRONMENT.1,
        LINKER_INSTALL.join(" "),
    )
}

/// What was found of each toolchain, one line for each, for people.
pub fn describe() -> String {
    let line = |choice| probe(choice).map_or_else(|why| format!("{choice}: {why:#}"), |found| found.to_string());
    format!("{}\n{}", line(ToolchainChoice::Rustup), line(ToolchainChoice::Debian))
}

/// Whether there is a compiler for which [`LINKER_INSTALL`] makes a linker.
pub fn has_compiler() -> bool {
    let fits = |choice| compiler(choice).is_ok_and(|(_, llvm)| llvm.0 == LLVM);
    [ToolchainChoice::Rustup, ToolchainChoice::Debian].into_iter().any(fits)
}

/// A compiler's version line and its LLVM, if its cargo and the source of its core library are installed too.
fn compiler(choice: ToolchainChoice) -> Result<(String, LlvmVersion)> {
    let name = match choice {
        ToolchainChoice::Rustup => RUSTUP_TOOLCHAIN,
        ToolchainChoice::Debian => "/usr/bin/rustc",
    };
    let verbose = output(tool(choice, "rustc").arg("-vV")).with_context(|| format!("{name} is not installed"))?;
    let rustc = verbose.lines().next().unwrap_or_default().to_owned();
    let llvm = verbose.lines().find_map(|line| line.strip_prefix("LLVM version: ")).and_then(parse_llvm);
    let llvm = llvm.with_context(|| format!("{rustc} does not say which LLVM it has"))?;
    let sysroot = output(tool(choice, "rustc").args(["--print", "sysroot"]))?;
    if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir() {
        bail!("{rustc} is there but not the source of its core library (rust-src)");
    }
    output(tool(choice, "cargo").arg("-V")).with_context(|| format!("{rustc} is there but not its cargo"))?;
    Ok((rustc, llvm))
}

fn probe(choice: ToolchainChoice) -> Result<Toolchain> {
    let (rustc, llvm) = compiler(choice)?;
    let linker = find_linker().with_context(|| format!("{rustc} is there but bpf-linker is not"))?;
    let linker_llvm = linker_llvm(choice, &linker)?;
    if linker_llvm.0 != llvm.0 || linker_llvm < llvm {
        bail!("{rustc} has LLVM {}, but {} has LLVM {}", show(llvm), linker.display(), show(linker_llvm));
    }
    Ok(Toolchain { choice, rustc, llvm, linker, linker_llvm })
}

/// `name` (rustc or cargo) of a toolchain, without the variables that an outer cargo sets for what it runs.
fn tool(choice: ToolchainChoice, name: &str) -> Command {
    let mut command = match choice {
        ToolchainChoice::Debian => Command::new(format!("/usr/bin/{name}")),
        ToolchainChoice::Rustup => {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", RUSTUP_TOOLCHAIN, name]);
            rustup
        }
    };
    for (variable, _) in env::vars_os() {
        if variable.to_str().is_some_and(is_foreign) {
            command.env_remove(variable);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// Whether a variable decides which compiler runs and how. Variables for cargo's files and network are kept.
fn is_foreign(variable: &str) -> bool {
    const KEPT: [&str; 6] =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_REGISTRY_", "CARGO_SOURCE_"];
    let cargo = variable.starts_with("CARGO") && !KEPT.iter().any(|kept| variable.starts_with(kept));
    cargo || variable.starts_with("RUSTC") || variable.starts_with("RUSTDOC") || {
        matches!(variable, "RUSTFLAGS" | "RUSTUP_TOOLCHAIN" | "RUST_RECURSION_COUNT")
    }
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}", said.lines().next().unwrap_or("it failed"));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// bpf-linker on PATH, or where `cargo install` puts it: sudo's PATH lacks that directory.
fn find_linker() -> Option<PathBuf> {
    let home = |name: &str, below: &str| env::var_os(name).map(|home| PathBuf::from(home).join(below));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(home("CARGO_HOME", "bin"))
        .chain(home("HOME", ".cargo/bin"))
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.is_file())
}

/// The linker's LLVM. The linker has no option that prints it, but writes it into its bitcode.
fn linker_llvm(choice: ToolchainChoice, linker: &Path) -> Result<LlvmVersion> {
    const SOURCE: &str = "#![no_std]\n#[inline(never)]\npub fn probe(x: &[u64]) -> u64 { x.iter().sum() }\n";
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    fs::write(at("probe.rs"), SOURCE)?;
    output(
        tool(choice, "rustc")
            .args(["--crate-type=lib", "--emit=llvm-bc", "-Copt-level=2", "-o"])
            .args([at("probe.bc"), at("probe.rs")]),
    )
    .context("compiling a probe")?;
    let run = Command::new(linker)
        .args(["--emit=llvm-bc", "--target=bpfel", "--export=probe", "-o"])
        .args([at("linked.bc"), at("probe.bc")])
        .output()
        .with_context(|| format!("starting {}", linker.display()))?;
    if !run.status.success() {
        let said = String::from_utf8_lossy(&run.stderr);
        bail!("{} cannot read this compiler's output: {}", linker.display(), said.trim());
    }
    producer(&fs::read(at("linked.bc"))?).with_context(|| format!("{} does not say its LLVM", linker.display()))
}

/// The version in a bitcode file's identification block: text such as `LLVM22.1.8`, six bits for each character.
/// Source: `writeIdentificationBlock()`, llvm/lib/Bitcode/Writer/BitcodeWriter.cpp.
fn producer(bitcode: &[u8]) -> Option<LlvmVersion> {
    const ALPHABET: &[u8; 64] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._";
    let bits = 8 * bitcode.len().min(64);
    let bit = |at: usize| usize::from(at < bits && bitcode[at / 8] >> (at % 8) & 1 == 1);
    let character = |at: usize| char::from(ALPHABET[(0..6).map(|i| bit(at + i) << i).sum::<usize>()]);
    (0..bits).find_map(|start| {
        let text: String = (start..bits).step_by(6).map(character).collect();
        parse_llvm(text.strip_prefix("LLVM")?)
    })
}

fn parse_llvm(text: &str) -> Option<LlvmVersion> {
    let end = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
    let mut parts = text[..end].split('.').map(|part| part.parse().ok());
    let version = (parts.next()??, parts.next()??, parts.next()??);
    Some(version)
}

fn show((major, minor, patch): LlvmVersion) -> String {
    format!("{major}.{minor}.{patch}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_an_outer_cargo_are_dropped() {
        for dropped in ["CARGO", "CARGO_PKG_NAME", "CARGO_TARGET_DIR", "RUSTC", "RUSTC_WRAPPER", "RUSTUP_TOOLCHAIN"] {
            assert!(is_foreign(dropped), "{dropped}");
        }
        for kept in ["PATH", "HOME", "CARGO_HOME", "CARGO_NET_OFFLINE", "RUSTUP_HOME", "RUST_BACKTRACE"] {
            assert!(!is_foreign(kept), "{kept}");
        }
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_llvm("22.1.8"), Some((22, 1, 8)));
        assert_eq!(parse_llvm("23.0.1-rust-1.99.0-nightly"), Some((23, 0, 1)));
        assert_eq!(parse_llvm("22"), None);
    }

    #[test]
    fn the_producer_is_read_at_any_bit_offset() {
        const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._";
        for offset in [0, 3, 6, 134] {
            let mut bitcode = [0u8; 64];
            for (i, character) in "LLVM22.1.8a".chars().enumerate() {
                let value = ALPHABET.find(character).unwrap();
                for bit in 0..6 {
                    let at = offset + 6 * i + bit;
                    bitcode[at / 8] |= u8::try_from(value >> bit & 1).unwrap() << (at % 8);
                }
            }
            assert_eq!(producer(&bitcode), Some((22, 1, 8)));
        }
        assert_eq!(producer(&[0; 64]), None);
    }
}
