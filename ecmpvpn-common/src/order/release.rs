//! At the far gateway: when a marked packet leaves.

use super::{UNIT_BITS, time_of};
use crate::layout::Order;

/// Longest hold that can be configured, nanoseconds: differences of delays must fit into half of the times' range.
pub const MAX_BOUND_NS: u64 = 100_000_000;
/// The highest delay counts for this long at least, and for twice as long at most. Units; a quarter of a second.
const WINDOW: u32 = 1 << 16;
/// After this time without a packet, nothing is known about the delays. Units; 17 s.
const FORGOTTEN: u32 = 64 * WINDOW;
/// This many packets in succession whose delays differ by more than the bound show that a clock has jumped.
const STRAYS: u32 = 64;
/// Added to the highest delay, beside an eighth of the difference to the lowest one. Units; 66 us.
const MARGIN: u16 = 16;
/// A stretch of stamps is 2^`STRETCH_BITS` units long, 34 ms. Within a stretch, what is added to the stamps
/// changes along a straight line. So packets keep their order while it changes, whatever the order in which they
/// arrive. Two stretches are kept: packets of the slowest tunnel may belong to the one before.
const STRETCH_BITS: u32 = 13;
const STRETCH: u32 = 1 << STRETCH_BITS;
/// What is added decreases by an eighth of a stretch at most from a stretch to the next: 0.12 s a second.
const FALL: u16 = 1 << (STRETCH_BITS - 3);

/// What becomes of a marked packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// At this time, nanoseconds of the monotonic clock.
    At(u64),
    /// At once: later packets may have left already.
    Late,
    /// At once: its delay differs from the others' by more than the bound.
    GivenUp,
}

/// The higher of two delays, which differ by less than half of the range.
#[inline(always)]
const fn higher(a: u16, b: u16) -> u16 {
    if a.wrapping_sub(b).cast_signed() < 0 { b } else { a }
}

#[inline(always)]
const fn lower(a: u16, b: u16) -> u16 {
    if a.wrapping_sub(b).cast_signed() < 0 { a } else { b }
}

/// Highest and lowest delay of a window.
#[derive(Clone, Copy)]
struct Delays {
    highest: u16,
    lowest: u16,
}

impl Delays {
    #[inline(always)]
    const fn one(delay: u16) -> Self {
        Self { highest: delay, lowest: delay }
    }

    #[inline(always)]
    const fn unpack(word: u32) -> Self {
        Self { highest: (word >> 16) as u16, lowest: word as u16 }
    }

    #[inline(always)]
    const fn pack(self) -> u32 {
        (self.highest as u32) << 16 | self.lowest as u32
    }

    #[inline(always)]
    const fn with(self, other: Self) -> Self {
        Self { highest: higher(self.highest, other.highest), lowest: lower(self.lowest, other.lowest) }
    }
}

/// Says when a marked packet that was sent at `time` and arrived at `now`, nanoseconds of the monotonic clock, leaves.
/// Several CPUs write to `order` without a lock: a lost update makes one packet's delay count a window less.
#[inline(always)]
pub fn release(order: &Order, now: u64, time: u16) -> Release {
    let at = (now >> UNIT_BITS) as u32;
    // One-way delay, plus the difference of the two clocks.
    let delay = time_of(now).wrapping_sub(time);
    let age = at.wrapping_sub(order.since.get());
    let mut present = Delays::unpack(order.present.get());
    let mut former = Delays::unpack(order.former.get());
    if age >= FORGOTTEN {
        (present, former) = (Delays::one(delay), Delays::one(delay));
    } else if age >= WINDOW {
        (former, present) = (present, Delays::one(delay));
    }
    let both = present.with(former);
    let beyond = i32::from(delay.wrapping_sub(both.highest).cast_signed()).unsigned_abs();
    let bound = order.bound.get();
    if beyond > bound {
        let strays = order.strays.get();
        order.strays.set(strays.wrapping_add(1));
        if strays >= STRAYS {
            begin(order, at, delay);
        }
        return Release::GivenUp;
    }
    order.strays.set(0);
    if age >= WINDOW {
        order.since.set(at);
        order.former.set(former.pack());
    }
    let seen = present.with(Delays::one(delay)).pack();
    if age >= WINDOW || seen != present.pack() {
        order.present.set(seen);
    }
    let both = both.with(Delays::one(delay));
    // The delays of the first packets do not show yet how much they vary.
    let spread = order.spread.get();
    let spread = if spread > bound { bound } else { spread };
    let highest = higher(both.highest, both.lowest.wrapping_add(spread as u16));
    let target = highest.wrapping_add(highest.wrapping_sub(both.lowest) / 8).wrapping_add(MARGIN);
    let hold = added(order, at, delay, target, age >= FORGOTTEN).wrapping_sub(delay).cast_signed();
    if hold < 0 {
        if place(order, at, delay) >= 0 {
            add_more(order, at, both.lowest, target);
        }
        return Release::Late;
    }
    let hold = u32::from(hold.cast_unsigned());
    let hold = if hold > bound { bound } else { hold };
    // In whole units: packets with the same time leave in the order of their arrival.
    Release::At((now >> UNIT_BITS << UNIT_BITS) + (u64::from(hold) << UNIT_BITS))
}

