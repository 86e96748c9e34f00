//! TC ingress of every tunnel: counts the packets that arrive, and puts sprayed ones back in order.

use aya_ebpf::Global;
use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ecmpvpn_common::layout::test_run;
use ecmpvpn_common::order::{self, Carrier, Release};
use ecmpvpn_common::packet::{Parsed, Transport, parse};
use ecmpvpn_common::tables::Tables as _;

use crate::bench;
use crate::maps::{Maps, count, count_order, tunnel_id};
use crate::mss;
use crate::skb::{Skb, describes_choice};

/// See `ecmpvpn_common::layout::globals::RESTORES`. The verifier removes what older kernels do not know.
#[unsafe(no_mangle)]
static RESTORES: Global<u8> = Global::new(1);

/// Counts packets and bytes as they arrived, before the kernel merged them. Stamped packets were not merged: the kernel
/// merges no IPv4 packets with the reserved bit (`inet_gro_receive()`, `net/ipv4/af_inet.c`), and no IPv6 packets with
/// different flow labels.
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
    mss::clamp(&skb, skb.ifindex());
    if RESTORES.load() == 0 { TC_ACT_UNSPEC } else { restore(&skb, tunnel.peer()) }
}

/// Removes a marked packet's stamp, and has the device for it hold the packet until its time. That device gives it back
/// to the tunnel's device, past this program.
#[inline(always)]
fn restore(skb: &Skb<'_>, peer: u32) -> i32 {
    let Some(maps) = Maps::at(if describes_choice() { skb.sent_ns() } else { 0 }) else { return TC_ACT_UNSPEC };
    let order = maps.order(peer);
    let device = order.device.get();
    if device == 0 {
        return TC_ACT_UNSPEC;
    }
    bench::stamp(skb.context(), || maps.now());
    let Some(carrier) = order::carrier(skb).filter(|carrier| Carrier::is_marked(*carrier)) else {
        return TC_ACT_UNSPEC;
    };
    let now = maps.now();
    let release = order::release(order, now, carrier.time());
    skb.write(carrier, carrier.restored());
    if describes_choice() {
        let (kind, held) = match release {
            Release::At(at) => (1, at.saturating_sub(now) as u32),
            Release::Late => (2, 0),
            Release::GivenUp => (3, 0),
        };
        skb.set_cb(test_run::RELEASE, kind);
        skb.set_cb(test_run::HELD, held);
    }
    match release {
        Release::At(time) => {
            if skb.postpone(time) {
                count_order(peer, |counters| counters.restored += 1);
                // SAFETY: the helper only records where the packet goes.
                return unsafe { bpf_redirect(device, 0) as i32 };
            }
            count_order(peer, |counters| counters.given_up += 1);
        }
        Release::Late => count_order(peer, |counters| counters.late += 1),
        Release::GivenUp => count_order(peer, |counters| counters.given_up += 1),
    }
    TC_ACT_UNSPEC
}
