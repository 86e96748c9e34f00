//! Packet parsing, flow hash, steering decision and map layouts. The same source is compiled for BPF and for the host.
//! No I/O.
#![no_std]
#![expect(
    clippy::inline_always,
    reason = "a BPF call costs more than most of these functions, and hides values from the verifier"
)]
#![expect(clippy::cast_possible_truncation, reason = "hashes are cut to their low bits, slots are below 32")]
#![cfg_attr(test, expect(clippy::cast_precision_loss, reason = "statistics of small counts"))]

#[cfg(test)]
extern crate std;

pub mod account;
pub mod arrivals;
pub mod clock;
pub mod decide;
pub mod fast_path;
pub mod flow;
#[cfg(not(target_arch = "bpf"))]
pub mod inline;
pub mod layout;
pub mod load;
pub mod mss;
pub mod order;
pub mod packet;
pub mod peer_cache;
pub mod rendezvous;
pub mod rules;
pub mod select;
pub mod shared;
pub mod tables;
