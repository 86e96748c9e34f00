//! The virtual machine's root file system: this machine's own tools with their shared libraries, the kernel's network
//! modules, and a PID 1. It is built once for each kernel and kept. The files of one run are appended as a second
//! archive.

use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use crate::sh::{self, Cmd};

/// Copied from this host. iproute2's tools come before busybox's in PATH, since the labs need the real ones.
const TOOLS: &[&str] = &["bash", "dash", "busybox", "kmod", "ip", "tc", "bridge", "ss", "ping", "iperf3"];
/// Copied if this host has them.
const OPTIONAL_TOOLS: &[&str] = &["ethtool", "nft", "tracepath", "wg", "bpftool", "strace", "stty"];
/// Other names of programs. modprobe is not at the path where the kernel looks for it: during the boot the kernel
/// requests dozens of modules that do not exist, and each request costs an emulated CPU 0.1 s. PID 1 sets the path
/// later.
const LINKS: &[(&str, &str)] =
    &[("usr/bin/sh", "dash"), ("usr/bin/modprobe", "kmod"), ("usr/bin/insmod", "kmod"), ("usr/bin/lsmod", "kmod")];
/// Data files that tools read, copied if present.
const DATA: &[&str] = &[
    "/etc/protocols",
    "/etc/services",
    "/etc/iproute2",
    "/usr/share/iproute2",
    "/usr/lib/tc",
    "/lib/terminfo/v/vt220",
    "/usr/share/terminfo/v/vt220",
];
/// Parts of the kernel's module tree, with everything below them; the kernel loads modules from them on request. No
/// more than needed, since every MiB delays the boot.
const MODULE_TREES: &[&str] = &[
    "arch/x86/crypto",
    "crypto",
    "drivers/net/bonding",
    "drivers/net/ipvlan",
    "drivers/net/vxlan",
    "drivers/net/wireguard",
    "drivers/virtio",
    "lib",
    "net/802",
    "net/8021q",
    "net/bridge",
    "net/core",
    "net/ipv4",
    "net/ipv6",
    "net/key",
    "net/llc",
    "net/netlink",
    "net/sched",
    "net/tls",
    "net/unix",
    "net/xfrm",
];
/// Directories of which only the modules are copied, and not the subdirectories.
const MODULE_DIRS: &[&str] = &["drivers/char", "drivers/net", "net/netfilter", "net/packet"];
/// The settings of every systemd machine. Without them, loading the module makes a `bond0` that nobody needs.
const MODPROBE_CONF: &str = "options bonding max_bonds=0\noptions dummy numdummies=0\noptions ifb numifbs=0\n";
const INIT: &str = include_str!("init.sh");

/// The base archive of `kernel` below `dir`. Builds it if it is missing or out of date.
pub fn base(kernel: &Kernel, dir: &Path) -> Result<PathBuf> {
    let archive = dir.join("base.cpio");
    let key_file = dir.join("base.key");
    let (tools, key) = tools(kernel)?;
    if archive.exists() && fs::read_to_string(&key_file).is_ok_and(|found| found == key) {
        return Ok(archive);
    }
    let step = sh::step("building the virtual machine's root file system");
    let _ = fs::remove_file(&key_file);
    let stage = stage(dir);
    if stage.exists() {
        fs::remove_dir_all(&stage)?;
    }
    skeleton(&stage)?;
    for tool in &tools {
        add_program(&stage, None, tool, tool)?;
    }
    applets(&stage)?;
    for (link, target) in LINKS {
        symlink(target, stage.join(link)).with_context(|| format!("linking {link} in the initramfs"))?;
    }
    for path in DATA.iter().map(Path::new).filter(|path| path.exists()) {
        copy_tree(path, &inside(&stage, path))?;
    }
    modules(kernel, &stage)?;
    pack(&stage, &archive)?;
    fs::write(key_file, key)?;
    step.done("");
    Ok(archive)
}

