//! At the near gateway: what a sprayed packet is stamped with.

use super::{UNIT_BITS, time_of};
use crate::layout::TunnelId;
use crate::select;
use crate::tables::Calls;

/// How far stamps may be ahead of the clock, nanoseconds. Delays that are expected to be longer count as this. Packets
/// that follow one another more closely than a unit get a unit each.
pub const MAX_AHEAD_NS: u64 = 60_000_000;

/// Returns the stamp of a packet that is sent at `now`, nanoseconds of the monotonic clock: when it is expected to
/// arrive, up to a constant. `delivery`: how much longer that takes than by the fastest tunnel when nothing waits,
/// nanoseconds. `former`: the tunnel of the bucket's last packet. `packets`: the number of its segments, which have
/// consecutive stamps.
#[inline(always)]
pub fn stamp<T: Calls + ?Sized>(
    tables: &T,
    bucket: u32,
    former: TunnelId,
    now: u64,
    delivery: u64,
    packets: u32,
) -> u32 {
    let Some(record) = tables.bucket(bucket) else { return 0 };
    let last = record.last_ns.get();
    let mut delivery = delivery;
    if last + MAX_AHEAD_NS > now {
        // Not before the last packet, which may wait and have no stamp.
        let waiting = select::delivery(tables, former, now, 0);
        if waiting > delivery {
            delivery = waiting;
        }
    }
    let at = next(now, delivery, last);
    record.last_ns.set(at + (u64::from(packets) << UNIT_BITS));
    u32::from(time_of(at))
}

/// The time of a stamp, nanoseconds. `last`: the time of the bucket's last stamp, or the end of those of its segments.
#[inline(always)]
fn next(now: u64, delivery: u64, last: u64) -> u64 {
    let most = now + MAX_AHEAD_NS;
    let at = now + if delivery > MAX_AHEAD_NS { MAX_AHEAD_NS } else { delivery };
    let last = if last > most { most } else { last };
    if last > at { last } else { at }
}
