//! Builds, tests and shows ecmpvpn: `cargo xtask --help`.

fn main() {}
