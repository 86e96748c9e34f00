//! Packet parsing, flow hash, steering decision and map layouts: compiled for BPF and for the host alike. No I/O.
#![no_std]
