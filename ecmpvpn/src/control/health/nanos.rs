//! The unit of time for probing.

/// Nanoseconds: a duration, or a time of the monotonic clock.
pub type Nanos = u64;

pub const MICROSECOND: Nanos = 1_000;
pub const MILLISECOND: Nanos = 1_000_000;
pub const SECOND: Nanos = 1_000_000_000;
