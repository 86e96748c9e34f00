//! Shows what happens: table and JSON.
