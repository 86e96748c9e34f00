//! Finds the eBPF object that `cargo xtask build-ebpf` made, for `dataplane` to embed.

#[path = "../xtask/src/fingerprint.rs"]
mod fingerprint;

use std::env;
use std::fs;
use std::path::Path;

use fingerprint::{OBJECT, RECORD, SOURCES, fingerprint};

fn main() {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let workspace = Path::new(&manifest).parent().expect("this package is in the workspace");
    for input in SOURCES.iter().chain([&OBJECT, &RECORD]) {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    let object = workspace.join(OBJECT);
    let record = fs::read_to_string(workspace.join(RECORD)).unwrap_or_default();
    let recorded = record.lines().next().unwrap_or_default();
    match fingerprint(workspace) {
        _ if !object.is_file() => println!("cargo::error=the eBPF object is not built: run `cargo xtask build-ebpf`"),
        Ok(current) if current == recorded => {
            println!("cargo::rustc-env=ECMPVPN_EBPF_OBJECT={}", object.display());
        }
        Ok(_) => println!("cargo::error=the eBPF object is older than its sources: run `cargo xtask build-ebpf`"),
        Err(error) => println!("cargo::error=reading the eBPF sources: {error}"),
    }
}