/// Packs `copies` (source, destination in the machine) and the command into an archive of their own.
pub fn extra(dir: &Path, run_dir: &Path, copies: &[(PathBuf, PathBuf)], files: &[(&str, String)]) -> Result<PathBuf> {
    let root = run_dir.join("root");
    for (source, destination) in copies {
        let source = fs::canonicalize(source).with_context(|| format!("--copy {}", source.display()))?;
        if source.is_dir() {
            copy_tree(&source, &inside(&root, destination))?;
        } else {
            add_program(&root, Some(&stage(dir)), &source, destination)?;
        }
    }
    for (path, content) in files {
        let file = root.join(path);
        fs::create_dir_all(file.parent().unwrap_or(&root))?;
        fs::write(&file, content)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    let archive = run_dir.join("extra.cpio");
    pack(&root, &archive)?;
    Ok(archive)
}

fn stage(dir: &Path) -> PathBuf {
    dir.join("root")
}

/// The tools to copy, and a text that changes whenever the archive would change.
fn tools(kernel: &Kernel) -> Result<(Vec<PathBuf>, String)> {
    let mut found = Vec::new();
    let mut key = format!(
        "{}\n{INIT}\n{TOOLS:?}{OPTIONAL_TOOLS:?}{LINKS:?}{DATA:?}{MODULE_TREES:?}{MODULE_DIRS:?}{MODPROBE_CONF}\n",
        kernel.package
    );
    for tool in TOOLS.iter().chain(OPTIONAL_TOOLS) {
        let Some(path) = sh::which(tool) else {
            ensure!(
                OPTIONAL_TOOLS.contains(tool),
                "the virtual machine needs `{tool}` from this machine; `cargo xtask setup` installs it"
            );
            continue;
        };
        let path = merged(&path);
        let meta = fs::metadata(&path)?;
        writeln!(key, "{} {} {:?}", path.display(), meta.len(), meta.modified().ok())?;
        found.push(path);
    }
    Ok((found, key))
}

fn skeleton(stage: &Path) -> Result<()> {
    for dir in [
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "root",
        "etc/modprobe.d",
        "var",
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "usr/local/bin",
    ] {
        fs::create_dir_all(stage.join(dir))?;
    }
    for dir in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{dir}"), stage.join(dir))?;
    }
    symlink("../run", stage.join("var/run"))?;
    fs::write(stage.join("etc/passwd"), "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    fs::write(stage.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::write(stage.join("etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    fs::write(stage.join("etc/modprobe.d/ecmpvpn.conf"), MODPROBE_CONF)?;
    Ok(())
}

/// Links for every busybox applet, in a directory that comes last in PATH.
fn applets(stage: &Path) -> Result<()> {
    let dir = stage.join("usr/lib/applets");
    fs::create_dir_all(&dir)?;
    for applet in Cmd::new("busybox").arg("--list").output()?.lines() {
        symlink("/usr/bin/busybox", dir.join(applet))?;
    }
    Ok(())
}

fn modules(kernel: &Kernel, stage: &Path) -> Result<()> {
    let release = kernel.modules.file_name().context("the kernel's module directory has no name")?;
    let to = stage.join("lib/modules").join(release);
    fs::create_dir_all(to.join("kernel"))?;
    let (from_kernel, to_kernel) = (kernel.modules.join("kernel"), to.join("kernel"));
    for tree in MODULE_TREES.iter().filter(|tree| from_kernel.join(tree).exists()) {
        copy_tree(&from_kernel.join(tree), &to_kernel.join(tree))?;
    }
    for dir in MODULE_DIRS.iter().filter(|dir| from_kernel.join(dir).exists()) {
        for entry in fs::read_dir(from_kernel.join(dir))?.flatten().filter(|entry| entry.path().is_file()) {
            place(&entry.path(), &to_kernel.join(dir).join(entry.file_name()))?;
        }
    }
    for file in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        if kernel.modules.join(file).exists() {
            fs::copy(kernel.modules.join(file), to.join(file))?;
        }
    }
    // Decompressed here once, so that the emulated CPU need not do it at each boot.
    let decompress = "find . -name '*.ko.xz' -print0 | xargs -0 -r -P2 -n32 xz -d && \
                      find . -name '*.ko.zst' -print0 | xargs -0 -r -P2 -n32 zstd -q -d --rm";
    Cmd::new("sh").args(["-c", decompress]).dir(&to).quiet().run()?;
    Cmd::new("depmod").arg("-b").arg(stage).arg(release).quiet().run()
}

