//! TC egress of the steering device: puts each packet onto a tunnel.

use core::cell::Cell;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use ecmpvpn_common::decide::{Steer, classify, steer};
use ecmpvpn_common::fast_path::{Steered, try_decide};
use ecmpvpn_common::layout::{Reason, how, peer_flags, test_run};
use ecmpvpn_common::order::{Carrier, carrier};
use ecmpvpn_common::packet::protocol::TCP;
use ecmpvpn_common::packet::{Parsed, Segments, Transport, parse};
use ecmpvpn_common::tables::Tables as _;

use crate::bench::vary;
use crate::maps::{Maps, count_order, count_reason};
use crate::mss;
use crate::skb::{Skb, describes_choice};

/// What the parser found in a packet on this CPU. The stack has no room for it.
#[map]
static FOUND: PerCpuArray<Found> = PerCpuArray::with_max_entries(1, 0);

struct Found {
    parsed: Parsed,
    segments: Segments,
}

/// The number of a [`Reason`]. A separate BPF function cannot return the reason itself. Converting the number back into
/// one would add a branch on each path for the verifier.
#[derive(Clone, Copy)]
struct Refusal(u32);

impl From<Reason> for Refusal {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self(reason as u32)
    }
}

/// Redirects the packet to its tunnel. A packet that is not redirected stays on the steering device, which has no peer:
/// it fails closed and answers with an ICMP unreachable.
#[classifier]
pub fn ecmpvpn_egress(context: TcContext) -> i32 {
    vary(&context);
    let skb = Skb::new(&context);
    let Some(maps) = Maps::at(if describes_choice() { skb.sent_ns() } else { 0 }) else { return TC_ACT_UNSPEC };
    let tcp = Cell::new(0);
    let segments = |transport: Transport| {
        if transport.protocol == TCP {
            tcp.set(transport.offset);
        }
        skb.segments(transport)
    };
    match try_decide(&skb, segments, &maps) {
        Some(Ok(Steered { steer, stayed })) => {
            if describes_choice() {
                skb.set_cb(test_run::FAST_PATH, 1 + u32::from(stayed));
            }
            let redirected = redirect(&skb, &steer);
            mss::clamp_plain(&skb, steer.ifindex, tcp.get());
            return redirected;
        }
        Some(Err(reason)) => return refuse(&context, &skb, reason.into()),
        None => {}
    }
    let refused = ecmpvpn_find(context.as_ptr().cast());
    if refused != 0 {
        return refuse(&context, &skb, Refusal(refused - 1));
    }
    // SAFETY: only this CPU writes to its copy, and TC programs do not interrupt one another on a CPU.
    let Some(found) = FOUND.get_ptr_mut(0).and_then(|found| unsafe { found.as_mut() }) else { return TC_ACT_UNSPEC };
    match classify(&mut found.parsed, &skb, &maps).and_then(|flow| steer(&flow, found.segments, &maps)) {
        Ok(steer) => {
            if steer.how & how::STAMPED == 0 {
                unmark(&skb, &maps, &steer);
            }
            let redirected = redirect(&skb, &steer);
            mss::clamp(&skb, steer.ifindex);
            redirected
        }
        Err(reason) => refuse(&context, &skb, reason.into()),
    }
}

/// Removes a mark that the packet's sender has made up, if the far end would take it for a stamped packet's.
#[inline(always)]
fn unmark(skb: &Skb<'_>, maps: &Maps<'_>, steer: &Steer) {
    if maps.peer(steer.tunnel.peer()).is_some_and(|peer| peer.flags.get() & peer_flags::UNMARK != 0)
        && let Some(carrier) = carrier(skb).filter(|carrier| Carrier::is_marked(*carrier))
    {
        skb.write(carrier, carrier.unmarked());
    }
}

/// Stamps a sprayed packet with its send time.
#[inline(always)]
fn stamp(skb: &Skb<'_>, steer: &Steer) {
    if let Some(carrier) = carrier(skb) {
        skb.write(carrier, carrier.stamped(steer.time));
        count_order(steer.tunnel.peer(), |counters| counters.stamped += 1);
    }
}

/// Parses the packet into [`FOUND`]. Returns 0, or the number of the [`Reason`] plus 1 if the packet is refused. This
/// is a separate function, because otherwise the verifier would check everything that follows on each of the parser's
/// many paths: kernels before 6.4 do not recognise across a call which paths are alike.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ecmpvpn_find(context: *mut __sk_buff) -> u32 {
    let context = TcContext::new(context);
    let skb = Skb::new(&context);
    let Some(found) = FOUND.get_ptr_mut(0) else { return Reason::BadTable as u32 + 1 };
    match parse(&skb) {
        Ok(parsed) => {
            let segments = skb.segments(parsed.transport);
            // SAFETY: as above.
            unsafe { found.write(Found { parsed, segments }) };
            0
        }
        Err(reason) => reason as u32 + 1,
    }
}

#[inline(always)]
fn redirect(skb: &Skb<'_>, steer: &Steer) -> i32 {
    if describes_choice() {
        skb.set_cb(test_run::TUNNEL, steer.tunnel.number() + 1);
        skb.set_cb(test_run::BUCKET, steer.bucket);
        skb.set_cb(test_run::HOW, steer.how);
    }
    if steer.how & how::STAMPED != 0 {
        stamp(skb, steer);
    }
    // SAFETY: the helper only records where the packet goes.
    unsafe { bpf_redirect(steer.ifindex, 0) as i32 }
}

#[inline(always)]
fn refuse(context: &TcContext, skb: &Skb<'_>, Refusal(reason): Refusal) -> i32 {
    count_reason(reason);
    debug!(context, "not steered, reason {}", reason);
    if describes_choice() {
        skb.set_cb(test_run::TUNNEL, 0);
        skb.set_cb(test_run::REASON, reason);
    }
    TC_ACT_UNSPEC
}
