//! What keeps running: health, statistics, signals.
