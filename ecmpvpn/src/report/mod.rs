//! Makes tables and JSON for output. Everything here works on given values; nothing looks at the kernel.

pub mod explain;
pub mod init;
pub mod plan;
pub mod policy;
pub mod stats;
