//! The log of a lab: every command with its result. It is kept in memory and printed only when something fails.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Lines kept. The oldest is removed first.
const KEPT: usize = 400;

struct Log {
    started: Option<Instant>,
    lines: VecDeque<String>,
}

static LOG: Mutex<Log> = Mutex::new(Log { started: None, lines: VecDeque::new() });

pub fn note(line: impl AsRef<str>) {
    let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    let at = log.started.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
    if log.lines.len() == KEPT {
        log.lines.pop_front();
    }
    log.lines.push_back(format!("{at:8.3} {}", line.as_ref()));
}

/// The last `count` lines, oldest first.
pub fn last(count: usize) -> Vec<String> {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    log.lines.iter().skip(log.lines.len().saturating_sub(count)).cloned().collect()
}

/// The lines that mention one of `words` (all lines when there are none), oldest first.
pub fn lines(words: &[&str]) -> Vec<String> {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    log.lines.iter().filter(|line| words.is_empty() || words.iter().any(|w| line.contains(w))).cloned().collect()
}
