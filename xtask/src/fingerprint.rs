//! A fingerprint of the sources of the eBPF object. `cargo xtask build-ebpf` writes it next to the object.
//! `ecmpvpn/build.rs` compares it, so that no stale object is ever embedded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The object, below the workspace.
pub const OBJECT: &str = "target/ebpf/ecmpvpn.o";
/// Its fingerprint and toolchain, one for each line, below the workspace.
pub const RECORD: &str = "target/ebpf/ecmpvpn.o.fingerprint";
/// Everything that goes into the object, below the workspace.
pub const SOURCES: [&str; 5] = [
    "ecmpvpn-common/Cargo.toml",
    "ecmpvpn-common/src",
    "ecmpvpn-ebpf/Cargo.toml",
    "ecmpvpn-ebpf/src",
    "xtask/src/build_ebpf.rs",
];

/// The 64-bit offset basis of FNV-1a.
const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// A hash of the names and contents of all [`SOURCES`] in `workspace`, in hexadecimal.
///
/// # Errors
/// A source cannot be read.
pub fn fingerprint(workspace: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&workspace.join(source), &mut files)?;
    }
    files.sort();
    let mut hash = OFFSET;
    for file in files {
        let name = file.strip_prefix(workspace).unwrap_or(&file);
        absorb(&mut hash, name.as_os_str().as_encoded_bytes());
        absorb(&mut hash, &fs::read(&file)?);
    }
    Ok(format!("{hash:016x}"))
}

/// A hash of several texts, in hexadecimal.
#[allow(dead_code, reason = "the build script of ecmpvpn, which includes this file, has no use for it")]
pub fn of<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = OFFSET;
    for text in texts {
        absorb(&mut hash, text.as_bytes());
    }
    format!("{hash:016x}")
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            collect(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_owned());
    }
    Ok(())
}

/// FNV-1a. The length comes first, so that two different lists of byte strings do not give the same input.
fn absorb(hash: &mut u64, bytes: &[u8]) {
    for byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
        *hash = (*hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
}
