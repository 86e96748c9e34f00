//! Parses the command line, dispatches, prints errors, sets the exit code.

fn main() {}
