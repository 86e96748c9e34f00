//! A packet's bytes, lengths and control words, from a `__sk_buff`.

use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::Global;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::layout::test_run;
use ecmpvpn_common::packet::{MAX_LOAD_OFFSET, Packet, Segments, Transport, segments};

/// See `ecmpvpn_common::layout::globals::TEST_RUN`. The verifier knows its value and prunes what it rules out.
#[unsafe(no_mangle)]
static TEST_RUN: Global<u8> = Global::new(0);

/// Whether this program was loaded for test runs.
#[inline(always)]
fn is_test_run() -> bool {
    TEST_RUN.load() != 0
}

/// Whether it was loaded for test runs that tell the time, and want to know what was chosen.
#[inline(always)]
pub fn tells() -> bool {
    TEST_RUN.load() == 2
}

/// A packet that starts at its network header, as it does on devices without link layer.
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

    /// At TC ingress of an Ethernet device, which shows packets with their header; VLAN tags are beside it.
    #[inline(always)]
    pub fn ethernet(context: &'a TcContext) -> Self {
        Self { context, base: test_run::ETHERNET_HEADER }
    }

    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.context.as_ptr().cast()
    }

    /// What the packet is on the wire.
    #[inline(always)]
    pub fn segments(&self, transport: Transport) -> Segments {
        // SAFETY: the context is valid while the program runs.
        let (size, segs) = unsafe { ((*self.raw()).gso_size, (*self.raw()).gso_segs) };
        segments(self, transport, self.length(), size, segs)
    }

    /// Whether it is a super-packet.
    #[inline(always)]
    pub fn is_gso(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.raw()).gso_size != 0 }
    }

    /// When it was sent, in test runs: their clock.
    #[inline(always)]
    pub fn sent_ns(&self) -> u64 {
        // SAFETY: as above.
        unsafe { (*self.raw()).tstamp }
    }

    /// Index of the device that the packet is on.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw()).ifindex }
    }

    /// Ethernet type of the network header.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        // SAFETY: as above. The kernel has the 16 bits in network byte order.
        u16::from_be(unsafe { (*self.raw()).protocol } as u16)
    }

    /// Leaves a word for who started the test run.
    #[inline(always)]
    pub fn set_cb(&self, word: usize, value: u32) {
        // SAFETY: as above; callers pass the constants of `test_run`, all below 5.
        unsafe { (*self.raw()).cb[word] = value };
    }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // Parsing never goes further; the verifier wants to see it.
        if offset > MAX_LOAD_OFFSET {
            return None;
        }
        self.peek(offset).or_else(|| self.load_paged(offset))
    }

    /// Only what is in the linear part.
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
    /// For what is not in the linear part; fails if it is nowhere.
    #[inline(always)]
    fn load_paged<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = [0; N];
        let (to, length) = (ptr::from_mut(&mut words).cast(), 4 * N as u32);
        // SAFETY: the helper writes `length` bytes, which is the size of `words`.
        let failed = unsafe { bpf_skb_load_bytes(self.raw().cast(), self.base + offset, to, length) };
        (failed == 0).then_some(words)
    }
}
