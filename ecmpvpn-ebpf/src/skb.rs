//! A packet's bytes, lengths and control words, from a `__sk_buff`.

use core::mem::MaybeUninit;
use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::Global;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{
    bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_change_head, bpf_skb_load_bytes, bpf_skb_set_tstamp,
    bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::layout::test_run;
use ecmpvpn_common::mss::{self, Mss};
use ecmpvpn_common::order::Carrier;
use ecmpvpn_common::packet::{MAX_LOAD_OFFSET, Packet, Segments, Transport, segments};

/// See `ecmpvpn_common::layout::globals::TEST_RUN`. The verifier knows the value and removes code that it makes
/// unreachable.
#[unsafe(no_mangle)]
static TEST_RUN: Global<u8> = Global::new(0);

/// Value 1 or 2 of `TEST_RUN`.
#[inline(always)]
fn is_test_run() -> bool {
    TEST_RUN.load() != 0
}

/// Whether the program was loaded for test runs that set the time and read what was chosen.
#[inline(always)]
pub fn describes_choice() -> bool {
    TEST_RUN.load() == 2
}

/// A packet that starts at its network header, as on devices without a link layer.
pub struct Skb<'a> {
    context: &'a TcContext,
    /// Bytes before the network header: 0, or an Ethernet header in test runs.
    base: u32,
}

impl<'a> Skb<'a> {
    #[inline(always)]
    pub fn new(context: &'a TcContext) -> Self {
        Self { context, base: if is_test_run() { test_run::ETHERNET_HEADER } else { 0 } }
    }

    /// A packet at TC ingress of an Ethernet device, which starts with its Ethernet header. The kernel keeps VLAN tags
    /// beside the data.
    #[inline(always)]
    pub fn ethernet(context: &'a TcContext) -> Self {
        Self { context, base: test_run::ETHERNET_HEADER }
    }

    #[inline(always)]
    pub fn context(&self) -> &'a TcContext {
        self.context
    }

    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.context.as_ptr().cast()
    }

    /// Packets and bytes on the wire.
    #[inline(always)]
    pub fn segments(&self, transport: Transport) -> Segments {
        // SAFETY: the context is valid while the program runs.
        let (size, segs) = unsafe { ((*self.raw()).gso_size, (*self.raw()).gso_segs) };
        segments(self, transport, self.length(), size, segs)
    }

    /// Whether the packet is a super-packet.
    #[inline(always)]
    pub fn is_gso(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.raw()).gso_size != 0 }
    }

    /// Send time of the packet, nanoseconds: the clock of test runs.
    #[inline(always)]
    pub fn sent_ns(&self) -> u64 {
        // SAFETY: as above.
        unsafe { (*self.raw()).tstamp }
    }

    /// Index of the packet's device.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw()).ifindex }
    }

    /// Ethernet type of the network header, in host byte order.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        // SAFETY: as above. The kernel has the 16 bits in network byte order.
        u16::from_be(unsafe { (*self.raw()).protocol } as u16)
    }

    /// Writes a word of `skb->cb`, which the process that started the test run reads.
    #[inline(always)]
    pub fn set_cb(&self, word: usize, value: u32) {
        // SAFETY: as above; callers pass the constants of `test_run`, all below 5.
        unsafe { (*self.raw()).cb[word] = value };
    }
}

/// `BPF_F_RECOMPUTE_CSUM` and `BPF_SKB_TSTAMP_DELIVERY_MONO`, include/uapi/linux/bpf.h.
const RECOMPUTE_CSUM: u64 = 1;
const DELIVERY_MONO: u32 = 1;
/// `struct iphdr::check`, offset in bytes.
const IPV4_CHECKSUM: u32 = 10;

impl Skb<'_> {
    /// Writes a changed `word` of the network header, and mends the header's checksum. Pointers into the packet are
    /// invalid afterwards.
    #[inline(always)]
    pub fn write(&self, carrier: Carrier, word: u32) {
        let from = ptr::from_ref(&word).cast();
        if carrier.is_v4 {
            let (old, new) = (u64::from(carrier.word), u64::from(word));
            // SAFETY: the helpers check the offsets, and the reference is valid. A change of the checksum evens out a
            // change of the word, so the sum of all bytes is the same.
            unsafe {
                if bpf_skb_store_bytes(self.raw(), self.base + 4, from, 4, 0) == 0 {
                    bpf_l3_csum_replace(self.raw(), self.base + IPV4_CHECKSUM, old, new, 4);
                }
            }
        } else {
            // SAFETY: as above.
            unsafe { bpf_skb_store_bytes(self.raw(), self.base, from, 4, RECOMPUTE_CSUM) };
        }
    }

    /// Writes another value into the MSS option `found` of the segment whose TCP header is at offset `tcp`, and mends the
    /// checksum. Pointers into the packet are invalid afterwards.
    #[inline(always)]
    pub fn write_mss(&self, found: Mss, tcp: u32, value: u16) {
        let (mut old, mut new) = (found.value.to_be(), value.to_be());
        let from = new;
        // At an odd offset each byte belongs to another word of the sum.
        if (found.offset - tcp) & 1 != 0 {
            (old, new) = (old.swap_bytes(), new.swap_bytes());
        }
        let checksum = self.base + tcp + mss::CHECKSUM;
        // SAFETY: the helpers check the offsets, and the reference is valid. As above, the sum of all bytes stays.
        unsafe {
            if bpf_l4_csum_replace(self.raw(), checksum, old.into(), new.into(), 2) == 0 {
                bpf_skb_store_bytes(self.raw(), self.base + found.offset, ptr::from_ref(&from).cast(), 2, 0);
            }
        }
    }

    /// Makes the packet one that an Ethernet device sends at `time`, nanoseconds of the monotonic clock. Returns whether
    /// that succeeded.
    #[inline(always)]
    pub fn postpone(&self, time: u64) -> bool {
        if is_test_run() {
            return true;
        }
        // SAFETY: the helpers take numbers only.
        unsafe {
            bpf_skb_set_tstamp(self.raw(), time, DELIVERY_MONO) == 0
                && bpf_skb_change_head(self.raw(), test_run::ETHERNET_HEADER, 0) == 0
        }
    }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // The parser never goes further. The check is for the verifier.
        if offset > MAX_LOAD_OFFSET {
            return None;
        }
        self.peek(offset).or_else(|| self.load_paged(offset))
    }

    /// Reads only the linear part of the packet.
    #[inline(always)]
    fn peek<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let start = self.context.data() + (self.base + offset) as usize;
        if start + 4 * N > self.context.data_end() {
            return None;
        }
        // SAFETY: all 4 * N bytes lie between data and data_end.
        Some(unsafe { ptr::read_unaligned(ptr::with_exposed_provenance(start)) })
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.context.len() - self.base
    }

    #[inline(always)]
    fn mark(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.raw()).mark }
    }
}

impl Skb<'_> {
    /// Reads what is not in the linear part. `None` if the packet is too short.
    #[inline(always)]
    fn load_paged<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // Not zeroed: a call of `memset` would need a stack frame beside those of its callers, which are at the limit.
        let mut words = MaybeUninit::<[u32; N]>::uninit();
        // SAFETY: the helper writes 4 * N bytes, which is the size of `words`.
        let failed = unsafe {
            bpf_skb_load_bytes(self.raw().cast(), self.base + offset, words.as_mut_ptr().cast(), 4 * N as u32)
        };
        // SAFETY: the helper has written all of it.
        (failed == 0).then(|| unsafe { words.assume_init() })
    }
}
