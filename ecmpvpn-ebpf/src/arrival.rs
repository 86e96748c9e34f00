//! TC ingress of every bond member: counts what arrives there of each tunnel, and lets everything pass.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::arrivals::arrival;
use ecmpvpn_common::packet::Transport;

use crate::maps::arrivals;
use crate::skb::Skb;

/// Runs before the bond takes the packet over, while the packet still knows its member.
#[classifier]
pub fn ecmpvpn_arrival(context: TcContext) -> i32 {
    const UDP: u8 = 17;
    let skb = Skb::ethernet(&context);
    if let Some((arrival, offset)) = arrival(&skb, skb.ethertype(), skb.ifindex())
        && let Some(counters) = arrivals(&arrival)
    {
        let segments = skb.segments(Transport { protocol: UDP, offset });
        counters.packets += u64::from(segments.packets);
        counters.bytes += u64::from(segments.bytes);
        // SAFETY: the helper reads a clock; what it says is a tick old at most.
        counters.last_ns = unsafe { bpf_ktime_get_coarse_ns() };
    }
    TC_ACT_UNSPEC
}
