//! KVM or emulation.

/// How the virtual CPUs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// The processor runs them.
    Kvm,
    /// QEMU emulates them. This works everywhere, about ten times slower.
    Tcg,
}
