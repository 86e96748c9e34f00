//! The output of measuring programs: text for people is passed on, lines of JSON are collected in a file.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::sh;
use crate::vm::run::to_stdout;

/// The prefix of a line of JSON in the output.
const JSON: &str = "@json ";

/// The directory of the results; makes it.
pub fn dir() -> Result<PathBuf> {
    let dir = sh::target().join("bench");
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// A line that a measuring program printed.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// For programs.
    Json(Value),
    /// For people, with its line end.
    Text(Vec<u8>),
}

/// Splits output, which comes in pieces, into lines.
#[derive(Debug, Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// The lines that are complete with `bytes`.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.0.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.0);
                lines.push(match line.strip_prefix(JSON.as_bytes()) {
                    Some(json) => Line::Json(serde_json::from_slice(json).context("a line of results")?),
                    None => Line::Text(line),
                });
            }
        }
        Ok(lines)
    }
}

/// Passes text on, and collects the JSON in a file.
pub struct Results {
    path: PathBuf,
    options: Vec<String>,
    series: Vec<Value>,
    lines: Lines,
}

impl Results {
    pub fn new(name: &str, options: &[String]) -> Result<Self> {
        let path = dir()?.join(format!("{name}.json"));
        Ok(Self { path, options: options.to_vec(), series: Vec::new(), lines: Lines::default() })
    }

    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        for line in self.lines.feed(bytes)? {
            match line {
                Line::Json(series) => self.add(series)?,
                Line::Text(text) => to_stdout(&text)?,
            }
        }
        Ok(())
    }

    /// Writes the file at once, so that an interruption loses no earlier result.
    pub fn add(&mut self, series: Value) -> Result<()> {
        self.series.push(series);
        let all = json!({ "options": self.options, "series": self.series });
        fs::write(&self.path, format!("{all:#}\n")).with_context(|| format!("writing {}", self.path.display()))?;
        sh::note(format!("written to {}", self.path.display()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_in_pieces() {
        let mut lines = Lines::default();
        assert_eq!(lines.feed(b"some te").unwrap(), []);
        let text = |text: &str| Line::Text(text.as_bytes().to_vec());
        assert_eq!(lines.feed(b"xt\n\n@json {\"a\"").unwrap(), [text("some text\n"), text("\n")]);
        assert_eq!(lines.feed(b": 1}\nrest").unwrap(), [Line::Json(json!({"a": 1}))]);
        assert!(Lines::default().feed(b"@json {\n").is_err());
    }
}
