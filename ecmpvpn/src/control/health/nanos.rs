//! Times of probing.

/// Nanoseconds of the monotonic clock.
pub type Nanos = u64;
