//! For measurements with `BPF_PROG_TEST_RUN`, which repeats the same packet: varies the packet, and has a program to
//! compare with. `ecmpvpn run` loads none of this.

use core::ptr;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::layout::test_run;
use ecmpvpn_common::order::{self, Carrier};

/// See `ecmpvpn_common::layout::globals::FLOWS`. The verifier knows the value and removes code that it makes
/// unreachable.
#[unsafe(no_mangle)]
static FLOWS: Global<u32> = Global::new(0);

/// Offset of the source address, after the Ethernet header and twelve bytes of the IPv4 header.
const SOURCE: usize = test_run::ETHERNET_HEADER as usize + 12;
/// Distance from there to the source port, bytes.
const PORT: usize = 8;

/// Redirects and does nothing else: the least that every steering program must do.
#[classifier]
pub fn ecmpvpn_baseline(context: TcContext) -> i32 {
    vary(&context);
    // SAFETY: the helper only records where the packet goes.
    unsafe { bpf_redirect(1, 0) as i32 }
}

/// If `FLOWS` is set, stamps the packet, which must be IPv4 and must not be fragmented, with the time `now`. Its
/// checksum stays as it is.
#[inline(always)]
pub fn stamp(context: &TcContext, now: impl FnOnce() -> u64) {
    let start = context.data() + SOURCE - 8;
    if FLOWS.load() == 0 || start + 4 > context.data_end() {
        return;
    }
    let word = ptr::with_exposed_provenance_mut::<u32>(start);
    // SAFETY: it lies between data and data_end.
    unsafe {
        word.write_unaligned(Carrier { word: word.read_unaligned(), is_v4: true }.stamped(order::time_of(now())))
    };
}

/// If `FLOWS` is set, makes the packet one of the next flow: writes the next source address, and the source port that
/// belongs to it. The packet must be IPv4 without options from 10.0.0.0/8.
#[inline(always)]
pub fn vary(context: &TcContext) {
    let flows = FLOWS.load();
    let start = context.data() + SOURCE;
    if flows == 0 || start + PORT + 2 > context.data_end() {
        return;
    }
    let address = ptr::with_exposed_provenance_mut::<u32>(start);
    let port = ptr::with_exposed_provenance_mut::<u16>(start + PORT);
    // SAFETY: both lie between data and data_end.
    unsafe {
        let number = (u32::from_be(address.read_unaligned()) & 0x00ff_ffff) + 1;
        let next = if number >= flows { 0 } else { number };
        address.write_unaligned((0x0a00_0000 | next).to_be());
        port.write_unaligned((next as u16).to_be());
    }
}
