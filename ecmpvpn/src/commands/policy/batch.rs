//! `policy batch`: many changes by one process, each in force before the next line is read.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use anyhow::Context as _;
use clap::Parser;

use crate::cli::policy::{BatchArgs, PolicyAction};
use crate::commands::Failure;

/// One line.
#[derive(Parser)]
#[command(name = "policy", no_binary_name = true, disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    action: PolicyAction,
}

/// Carries out each line of the file or of standard input, up to the first that fails.
pub async fn run(path: &Path, args: &BatchArgs) -> Result<(), Failure> {
    let (name, input): (_, Box<dyn BufRead + Send>) = if args.file == Path::new("-") {
        ("standard input".into(), Box::new(BufReader::new(io::stdin())))
    } else {
        let file = File::open(&args.file).with_context(|| format!("opening {}", args.file.display()));
        (args.file.display().to_string(), Box::new(BufReader::new(file.map_err(Failure::usage)?)))
    };
    for (number, line) in (1..).zip(input.lines()) {
        let line = line.with_context(|| format!("reading {name}")).map_err(Failure::usage)?;
        let place = |failure: Failure| {
            let done = if number > 1 { "; what stands before it is in force" } else { "" };
            Failure { error: failure.error.context(format!("line {number} of {name}{done}")), ..failure }
        };
        if let Some(action) = parse(&line).map_err(place)? {
            Box::pin(super::act(path, action)).await.map_err(place)?;
        }
    }
    Ok(())
}

/// What a line asks for; `None`: it is empty or a comment.
fn parse(line: &str) -> Result<Option<PolicyAction>, Failure> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let Line { action } = Line::try_parse_from(line.split_whitespace()).map_err(|error| {
        // The first line says it; what follows is the usage of a whole program.
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        Failure::usage(anyhow::anyhow!("{}", first.strip_prefix("error: ").unwrap_or(first).to_owned()))
    })?;
    if matches!(action, PolicyAction::Batch(_)) {
        return Err(Failure::usage(anyhow::anyhow!("a batch cannot hold another: write its lines here")));
    }
    Ok(Some(action))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_nothing_or_told_in_one_sentence() {
        for (line, wanted) in
            [("set spray --peer b", true), ("  rule del 2 ", true), ("", false), (" # weights", false)]
        {
            assert_eq!(parse(line).map(|action| action.is_some()).ok(), Some(wanted), "{line:?}");
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