/// What is added to the stamp of a packet with this delay that arrives at `at`. Begins a new stretch if it is due:
/// `target` is what should be added at its end. `anew`: nothing is known yet.
#[inline(always)]
fn added(order: &Order, at: u32, delay: u16, target: u16, anew: bool) -> u16 {
    let place = place(order, at, delay);
    if anew || place >= 2 * STRETCH.cast_signed() {
        // Nothing is on its way any more that could be overtaken.
        start(order, at, target);
        return target;
    }
    let present = order.added.get();
    if place < 0 {
        return line(order.before.get(), (place + STRETCH.cast_signed()).max(0));
    }
    if place < STRETCH.cast_signed() {
        return line(present, place);
    }
    let end = present as u16;
    let fall = end.wrapping_sub(target).cast_signed();
    let next = word(end, if fall > FALL.cast_signed() { end.wrapping_sub(FALL) } else { target });
    // The clocks drift: the reference follows.
    let drift = i32::from(end.wrapping_sub(order.reference.get() as u16).cast_signed()).cast_unsigned();
    order.before.set(present);
    order.added.set(next);
    order.reference.set(u32::from(end));
    order.stretch.set(order.stretch.get().wrapping_add(STRETCH).wrapping_add(drift));
    line(next, place - STRETCH.cast_signed())
}

/// A packet was late: adds `target` to the stamps from now on, and begins a new stretch. Packets with earlier
/// stamps than one that would arrive at `at` with the `lowest` delay keep what is added to them: others of them may have left
/// already, and adding more would put them behind these.
#[inline(always)]
fn add_more(order: &Order, at: u32, lowest: u16, target: u16) {
    let place = place(order, at, lowest).clamp(0, STRETCH.cast_signed());
    let present = order.added.get();
    let now = line(present, place);
    let target = higher(target, now);
    order.before.set(word(line(present, place - STRETCH.cast_signed()), now));
    order.added.set(word(target, target));
    order.stretch.set(order.stretch.get().wrapping_add(place.cast_unsigned()));
}

/// Where the stamp of a packet with this delay that arrives at `at` is in the present stretch.
#[inline(always)]
fn place(order: &Order, at: u32, delay: u16) -> i32 {
    // The stamp by the clock of this host.
    let beyond = i32::from(delay.wrapping_sub(order.reference.get() as u16).cast_signed());
    at.wrapping_sub(beyond.cast_unsigned()).wrapping_sub(order.stretch.get()).cast_signed()
}

#[inline(always)]
const fn word(begin: u16, end: u16) -> u32 {
    (begin as u32) << 16 | end as u32
}

/// The value at `place` of a line over a stretch. `ends`: its values at the begin and at the end.
#[inline(always)]
fn line(ends: u32, place: i32) -> u16 {
    let (begin, end) = ((ends >> 16) as u16, ends as u16);
    let rise = i32::from(end.wrapping_sub(begin).cast_signed());
    let risen = (rise * place) >> STRETCH_BITS;
    begin.wrapping_add(risen.cast_unsigned() as u16)
}

