//! How errors are printed: each with its causes, in one line.

use std::error::Error;
use std::iter::successors;

/// Formats an error and its causes in one line, joined by `: `.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    successors(Some(error), |error| (*error).source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
