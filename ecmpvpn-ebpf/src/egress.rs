//! TC egress of the steering device: puts each packet onto a tunnel.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use ecmpvpn_common::decide::{Steer, Verdict, decide};
use ecmpvpn_common::layout::{Reason, how, test_run};

use crate::bench::vary;
use crate::skb::{Skb, is_test_run};
use crate::tables::{Maps, count, count_reason};

/// Redirects to the tunnel. What it does not redirect is left to the steering device, which has no peer: it fails
/// closed and answers with an ICMP unreachable.
#[classifier]
pub fn ecmpvpn_egress(context: TcContext) -> i32 {
    vary(&context);
    let skb = Skb::new(&context);
    let maps = Maps { now: if is_test_run() { skb.sent_ns() } else { 0 } };
    match decide(&skb, &maps) {
        Verdict::Steer(steer) => redirect(&skb, &steer),
        Verdict::NotSteered(reason) | Verdict::Dropped(reason) => refuse(&context, &skb, reason),
    }
}

#[inline(always)]
fn redirect(skb: &Skb<'_>, steer: &Steer) -> i32 {
    let segments = skb.segments(steer.transport);
    count(steer.tunnel, |counters| {
        counters.tx_packets += u64::from(segments.packets);
        counters.tx_bytes += u64::from(segments.bytes);
        counters.failover_moves += u64::from(steer.how & how::FAILOVER != 0);
        counters.flowlet_moves += u64::from(steer.how & how::FLOWLET != 0);
        counters.sprayed_packets += u64::from(steer.how & how::SPRAYED != 0);
    });
    if is_test_run() {
        skb.set_cb(test_run::TUNNEL, steer.tunnel + 1);
        skb.set_cb(test_run::BUCKET, steer.bucket);
        skb.set_cb(test_run::HOW, steer.how);
    }
    // SAFETY: the helper only notes where the packet goes.
    unsafe { bpf_redirect(steer.ifindex, 0) as i32 }
}

#[inline(always)]
fn refuse(context: &TcContext, skb: &Skb<'_>, reason: Reason) -> i32 {
    count_reason(reason);
    debug!(context, "not steered, reason {}", reason as u32);
    if is_test_run() {
        skb.set_cb(test_run::TUNNEL, 0);
        skb.set_cb(test_run::REASON, reason as u32);
    }
    TC_ACT_UNSPEC
}
