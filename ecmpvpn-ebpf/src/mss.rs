//! Lowers the maximum segment size of TCP connections to what fits through a tunnel.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_check_mtu;
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::layout::settings_flags;
use ecmpvpn_common::mss::{self, Syn};
use ecmpvpn_common::tables::Tables as _;

use crate::maps::Maps;
use crate::skb::Skb;

/// Lowers the packet's MSS if it opens a TCP connection through the tunnel device `ifindex`. Pointers into the packet are
/// invalid afterwards.
#[inline(always)]
pub fn clamp(skb: &Skb<'_>, ifindex: u32) {
    if let Some(Syn { tcp, headers }) = mss::syn(skb) {
        ecmpvpn_clamp(skb.context().as_ptr().cast(), ifindex, tcp, headers);
    }
}

/// The same for a packet whose TCP header is at offset `tcp`, 20 or 40: then it has the plain header of IPv4 or of IPv6. 0:
/// it is not TCP.
#[inline(always)]
pub fn clamp_plain(skb: &Skb<'_>, ifindex: u32, tcp: u32) {
    if tcp != 0 && mss::is_syn(skb, tcp) {
        ecmpvpn_clamp(skb.context().as_ptr().cast(), ifindex, tcp, tcp + 20);
    }
}

/// A separate function: few packets come here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_clamp(context: *mut __sk_buff, ifindex: u32, tcp: u32, headers: u32) -> u32 {
    let context = TcContext::new(context);
    let skb = Skb::new(&context);
    let keeps = |maps: Maps<'_>| maps.settings().is_none_or(|settings| settings.flags & settings_flags::MSS_KEPT != 0);
    if Maps::at(0).is_none_or(keeps) {
        return 0;
    }
    // It reads a length from here, 0 for that of the packet, and writes the device's MTU (`bpf_skb_check_mtu()`,
    // net/core/filter.c).
    let mut mtu = 0;
    // SAFETY: the pointers are valid.
    if unsafe { bpf_check_mtu(context.as_ptr(), ifindex, &raw mut mtu, 0, 0) } < 0 {
        return 0;
    }
    if let Some(found) = mss::find(&skb, tcp)
        && let Some(value) = mss::lowered(found.value, mtu, headers)
    {
        skb.write_mss(found, tcp, value);
    }
    0
}
