//! Every flag.
