//! Runs other programs, and reports what takes time. All progress goes to stderr.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A program to run. Every error names the program.
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    quiet: bool,
}

impl Cmd {
    /// `program`, found through PATH.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), quiet: false }
    }

    /// `program` as root: through sudo unless this already is root.
    pub fn root(program: impl AsRef<OsStr>) -> Self {
        if is_root() {
            return Self::new(program);
        }
        Self::new("sudo").arg("--").arg(program)
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub fn env_remove(mut self, key: &str) -> Self {
        self.command.env_remove(key);
        self
    }

    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Shows the program's output only if it fails.
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// The command line, quoted for a shell.
    pub fn line(&self) -> String {
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words.map(|word| quote(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }

    /// The command itself, for callers that use its pipes.
    pub fn into_inner(self) -> Command {
        self.command
    }

    fn started(&self, error: &std::io::Error) -> anyhow::Error {
        let program = self.command.get_program().to_string_lossy();
        if error.kind() == std::io::ErrorKind::NotFound && program == "sudo" {
            anyhow::anyhow!("`{}` needs root and there is no sudo: run this as root", self.line())
        } else if error.kind() == std::io::ErrorKind::NotFound {
            anyhow::anyhow!("`{program}` is not installed; `cargo xtask setup` installs what is needed")
        } else {
            anyhow::anyhow!("starting `{}`: {error}", self.line())
        }
    }

    /// Runs it and returns its exit status.
    pub fn status(&mut self) -> Result<ExitStatus> {
        self.command.status().map_err(|error| self.started(&error))
    }

    /// Runs it; anything but success is an error.
    pub fn run(mut self) -> Result<()> {
        self.run_once()
    }

    fn run_once(&mut self) -> Result<()> {
        if !self.quiet {
            let status = self.status()?;
            if !status.success() {
                bail!("`{}` failed ({status})", self.line());
            }
            return Ok(());
        }
        let output = self.command.stdin(Stdio::null()).output().map_err(|error| self.started(&error))?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].concat();
            bail!("`{}` failed ({}):\n{}", self.line(), output.status, tail(&String::from_utf8_lossy(&text), 20));
        }
        Ok(())
    }

    /// Runs it up to `times` times, for programs that may fail because of the network.
    pub fn retried(mut self, times: u32) -> Result<()> {
        let mut tried = 1;
        loop {
            match self.run_once() {
                Ok(()) => return Ok(()),
                Err(error) if tried < times => {
                    note(format!("{error:#}; trying again"));
                    std::thread::sleep(Duration::from_secs(2));
                    tried += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Runs it and returns what it printed on stdout.
    pub fn output(mut self) -> Result<String> {
        let output = self.command.stdin(Stdio::null()).output().map_err(|error| self.started(&error))?;
        if !output.status.success() {
            bail!(
                "`{}` failed ({}):\n{}",
                self.line(),
                output.status,
                tail(&String::from_utf8_lossy(&output.stderr), 20)
            );
        }
        String::from_utf8(output.stdout)
            .with_context(|| format!("`{}` printed something that is not text", self.line()))
    }
}

/// Quotes `word` so that a POSIX shell reads it as one word.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%^".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Finds `program` in PATH, and in the administrator's directories, which a user's PATH often lacks.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The only file in `dir` with this extension.
pub fn only_file_with_extension(dir: &Path, extension: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(path), true) => Ok(path),
        _ => bail!("expected one .{extension} file in {}", dir.display()),
    }
}

pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Prints a note for the user.
pub fn note(text: impl AsRef<str>) {
    eprintln!("   {}", text.as_ref());
}

/// Work that takes some time. It is announced when it begins, and its duration is printed at the end.
#[derive(Debug)]
pub struct Step {
    what: String,
    since: Instant,
}

pub fn step(what: impl Into<String>) -> Step {
    let what = what.into();
    eprintln!("==> {what}");
    Step { what, since: Instant::now() }
}

impl Step {
    /// Ends the step and prints `outcome`; returns the duration.
    pub fn done(self, outcome: &str) -> Duration {
        let took = self.since.elapsed();
        let colon = if outcome.is_empty() { "" } else { ": " };
        eprintln!("    {}{colon}{outcome} ({:.1} s)", self.what, took.as_secs_f64());
        took
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_a_shell() {
        for word in ["plain", "two words", "it's", "$HOME", "", "a\"b", "-x=1", "*"] {
            let echoed = Cmd::new("sh").args(["-c", &format!("printf %s {}", quote(word))]).output().unwrap();
            assert_eq!(echoed, word);
        }
    }

    #[test]
    fn tail_keeps_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }

    #[test]
    fn a_missing_program_names_the_fix() {
        let error = Cmd::new("no-such-program-here").run().unwrap_err();
        assert!(error.to_string().contains("cargo xtask setup"), "{error}");
    }
}
