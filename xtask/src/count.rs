//! Counts of tests, read from what test runners print.

use std::ops::AddAssign;

/// How many tests passed, failed and were skipped.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    /// What the runners said of the tests that failed, in whole lines.
    pub failures: String,
}

impl Counts {
    /// One failure: a step that could not be carried out.
    pub const FAILURE: Self = Self { passed: 0, failed: 1, skipped: 0, failures: String::new() };

    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; ...`, the last line of libtest and libtest-mimic.
    fn parse(line: &str) -> Option<Self> {
        let (_, numbers) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
        let number = |what: &str| {
            let part = numbers.split(';').find_map(|part| part.trim().strip_suffix(what))?;
            part.trim().parse().ok()
        };
        let (passed, failed, skipped) = (number("passed")?, number("failed")?, number("ignored")?);
        Some(Self { passed, failed, skipped, failures: String::new() })
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures += &other.failures;
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Reads a runner's output while it is passed on.
#[derive(Debug, Default)]
pub struct Watcher {
    counts: Counts,
    results: usize,
    line: Vec<u8>,
    /// Between libtest's `failures:` and its result.
    lists_failures: bool,
}

impl Watcher {
    /// Takes a piece of output, of any length.
    pub fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.end_line();
            } else {
                self.line.push(byte);
            }
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        if let Some(counts) = Counts::parse(&line) {
            self.counts += counts;
            self.results += 1;
            self.lists_failures = false;
        } else if line.trim() == "failures:" {
            self.lists_failures = true;
        } else if self.lists_failures {
            self.counts.failures += &line;
            self.counts.failures.push('\n');
        }
        self.line.clear();
    }

    /// The counts. `success`: the runner's exit status was 0. A runner that failed without a failed test, or that
    /// printed no result, counts as a failure.
    pub fn finish(mut self, success: bool) -> Counts {
        self.end_line();
        if self.results == 0 || (!success && self.counts.failed == 0) {
            self.counts.failed += 1;
        }
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(pieces: &[&str], success: bool) -> Counts {
        let mut watcher = Watcher::default();
        for piece in pieces {
            watcher.feed(piece.as_bytes());
        }
        watcher.finish(success)
    }

    #[test]
    fn results_of_several_runners_add_up_across_split_pieces() {
        let pieces = [
            "running 3 tests\ntest result: ok. 3 passed; 0 fai",
            "led; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\n",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.0s",
        ];
        assert_eq!(watch(&pieces, false), Counts { passed: 5, failed: 1, skipped: 1, failures: String::new() });
    }

    #[test]
    fn what_is_said_of_failed_tests_is_kept() {
        let output = "test a ... FAILED\n\nfailures:\n\n---- a ----\nlost\n\nfailures:\n    a\n\n\
            test result: FAILED. 0 passed; 1 failed; 0 ignored\nbye\n";
        assert_eq!(watch(&[output], false).failures, "\n---- a ----\nlost\n\n    a\n\n");
    }

    #[test]
    fn a_runner_without_a_result_or_with_a_bad_status_is_a_failure() {
        assert_eq!(watch(&["hello\n"], true), Counts::FAILURE);
        let passed = ["test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n"];
        assert_eq!(watch(&passed, false), Counts { passed: 3, failed: 1, ..Counts::default() });
        assert_eq!(watch(&passed, true), Counts { passed: 3, ..Counts::default() });
    }
}
