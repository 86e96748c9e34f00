//! KVM or emulation.

/// How the virtual CPUs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// By emulation: works everywhere, about ten times slower.
    Tcg,
}
