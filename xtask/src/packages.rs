//! What has to be installed, apart from the eBPF toolchain, which `toolchain` knows: the one place with these names.

/// A Debian or Ubuntu package, and how to see that what it brings is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package {
    /// Its name for apt.
    pub name: &'static str,
    /// A program, or a file if it begins with a slash.
    pub brings: &'static str,
}

const fn package(name: &'static str, brings: &'static str) -> Package {
    Package { name, brings }
}

/// To compile the program: aws-lc-sys, which the userspace backend uses, is C.
pub const BUILD: &[Package] = &[package("gcc", "cc"), package("libc6-dev", "/usr/include/stdlib.h")];

/// To build two sites out of network namespaces and drive traffic through them.
pub const LAB: &[Package] = &[package("iproute2", "ip"), package("iperf3", "iperf3"), package("iputils-ping", "ping")];

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

/// To compile libFuzzer, which is C++.
pub const FUZZ: &[Package] = &[package("g++", "c++")];

/// To run the simulation, and to build its kernel. Its source is beside these: `sim::kernel` knows the package.
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

/// Arguments of the cargo that installs cargo-deny. Not optimised: it reads a lock file, and this takes half as long.
pub const CARGO_DENY_INSTALL: [&str; 6] = ["install", "--locked", "--debug", "cargo-deny", "--version", "0.20.2"];

/// Where LLVM's packages come from on an Ubuntu that has none of the version needed; `{}` is the release's code name.
pub const LLVM_SOURCE: &str = "http://apt.llvm.org/{}/ llvm-toolchain-{}-22 main";
/// The key that signs them.
pub const LLVM_KEY: &str = "https://apt.llvm.org/llvm-snapshot.gpg.key";
