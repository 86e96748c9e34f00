//! Shows what happens: table and JSON. Everything here is made of values in hand; nothing looks at the kernel.

pub mod explain;
pub mod init;
pub mod plan;
pub mod policy;
pub mod stats;
