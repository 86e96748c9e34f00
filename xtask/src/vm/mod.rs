//! A virtual machine with a distribution's kernel (WireGuard, bonding, shapers, tcx), on any host, with or without KVM.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub mod accel;
pub mod death;
pub mod initramfs;
pub mod kernel;
pub mod run;

use crate::setup::{self, Part};
use crate::sh;
pub use accel::Accel;
use kernel::Series;
use run::Request;

/// Arguments of `cargo xtask vm`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kernel series
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Series,
    /// Virtual CPUs
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory, in MiB; it also holds the root file system
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// Time limit of the command, in seconds
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Copy a file or directory into the machine, a program with its shared libraries. Without DEST: below /root
    #[arg(long = "copy", value_name = "SRC[:DEST]")]
    copies: Vec<String>,
    /// Set a variable for the command
    #[arg(long = "env", value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Use KVM or emulation [default: KVM if it really works]
    #[arg(long, value_enum)]
    accel: Option<Accel>,
    /// The command to run; without it, an interactive shell
    #[arg(last = true)]
    command: Vec<String>,
}

/// `cargo xtask vm`; returns the command's exit status.
pub fn main(args: Args) -> Result<i32> {
    setup::ensure(&[Part::Lab, Part::Vm])?;
    let request = Request {
        series: args.kernel,
        cpus: args.cpus,
        memory_mib: args.memory,
        timeout: Duration::from_secs(args.timeout),
        copies: args.copies.iter().map(|copy| parse_copy(copy)).collect::<Result<_>>()?,
        env: args.env,
        command: args.command,
    };
    run(&request, args.accel, &mut run::to_stdout)
}

/// Runs `request` and returns the command's exit status. `accel`: `None` to find out what works.
pub fn run(request: &Request, accel: Option<Accel>, sink: &mut run::Sink<'_>) -> Result<i32> {
    prepare(request.series)?;
    let accel = match accel {
        Some(accel) => accel,
        None => detect(request.series)?,
    };
    run::run(request, &dir(request.series), accel, sink)
}

/// Fetches the kernel and builds the root file system if they are missing. One process does it, others wait.
pub fn prepare(series: Series) -> Result<()> {
    let dir = &dir(series);
    fs::create_dir_all(dir)?;
    let lock = File::create(dir.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("locking the kernel's directory")?;
    let kernel = kernel::get(series, dir)?;
    initramfs::base(&kernel, dir)?;
    Ok(())
}

fn dir(series: Series) -> PathBuf {
    sh::target().join("vm").join(series.name())
}

/// Finds out whether KVM works here. A nested KVM may exist and fail, so this boots a machine with it. The result is
/// kept until this host reboots.
pub fn detect(series: Series) -> Result<Accel> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accel::Tcg);
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let remembered = sh::target().join("vm/accel");
    if let Ok(text) = fs::read_to_string(&remembered)
        && let Some((boot, accel)) = text.split_once(' ')
        && boot == boot_id.trim()
    {
        return Ok(if accel.trim() == "kvm" { Accel::Kvm } else { Accel::Tcg });
    }
    let step = sh::step("trying KVM");
    let probe = Request {
        series,
        cpus: 2,
        memory_mib: 1024,
        timeout: Duration::from_secs(20),
        copies: Vec::new(),
        env: Vec::new(),
        command: vec!["true".to_owned()],
    };
    let works = run::boots(&probe, &dir(series), Accel::Kvm);
    let accel = if works { Accel::Kvm } else { Accel::Tcg };
    step.done(if works { "it works" } else { "it does not work here; emulating" });
    fs::write(remembered, format!("{} {}\n", boot_id.trim(), if works { "kvm" } else { "tcg" }))?;
    Ok(accel)
}

/// `SRC[:DEST]`; without DEST the file keeps its name, below `/root`. A DEST that ends in a slash is a directory.
fn parse_copy(text: &str) -> Result<(PathBuf, PathBuf)> {
    let (source, destination) = match text.rsplit_once(':') {
        Some((source, destination)) => (PathBuf::from(source), destination),
        None => (PathBuf::from(text), "/root/"),
    };
    if !destination.starts_with('/') {
        bail!("--copy {text}: the destination must be an absolute path");
    }
    if !destination.ends_with('/') {
        return Ok((source, PathBuf::from(destination)));
    }
    let name = source.file_name().with_context(|| format!("--copy {text}: the source has no file name"))?.to_owned();
    Ok((source, Path::new(destination).join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_parsed() {
        let parsed =
            |text: &str| parse_copy(text).map(|(from, to)| (from.display().to_string(), to.display().to_string()));
        assert_eq!(parsed("a/b").unwrap(), ("a/b".to_owned(), "/root/b".to_owned()));
        assert_eq!(parsed("a/b:/bin/c").unwrap(), ("a/b".to_owned(), "/bin/c".to_owned()));
        assert_eq!(parsed("a/b:/bin/").unwrap(), ("a/b".to_owned(), "/bin/b".to_owned()));
        assert!(parsed("a/b:bin").is_err());
    }
}
