//! The TC programs: thin around `ecmpvpn-common`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::bindings::TC_ACT_UNSPEC;
    use aya_ebpf::macros::classifier;
    use aya_ebpf::programs::TcContext;

    /// TC egress of the steering device.
    #[classifier]
    pub fn ecmpvpn_egress(_: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        // No panicking path is left once optimised; the verifier would refuse this loop.
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
