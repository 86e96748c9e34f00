//! What must be installed, apart from the eBPF toolchain (see `toolchain`). No other file has these names.

/// A Debian or Ubuntu package, and how to check that it is installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package {
    pub name: &'static str,
    /// A program in the package, or a file if it begins with a slash.
    pub brings: &'static str,
}

const fn package(name: &'static str, brings: &'static str) -> Package {
    Package { name, brings }
}

/// To compile the program: ring, which the userspace backend uses, is partly in C.
pub const BUILD: &[Package] = &[package("gcc", "cc"), package("libc6-dev", "/usr/include/stdlib.h")];

/// To build two sites out of network namespaces and drive traffic through them.
pub const LAB: &[Package] = &[
    package("iproute2", "ip"),
    package("iperf3", "iperf3"),
    package("iputils-ping", "ping"),
    package("nftables", "nft"),
    // Runs the unit in namespaces; this machine need not be started by it.
    package("systemd", "/lib/systemd/systemd"),
];

/// To run a virtual machine, and to make its root file system.
pub const VM: &[Package] = &[
    package("qemu-system-x86", "qemu-system-x86_64"),
    package("busybox-static", "busybox"),
    package("cpio", "cpio"),
    package("kmod", "depmod"),
    package("xz-utils", "xz"),
    package("zstd", "zstd"),
    // Debian's kernels come from Debian's archive on Ubuntu too.
    package("debian-archive-keyring", "/usr/share/keyrings/debian-archive-keyring.gpg"),
];

/// To compile libFuzzer, which is in C++.
pub const FUZZ: &[Package] = &[package("g++", "c++")];

/// To run the simulation, and to build its kernel. The package of the kernel's source is in `sim::kernel`.
pub const SIM: &[Package] = &[
    package("busybox-static", "busybox"),
    package("make", "make"),
    package("gcc", "cc"),
    package("libc6-dev", "/usr/include/stdlib.h"),
    package("patch", "patch"),
    package("binutils", "strip"),
    package("flex", "flex"),
    package("bison", "bison"),
    package("bc", "bc"),
    package("libelf-dev", "/usr/include/gelf.h"),
    package("libssl-dev", "/usr/include/openssl/ssl.h"),
    package("dwarves", "pahole"),
    package("xz-utils", "xz"),
    package("kmod", "depmod"),
    package("python3-minimal", "python3"),
];

/// Arguments of the cargo that installs cargo-deny. A debug build is fast enough, and takes half as long to compile.
pub const CARGO_DENY_INSTALL: [&str; 6] = ["install", "--locked", "--debug", "cargo-deny", "--version", "0.20.2"];

/// LLVM's own package source, for Ubuntu releases without the required version; `{}` is the release's code name.
pub const LLVM_SOURCE: &str = "http://apt.llvm.org/{}/ llvm-toolchain-{}-22 main";
/// The key that signs them.
pub const LLVM_KEY: &str = "https://apt.llvm.org/llvm-snapshot.gpg.key";
