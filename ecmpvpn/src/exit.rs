//! The exit codes; scripts depend on them.

use std::process::ExitCode;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// It failed at run time.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// The host lacks something: a privilege, a kernel feature, a tool.
    Host = 3,
    /// `check` or `doctor` found problems.
    Problems = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
