//! WireGuard devices: the kernel's, or gotatun's in this process.

pub mod kernel;
pub mod userspace;
