//! `policy batch`: makes many changes in one process, each in force before the next line is read.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use anyhow::Context as _;
use clap::Parser;

use crate::cli::policy::{BatchArgs, PolicyAction};
use crate::commands::Failure;

#[derive(Parser)]
#[command(name = "policy", no_binary_name = true, disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    action: PolicyAction,
}

/// The lines of a batch. Each is read only when it is needed.
pub struct Lines {
    name: String,
    input: io::Lines<Box<dyn BufRead + Send>>,
    number: u32,
}

impl Lines {
    /// Opens the file, or standard input.
    pub fn open(args: &BatchArgs) -> Result<Self, Failure> {
        let (name, input): (_, Box<dyn BufRead + Send>) = if args.file == Path::new("-") {
            ("standard input".into(), Box::new(BufReader::new(io::stdin())))
        } else {
            let file = File::open(&args.file).with_context(|| format!("opening {}", args.file.display()));
            (args.file.display().to_string(), Box::new(BufReader::new(file.map_err(Failure::usage)?)))
        };
        Ok(Self { name, input: input.lines(), number: 0 })
    }

    /// The command in the next line that is not empty. `None`: there are no more lines.
    pub fn next(&mut self) -> Result<Option<PolicyAction>, Failure> {
        while let Some(line) = self.input.next() {
            self.number += 1;
            let line = line.with_context(|| format!("reading {}", self.name)).map_err(Failure::usage)?;
            if let Some(action) = parse(&line).map_err(|failure| self.place(failure))? {
                return Ok(Some(action));
            }
        }
        Ok(None)
    }

    /// Adds the line number to a failure of the line that was read last.
    pub fn place(&self, failure: Failure) -> Failure {
        let (number, name) = (self.number, &self.name);
        let done = if number > 1 { "; the earlier lines are in force" } else { "" };
        Failure { error: failure.error.context(format!("line {number} of {name}{done}")), ..failure }
    }
}

/// The failure for a batch inside a batch.
pub fn nested() -> Failure {
    Failure::usage(anyhow::anyhow!("a batch cannot hold another: write its lines here"))
}

/// The command in a line. `None`: the line is empty or a comment.
fn parse(line: &str) -> Result<Option<PolicyAction>, Failure> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let Line { action } = Line::try_parse_from(line.split_whitespace()).map_err(|error| {
        // The first line has the reason; the rest is the usage of a whole program.
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        Failure::usage(anyhow::anyhow!("{}", first.strip_prefix("error: ").unwrap_or(first).to_owned()))
    })?;
    if matches!(action, PolicyAction::Batch(_)) {
        return Err(nested());
    }
    Ok(Some(action))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_nothing_or_one_error() {
        for (line, desired) in
            [("set spray --peer b", true), ("  rule del 2 ", true), ("", false), (" # weights", false)]
        {
            assert_eq!(parse(line).map(|action| action.is_some()).ok(), Some(desired), "{line:?}");
        }
        for (line, expected) in [
            ("sett spray", "unrecognized subcommand 'sett'"),
            ("weight wg0 0", "invalid value '0' for '<WEIGHT>': give 1 to 1000, or auto"),
            ("batch -", "a batch cannot hold another: write its lines here"),
        ] {
            let failure = parse(line).expect_err(line);
            assert_eq!(failure.error.to_string(), expected);
        }
    }
}
