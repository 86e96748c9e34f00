//! The TC programs: thin layers around `ecmpvpn-common`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// On the host there is nothing to compile: the programs are for the BPF target alone.
#[cfg(not(target_arch = "bpf"))]
use ecmpvpn_common as _;

#[cfg(target_arch = "bpf")]
mod arrival;
#[cfg(target_arch = "bpf")]
mod bench;
#[cfg(target_arch = "bpf")]
mod calls;
#[cfg(target_arch = "bpf")]
mod egress;
#[cfg(target_arch = "bpf")]
mod ingress;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod mss;
#[cfg(target_arch = "bpf")]
mod peer_cache_ipv6;
#[cfg(target_arch = "bpf")]
mod skb;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The optimised program has no panicking path. The verifier would refuse this loop.
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The crate is useful on the BPF target only. This function lets the workspace build as a whole.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
