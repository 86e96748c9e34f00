//! WireGuard devices: of the kernel, or of the library gotatun in this process.

pub mod kernel;
pub mod userspace;
