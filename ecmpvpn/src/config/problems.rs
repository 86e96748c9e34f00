//! Problems of a configuration, reported by file and line.

use std::cell::RefCell;
use std::fmt;
use std::io;

/// One thing to correct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Counted from 1. `None`: the problem concerns the file as a whole.
    pub line: Option<usize>,
    /// One sentence: the key, what is wrong with it, and the fix.
    pub message: String,
}

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("there is no configuration {file}: write one with `ecmpvpn init`, or name yours with `-c FILE`")]
    Missing {
        /// The file as the user named it.
        file: String,
    },
    #[error("reading the configuration {file}")]
    Unreadable {
        /// The file as the user named it.
        file: String,
        source: io::Error,
    },
    /// The file was read, but it is not a valid configuration.
    #[error("{0}")]
    Invalid(Problems),
}

/// All problems of one file, in the order of their lines. Displayed one per line, as `FILE:LINE: MESSAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    /// The file as the user named it.
    pub file: String,
    /// At least one.
    pub list: Vec<Problem>,
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, problem) in self.list.iter().enumerate() {
            if position > 0 {
                f.write_str("\n")?;
            }
            match problem.line {
                Some(line) => write!(f, "{}:{line}: {}", self.file, problem.message)?,
                None => write!(f, "{}: {}", self.file, problem.message)?,
            }
        }
        Ok(())
    }
}

/// The number, counted from 1, of the line that `before` ends in.
pub(super) fn line(before: &[u8]) -> usize {
    before.split(|byte| *byte == b'\n').count()
}

/// Collects problems while a text is read. Positions are byte offsets in that text.
pub(super) struct Collector<'a> {
    text: &'a str,
    found: RefCell<Vec<Problem>>,
}

impl<'a> Collector<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, found: RefCell::default() }
    }

    /// The line number, counted from 1, of a byte offset.
    pub(super) fn line(&self, at: usize) -> usize {
        line(&self.text.as_bytes()[..at.min(self.text.len())])
    }

    pub(super) fn add(&self, at: usize, message: impl Into<String>) {
        let line = Some(self.line(at));
        self.found.borrow_mut().push(Problem { line, message: message.into() });
    }

    pub(super) fn add_to_file(&self, message: impl Into<String>) {
        self.found.borrow_mut().push(Problem { line: None, message: message.into() });
    }

    /// The problems, sorted by line. `None` if there are none.
    pub(super) fn finish(self, file: &str) -> Option<Problems> {
        let mut list = self.found.into_inner();
        list.sort_by_key(|problem| problem.line);
        list.dedup();
        (!list.is_empty()).then(|| Problems { file: file.to_owned(), list })
    }
}