/// Adds the same to all stamps from now on.
#[inline(always)]
fn start(order: &Order, at: u32, added: u16) {
    order.added.set(word(added, added));
    order.before.set(word(added, added));
    order.reference.set(u32::from(added));
    order.stretch.set(at);
}

/// Forgets all delays but this one.
#[inline(always)]
fn begin(order: &Order, at: u32, delay: u16) {
    let delays = Delays::one(delay).pack();
    order.present.set(delays);
    order.former.set(delays);
    order.since.set(at);
    order.strays.set(0);
    start(order, at, delay.wrapping_add(MARGIN));
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::shared::Shared;

    const MS: u64 = 1_000_000;
    const UNIT: u64 = 1 << UNIT_BITS;

    fn order() -> Order {
        Order { bound: Shared::new((50 * MS / UNIT) as u32), ..Order::default() }
    }

    /// When packets leave, and when they were sent, in the order in which they leave. `arrivals`: when they arrive, and
    /// when they were sent.
    fn left(order: &Order, arrivals: &mut [(u64, u64)]) -> Vec<(u64, u64)> {
        arrivals.sort_unstable();
        let leave = |(now, sent): &(u64, u64)| match release(order, *now, time_of(*sent)) {
            Release::At(at) => (at, *sent),
            Release::Late | Release::GivenUp => (*now, *sent),
        };
        let mut left: Vec<(u64, u64)> = arrivals.iter().map(leave).collect();
        left.sort_by_key(|(at, _)| *at);
        left
    }

    fn held(order: &Order, sent: u64, delay: u64) -> Release {
        release(order, sent + delay, time_of(sent))
    }

    #[test]
    fn packets_leave_as_they_were_sent() {
        // Three tunnels of 2, 7 and 12 ms, taken in turn; the clocks differ by any amount.
        for offset in [0u64, 123_456_789, 100 * MS, 268 * MS] {
            let order = order();
            let mut left: Vec<(u64, u64)> = Vec::new();
            let mut arrivals: Vec<(u64, u64)> = (0..20_000u64)
                .map(|packet| {
                    let sent = 50_000 * MS + packet * 40_000;
                    (sent + [2, 7, 12][packet as usize % 3] * MS + offset, sent)
                })
                .collect();
            arrivals.sort_unstable();
            for (now, sent) in arrivals {
                match release(&order, now, time_of(sent)) {
                    Release::At(at) => {
                        assert!(at + UNIT > now && at - now < 14 * MS, "held for {}", at - now);
                        left.push((at, sent));
                    }
                    Release::Late => left.push((now, sent)),
                    Release::GivenUp => panic!("given up"),
                }
            }
            left.sort_by_key(|(at, _)| *at);
            let overtaken = left.windows(2).filter(|pair| pair[0].1 > pair[1].1).count();
            // Until the slowest tunnel has delivered once.
            assert!(overtaken < 500, "{overtaken} with an offset of {offset}");
            let later = left.windows(2).skip(1_000).filter(|pair| pair[0].1 > pair[1].1).count();
            assert_eq!(later, 0, "offset {offset}");
        }
    }

    #[test]
    fn a_slow_tunnel_that_is_left_is_forgotten_within_a_second() {
        let order = order();
        let begin = 20_000 * MS;
        let held_for = |packet: u64| match held(&order, begin + packet * 5 * MS, 2 * MS) {
            Release::At(at) => at - begin - packet * 5 * MS - 2 * MS,
            other => panic!("{other:?}"),
        };
        held(&order, begin - 20 * MS, 20 * MS);
        let waits: Vec<u64> = (0..200).map(held_for).collect();
        assert!(waits[50] > 17 * MS, "{}", waits[50]);
        assert!(waits[199] < MS / 10, "{}", waits[199]);
        // Never by more than an eighth of the time between two packets, so that none overtakes the one before.
        assert!(waits.windows(2).all(|pair| pair[0] < pair[1] + 5 * MS / 8 + 2 * UNIT), "{waits:?}");
    }

    #[test]
    fn delays_that_are_known_to_vary_are_waited_for_from_the_first_packet_on() {
        let order = Order { spread: Shared::new((10 * MS / UNIT) as u32), ..order() };
        let begin = 20_000 * MS;
        assert!(matches!(held(&order, begin, 2 * MS), Release::At(at) if at > begin + 12 * MS));
        assert!(matches!(held(&order, begin + MS, 12 * MS), Release::At(_)));
        // Never longer than the bound, whatever the probes say.
        order.spread.set(u32::MAX);
        let Release::At(at) = held(&order, begin + 500 * MS, 2 * MS) else { panic!("late") };
        assert!(at <= begin + 552 * MS, "{at}");
    }

    #[test]
    fn a_late_packet_puts_no_others_behind() {
        // Two tunnels of 2 and 12 ms, 40 us between two packets. From the 3,000th on, the second one takes 0.1 ms more
        // than was added until then.
        let order = order();
        let mut arrivals: Vec<(u64, u64)> = (0..6_000u64)
            .map(|packet| {
                let sent = 50_000 * MS + packet * 40_000;
                let slow = if packet < 3_000 { 12 * MS } else { 13 * MS + 4 * MS / 10 };
                (sent + if packet % 2 == 0 { 2 * MS } else { slow }, sent)
            })
            .collect();
        let left = left(&order, &mut arrivals);
        let (mut latest, mut behind, mut moved) = (0, 0, 0);
        for (_, sent) in left.iter().filter(|(_, sent)| *sent > 50_000 * MS + 2_000 * 40_000) {
            if *sent < latest {
                (behind, moved) = (behind.max(latest - sent), moved + 1);
            }
            latest = latest.max(*sent);
        }
        // Those on their way when the first one was late are behind by as much as they are late, and no more.
        assert!(moved > 0 && behind < 4 * MS / 10, "{moved} by up to {behind} ns");
    }

    #[test]
    fn delays_that_vary_change_no_order() {
        // Two tunnels whose delays swing by 2 ms in different times, 40 us between two packets.
        let order = order();
        let swing = |at: u64, period: u64| {
            let place = at % period;
            (if place < period / 2 { place } else { period - place }) * 4 * MS / period
        };
        let mut arrivals: Vec<(u64, u64)> = (0..100_000u64)
            .map(|packet| {
                let sent = 50_000 * MS + packet * 40_000;
                let delay =
                    if packet % 2 == 0 { 2 * MS + swing(sent, 700 * MS) } else { 8 * MS + swing(sent, 1_100 * MS) };
                (sent + delay, sent)
            })
            .collect();
        let left = left(&order, &mut arrivals);
        let (mut highest, mut overtaken) = (0, 0);
        for (_, sent) in left.iter().skip(30_000) {
            overtaken += u32::from(*sent < highest);
            highest = highest.max(*sent);
        }
        assert_eq!(overtaken, 0, "of 70,000");
    }

    #[test]
    fn a_pause_does_not_make_it_forget() {
        let order = order();
        held(&order, 0, 2 * MS);
        held(&order, 0, 12 * MS);
        let Release::At(at) = held(&order, 3_000 * MS, 2 * MS) else { panic!("late") };
        assert!((3_012 * MS..3_014 * MS).contains(&at), "{at}");
    }

    #[test]
    fn nothing_is_held_longer_than_the_bound() {
        let order = order();
        held(&order, 0, 2 * MS);
        assert_eq!(held(&order, 0, 60 * MS), Release::GivenUp);
        held(&order, 10 * MS, 51 * MS);
        let Release::At(at) = held(&order, 80 * MS, 2 * MS) else { panic!("late") };
        assert!(at <= 132 * MS, "{at}");
    }

    #[test]
    fn a_clock_that_jumps_is_followed() {
        let order = order();
        for packet in 0..100 {
            held(&order, packet * MS, 2 * MS);
        }
        let given_up = (100..300).filter(|packet| held(&order, packet * MS, 102 * MS) == Release::GivenUp).count();
        assert_eq!(given_up as u32, STRAYS + 1);
    }
}
