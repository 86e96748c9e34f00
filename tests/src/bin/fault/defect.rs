//! Defects that are introduced on purpose, one for each invariant, to show that each is found.

use clap::ValueEnum;

/// A defect that is introduced on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Defect {
    /// For a moment one site routes the peer's prefix past the steering device, out of the bond
    Clear,
    /// One tunnel's device delays some packets and not others
    Reorder,
    /// One site's `run` is stopped (SIGSTOP) while a link is cut
    Recovery,
    /// One gateway has an additional route when its state is compared with the former one
    Restore,
}

impl Defect {
    pub fn describe(self) -> &'static str {
        match self {
            Self::Clear => "the peer's prefix is routed past the steering device",
            Self::Reorder => "a tunnel's device delays some packets and not others",
            Self::Recovery => "SIGSTOP for `run`",
            Self::Restore => "a route is left behind",
        }
    }
}