/// Copies the program at `source` and the libraries that it needs into `root`, except those that `base` already has.
fn add_program(root: &Path, base: Option<&Path>, source: &Path, destination: &Path) -> Result<()> {
    let placed = inside(root, destination);
    place(source, &placed)?;
    // Debug information is most of a program's size and delays the boot. Panics name file and line without it.
    if base.is_some() && is_elf(source) && sh::which("strip").is_some() {
        Cmd::new("strip").arg("--strip-debug").arg(&placed).quiet().run()?;
    }
    for library in libraries(source)? {
        let library = merged(&library);
        if base.is_some_and(|base| inside(base, &library).exists()) || inside(root, &library).exists() {
            continue;
        }
        place(&library, &inside(root, &library))?;
    }
    Ok(())
}

/// The shared libraries of `program` and its loader; none for scripts, data and static programs.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    if !is_elf(program) {
        return Ok(Vec::new());
    }
    let mut ldd = Cmd::new("ldd").arg(program).into_inner();
    let output = ldd.stdin(Stdio::null()).output().context("starting `ldd`")?;
    // ldd fails on static programs; those need nothing.
    if !output.status.success() {
        return Ok(Vec::new());
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!text.contains("not found"), "{} lacks a library on this machine:\n{text}", program.display());
    Ok(parse_ldd(&text))
}

fn is_elf(file: &Path) -> bool {
    let mut magic = [0_u8; 4];
    fs::File::open(file).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

fn parse_ldd(text: &str) -> Vec<PathBuf> {
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// A copy that follows links and keeps the mode.
fn place(source: &Path, destination: &Path) -> Result<()> {
    let copied = || -> std::io::Result<()> {
        if let Some(parent) = destination.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(source, destination).map(|_| ())
    };
    copied().with_context(|| format!("copying {} into the initramfs", source.display()))
}

fn copy_tree(source: &Path, destination: &Path) -> Result<()> {
    if let Some(parent) = destination.parent() {
        fs::create_dir_all(parent)?;
    }
    Cmd::new("cp").args(["-rL", "--no-preserve=ownership", "-T"]).arg(source).arg(destination).quiet().run()
}

/// An absolute path of the virtual machine, below `root`.
fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(merged(path).strip_prefix("/").unwrap_or(path))
}

/// `/bin`, `/sbin`, `/lib` and `/lib64` are links into `/usr` in the virtual machine.
fn merged(path: &Path) -> PathBuf {
    let mut parts = path.components();
    if parts.next() == Some(Component::RootDir)
        && let Some(Component::Normal(first)) = parts.next()
        && ["bin", "sbin", "lib", "lib64"].iter().any(|dir| first == *dir)
    {
        return Path::new("/usr").join(first).join(parts.as_path());
    }
    path.to_owned()
}

fn pack(root: &Path, archive: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let partial = archive.with_extension("partial");
    let script = format!(
        "find . -mindepth 1 -print0 | LC_ALL=C sort -z | cpio --quiet -0 -o -H newc -R 0:0 >{}",
        sh::quote(&partial.to_string_lossy())
    );
    Cmd::new("sh").args(["-c", &script]).dir(root).quiet().run()?;
    fs::rename(partial, archive)?;
    Ok(())
}

/// PID 1's script, for one run.
pub fn init(nonce: &str, rows: &str, columns: &str) -> String {
    INIT.replace("@NONCE@", nonce).replace("@ROWS@", rows).replace("@COLUMNS@", columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines_give_libraries_and_loader() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(text), expected);
        assert!(parse_ldd("\tstatically linked\n").is_empty());
    }

    #[test]
    fn paths_follow_the_merged_usr() {
        assert_eq!(inside(Path::new("/stage"), Path::new("/bin/ecmpvpn")), Path::new("/stage/usr/bin/ecmpvpn"));
        assert_eq!(inside(Path::new("/stage"), Path::new("/opt/bin/x")), Path::new("/stage/opt/bin/x"));
        assert_eq!(merged(Path::new("/lib64/ld.so")), Path::new("/usr/lib64/ld.so"));
    }

    #[test]
    fn init_carries_the_nonce_in_every_report() {
        let script = init("abc123", "24", "80");
        assert!(script.contains("abc123 start") && script.contains("abc123 exit") && !script.contains('@'));
    }
}
