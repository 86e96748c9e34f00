//! Input and output that commands have in common.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::path::Path;

use super::failure::Failure;
use crate::config::{self, Config};
use crate::control::resolve;

/// Loads the configuration at `path`, and resolves its remote endpoints.
pub fn load(path: &Path) -> Result<Config, Failure> {
    let mut config = config::load(path)?;
    resolve::resolve(&mut config, None)?;
    Ok(config)
}

/// Writes a result to standard output. A closed pipe is not an error: a reader such as `head` has read what it needs.
pub fn print(result: impl Display) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{result}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("writing to standard output").into())
        }
        _ => Ok(()),
    }
}

/// Writes a warning to standard error.
pub fn warn(text: impl Display) {
    // If standard error is closed, nobody can read it.
    let _ = writeln!(io::stderr(), "ecmpvpn: warning: {text}");
}

/// `count` and the singular or plural of a noun.
pub fn count_of(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
