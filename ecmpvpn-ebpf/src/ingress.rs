//! TC ingress of every tunnel: counts the packets that arrive, and lets them pass.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::packet::{Parsed, Transport, parse};

use crate::maps::{count, tunnel_id};
use crate::skb::Skb;

/// Counts packets and bytes as they arrived, before the kernel merged them.
#[classifier]
pub fn ecmpvpn_ingress(context: TcContext) -> i32 {
    let skb = Skb::new(&context);
    let Some(tunnel) = tunnel_id(skb.ifindex()) else { return TC_ACT_UNSPEC };
    // Headers matter only for packets that the kernel merged.
    let transport = if skb.is_gso() { parse(&skb).ok().map(|Parsed { transport, .. }| transport) } else { None };
    let segments = skb.segments(transport.unwrap_or(Transport { protocol: 0, offset: 0 }));
    count(tunnel, |counters| {
        counters.rx_packets += u64::from(segments.packets);
        counters.rx_bytes += u64::from(segments.bytes);
    });
    TC_ACT_UNSPEC
}
