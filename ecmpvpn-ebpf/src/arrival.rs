//! TC ingress of every bond member: counts the packets of each tunnel that arrive there, and lets everything pass.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::arrivals::arrival;
use ecmpvpn_common::packet::Transport;

use crate::maps::arrivals;
use crate::skb::Skb;

/// Runs before the bond takes over the packet, while the packet still belongs to its member.
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
        // SAFETY: the helper reads a clock. Its value is at most one tick old.
        counters.last_ns = unsafe { bpf_ktime_get_coarse_ns() };
    }
    TC_ACT_UNSPEC
}
