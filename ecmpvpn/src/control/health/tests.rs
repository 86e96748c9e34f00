//! Tests of the detector, with simulated time and losses.

use std::collections::BTreeMap;

use super::detector::{Fault, Others, Settings, Transition, Tunnel};
use super::estimate::RoundTrip;
use super::nanos::Nanos;
use super::wire::Received;

const MS: Nanos = 1_000_000;
const SECOND: Nanos = 1_000 * MS;

const DEFAULT: Settings = Settings { interval: 100 * MS, down_after: 3, up_after: 5 };

/// The time that a packet sent now takes in one direction; `None`: it is dropped.
type Way<'a> = Box<dyn FnMut(Nanos) -> Option<Nanos> + 'a>;

/// A tunnel between two ends, and the traffic in it.
struct Scene<'a> {
    there: Way<'a>,
    back: Way<'a>,
    /// Whether the far end runs ecmpvpn, and so reports and probes as well.
    far_reports: bool,
    /// Interval between data packets of the near end, and of the far end; 0: none are sent.
    data: [Nanos; 2],
    settings: Settings,
    /// Whether there is another tunnel between the two ends, which always works.
    beside: bool,
}

impl Default for Scene<'_> {
    fn default() -> Self {
        let clear = || Box::new(|_| Some(MS / 2));
        Self { there: clear(), back: clear(), far_reports: true, data: [0, 0], settings: DEFAULT, beside: true }
    }
}

enum Packet {
    Data,
    /// Sequence number, and what its sender received.
    Probe(u16, Received),
    Answer(u16),
}

struct End {
    tunnel: Tunnel,
    /// Whether it runs ecmpvpn.
    probes: bool,
    received: u64,
    /// The latest time of its next look at `received`.
    wake: Nanos,
    transitions: Vec<(Nanos, Transition)>,
}

impl Scene<'_> {
    /// Simulates until `end` in steps of a millisecond. Returns the near end's changes of state with their times, and
    /// its tunnel.
    fn play(self, end: Nanos) -> (Vec<(Nanos, Transition)>, Tunnel) {
        let [near, _] = self.play_both(end);
        (near.transitions, near.tunnel)
    }

    fn play_both(self, until: Nanos) -> [End; 2] {
        let begin = |at: Nanos, probes| End {
            tunnel: Tunnel::new(self.settings, true, RoundTrip::default(), SECOND + at),
            probes,
            received: 0,
            wake: 0,
            transitions: Vec::new(),
        };
        let mut ends = [begin(0, true), begin(37 * MS, self.far_reports)];
        let mut ways = [self.there, self.back];
        // By arrival time and serial number: the end where the packet arrives, and the packet.
        let mut on_the_way: BTreeMap<(Nanos, u64), (usize, Packet)> = BTreeMap::new();
        let mut serial = 0;
        let mut now = SECOND;
        while now < until {
            for (at, end) in ends.iter_mut().enumerate() {
                let mut packets = Vec::new();
                if self.data[at] != 0 && now.is_multiple_of(self.data[at]) {
                    packets.push(Packet::Data);
                }
                if end.probes {
                    if now >= end.wake {
                        end.tunnel.received(end.received, now);
                    }
                    if self.beside {
                        let sent = now - (now + 63 * MS) % self.settings.interval;
                        end.tunnel.compare_with(Others { answered: false, evidence: Some(sent) }, now);
                    }
                    let step = end.tunnel.poll(now);
                    end.transitions.extend(step.transition.map(|transition| (now, transition)));
                    packets.extend(step.send.map(|sequence| Packet::Probe(sequence, end.tunnel.report(now))));
                    end.wake = end.tunnel.next_poll(now);
                    assert!(end.wake > now, "it would be called for ever");
                }
                for packet in packets {
                    serial += 1;
                    ways[at](now).map(|delay| on_the_way.insert((now + delay, serial), (1 - at, packet)));
                }
            }
            now += MS;
            while let Some(entry) = on_the_way.first_entry().filter(|entry| entry.key().0 <= now) {
                let ((arrival, _), (at, packet)) = entry.remove_entry();
                let end = &mut ends[at];
                end.received += 1;
                match packet {
                    Packet::Data => {}
                    Packet::Answer(sequence) => end.tunnel.answered(sequence, arrival),
                    Packet::Probe(sequence, received) => {
                        end.tunnel.reported(received, arrival);
                        serial += 1;
                        let answer = (1 - at, Packet::Answer(sequence));
                        ways[at](arrival).map(|delay| on_the_way.insert((arrival + delay, serial), answer));
                    }
                }
            }
        }
        ends
    }
}

/// Deterministic pseudo-random numbers.
struct Chance(u64);

impl Chance {
    fn of(&mut self, percent: u64) -> bool {
        self.0 = ecmpvpn_common::flow::mix(self.0.wrapping_add(0x9e37_79b9_7f4a_7c15));
        self.0 % 10_000 < percent * 100
    }
}

/// Drops everything in `from..to`.
fn hole<'a>(delay: Nanos, from: Nanos, to: Nanos) -> Way<'a> {
    Box::new(move |now| (!(from..to).contains(&now)).then_some(delay))
}

/// A full link: a queue that sends `rate` bytes a millisecond and holds `limit` bytes. Others fill it with `load` bytes
/// a millisecond during `busy`.
fn queue<'a>(rate: u64, limit: u64, load: u64, busy: std::ops::Range<Nanos>) -> Way<'a> {
    let (mut filled, mut last, mut chance) = (0_u64, 0, Chance(7));
    Box::new(move |now| {
        let passed = (now - last) / MS;
        for step in 0..passed {
            let load = if busy.contains(&(last + step * MS)) { load } else { 0 };
            filled = (filled + load).min(limit + load).saturating_sub(rate).min(limit);
        }
        last += passed * MS;
        // A full queue drops what exceeds its rate, from all senders alike.
        let full = filled + load.saturating_sub(rate) >= limit && busy.contains(&now);
        let dropped = full && chance.of((load - rate) * 100 / load);
        (!dropped).then_some(MS / 2 + filled * MS / rate)
    })
}

#[test]
fn a_dead_tunnel_is_found_within_its_time_and_comes_back() {
    for (delay, most) in [(MS / 4, 252), (5 * MS, 262), (20 * MS, 300), (50 * MS, 380)] {
        for offset in (0..100).step_by(7) {
            for (far_reports, sending) in [(true, true), (true, false), (false, true), (false, false)] {
                let from = 10 * SECOND + offset * MS;
                let to = from + 10 * SECOND;
                let mut scene = Scene { far_reports, data: [MS, 0], ..Scene::default() };
                let way = hole(delay, from, to);
                let clear = hole(delay, 0, 0);
                (scene.there, scene.back) = if sending { (way, clear) } else { (clear, way) };
                let (transitions, tunnel) = scene.play(30 * SECOND);
                let [(down, Transition::Down(fault)), (up, Transition::Up)] = transitions[..] else {
                    panic!("{transitions:?}")
                };
                let expected = if sending && far_reports { Fault::Sending } else { Fault::Silent };
                assert_eq!(fault, expected, "{delay} {offset} {far_reports} {sending}");
                let took = (down - from) / MS;
                assert!((140..=most).contains(&took), "{delay} {offset}: after {took} ms");
                let back = (up - to) / MS;
                assert!((400..=800).contains(&back), "{delay} {offset}: back after {back} ms");
                assert!(tunnel.live());
            }
        }
    }
}

#[test]
fn what_befalls_all_tunnels_at_once_is_given_longer() {
    for offset in (0..100).step_by(7) {
        for far_reports in [true, false] {
            let from = 10 * SECOND + offset * MS;
            let play = |lasts: Nanos| {
                let there = hole(MS, from, from + lasts);
                Scene { there, far_reports, beside: false, ..Scene::default() }.play(20 * SECOND).0
            };
            assert_eq!(play(750 * MS), [], "{offset} {far_reports}");
            let transitions = play(5 * SECOND);
            let [(down, Transition::Down(_)), (_, Transition::Up)] = transitions[..] else { panic!("{transitions:?}") };
            assert!((800..=1_050).contains(&((down - from) / MS)), "{offset}: after {} ms", (down - from) / MS);
        }
    }
}

#[test]
fn after_a_standstill_the_tunnel_that_answers_last_is_not_dead() {
    let mut tunnel = Tunnel::new(DEFAULT, true, RoundTrip::default(), SECOND);
    let mut unanswered = Vec::new();
    // All tunnels stop for 700 ms from second 2 on. The answers of the other tunnel return 40 ms before those of this
    // one.
    let (still, others_go_on, goes_on) = (2 * SECOND, 2_700 * MS, 2_740 * MS);
    for now in (1_000..4_000).map(|ms| ms * MS) {
        let others = if (still..others_go_on).contains(&now) { still } else { now };
        tunnel.compare_with(Others { answered: true, evidence: Some(others) }, now);
        let step = tunnel.poll(now);
        assert_eq!(step.transition, None, "at {} ms", now / MS);
        unanswered.extend(step.send);
        if !(still..goes_on).contains(&now) {
            unanswered.drain(..).for_each(|sequence| tunnel.answered(sequence, now));
        }
    }
}

#[test]
fn the_other_ends_traffic_alone_does_not_hide_a_dead_direction() {
    // The far end does not run ecmpvpn, so a full tunnel looks the same: it gets half as long again.
    let from = 10 * SECOND + 30 * MS;
    let scene = Scene { there: hole(MS, from, 60 * SECOND), far_reports: false, data: [MS, MS], ..Scene::default() };
    let (transitions, _) = scene.play(20 * SECOND);
    let [(down, Transition::Down(Fault::Unanswered))] = transitions[..] else { panic!("{transitions:?}") };
    assert!((250..=380).contains(&((down - from) / MS)), "after {} ms", (down - from) / MS);
}

#[test]
fn random_loss_is_no_death() {
    for percent in [1, 2, 5] {
        for far_reports in [true, false] {
            let (mut there, mut back) = (Chance(percent), Chance(percent + 100));
            let scene = Scene {
                there: Box::new(move |_| (!there.of(percent)).then_some(2 * MS)),
                back: Box::new(move |_| (!back.of(percent)).then_some(2 * MS)),
                far_reports,
                ..Scene::default()
            };
            let (transitions, tunnel) = scene.play(600 * SECOND);
            assert_eq!(transitions, [], "{percent}%");
            let (found, expected) = (u64::from(tunnel.loss().ppm()), percent * 20_000);
            assert!(found < 3 * expected, "{found} ppm lost of {expected}");
        }
    }
}

#[test]
fn loss_in_bursts_is_no_death() {
    // Loss as in full queues: about every 100 ms, for 20 to 60 ms, half of the packets, independently in each
    // direction.
    let bursts = |seed: u64| {
        let mut chance = Chance(seed);
        let (mut until, mut next) = (0, 0);
        move |now: Nanos| {
            if now >= next {
                (until, next) = (
                    now + 20 * MS + 40 * MS * u64::from(chance.of(50)),
                    now + 70 * MS + 60 * MS * u64::from(chance.of(50)),
                );
            }
            (!(now < until && chance.of(50))).then_some(40 * MS)
        }
    };
    for seed in 1..=5 {
        let scene = Scene {
            there: Box::new(bursts(seed)),
            back: Box::new(bursts(seed + 100)),
            data: [2 * MS, 2 * MS],
            ..Scene::default()
        };
        for end in scene.play_both(600 * SECOND) {
            assert_eq!(end.transitions, [], "{} ppm", end.tunnel.loss().ppm());
        }
    }
}

#[test]
fn a_queue_that_fills_up_is_no_death() {
    // 100 Mbit/s with a queue of 250 ms. Suddenly a third more arrives. If the far end does not report, a full tunnel
    // can be told from a dead one only at less loss: then 7% more.
    for (far_reports, load) in [(true, 17_000), (false, 13_400)] {
        let busy = 10 * SECOND..70 * SECOND;
        let scene =
            Scene { there: queue(12_500, 3_125_000, load, busy), far_reports, data: [MS, 0], ..Scene::default() };
        for end in scene.play_both(80 * SECOND) {
            assert_eq!(end.transitions, [], "reports: {far_reports}");
        }
    }
}

#[test]
fn a_full_tunnel_that_drops_half_of_all_probes_is_no_death() {
    for (far_reports, data) in [(true, [MS, 0]), (true, [MS, MS]), (false, [MS, MS])] {
        let (mut there, mut back) = (Chance(3), Chance(4));
        let both = data[1] != 0 && far_reports;
        let scene = Scene {
            there: Box::new(move |_| (!there.of(50)).then_some(20 * MS)),
            back: Box::new(move |_| (!back.of(if both { 20 } else { 0 })).then_some(20 * MS)),
            far_reports,
            data,
            ..Scene::default()
        };
        for end in scene.play_both(120 * SECOND) {
            assert_eq!(end.transitions, [], "reports: {far_reports}, data: {data:?}");
        }
    }
}

/// When a tunnel dies that was answered for one second, and then gets a report every 200 ms that packets arrive at the
/// far end. `None`: not within `longest`.
fn arrival_report(age: Option<Nanos>, longest: Nanos) -> Option<Nanos> {
    let mut tunnel = Tunnel::new(DEFAULT, true, RoundTrip::default(), SECOND);
    let begin = 2 * SECOND;
    for now in (1_000..2_000).map(|ms| ms * MS) {
        let step = tunnel.poll(now);
        step.send.into_iter().for_each(|sequence| tunnel.answered(sequence, now + MS));
    }
    (0..longest / MS).map(|ms| begin + ms * MS).find(|now| {
        if now.is_multiple_of(200 * MS) {
            tunnel.reported(Received { count: now / MS, age, at_probe: None }, *now);
        }
        tunnel.compare_with(Others { answered: true, evidence: Some(*now) }, *now);
        tunnel.poll(*now).transition.is_some()
    })
}

#[test]
fn a_report_with_the_time_of_arrival_replaces_the_one_that_was_lost() {
    assert_eq!(arrival_report(Some(20 * MS), 2 * SECOND), None);
    // Without an age, the packets may have arrived right after the previous report.
    assert!(arrival_report(None, 2 * SECOND).is_some());
    // Reports say that the last packet came 400 ms ago.
    let died = arrival_report(Some(400 * MS), 2 * SECOND).expect("it is dead");
    assert!(died < 2 * SECOND + 300 * MS, "after {} ms", died / MS - 2_000);
    // Reports alone do not count after three seconds without an answer.
    let died = arrival_report(Some(20 * MS), 5 * SECOND).expect("it is dead");
    assert!((4_800 * MS..5_400 * MS).contains(&died), "at {} ms", died / MS);
}

#[test]
fn answers_out_of_order_are_answers() {
    let mut odd = false;
    let scene = Scene {
        there: Box::new(move |_| {
            odd = !odd;
            Some(if odd { 150 * MS } else { MS })
        }),
        far_reports: false,
        ..Scene::default()
    };
    let (transitions, tunnel) = scene.play(60 * SECOND);
    assert_eq!(transitions, []);
    assert_eq!(tunnel.loss().ppm(), 0);
}

#[test]
fn what_never_answered_stays_in_use_until_another_tunnel_answers() {
    let (transitions, mut tunnel) = Scene { there: Box::new(|_| None), ..Scene::default() }.play(60 * SECOND);
    assert_eq!(transitions, []);
    assert!(tunnel.live() && !tunnel.ever_answered());
    let others = Others { answered: true, evidence: Some(60 * SECOND) };
    tunnel.compare_with(others, 60 * SECOND);
    tunnel.compare_with(others, 60 * SECOND + 50 * MS);
    assert!(matches!(tunnel.poll(60 * SECOND + 50 * MS).transition, Some(Transition::Down(_))));
}

#[test]
fn probes_that_waited_for_a_handshake_do_not_count_as_round_trips() {
    // Everything sent in the first 1.5 s arrives when the handshake is done.
    let handshake = SECOND + 1_500 * MS;
    let scene = Scene {
        there: Box::new(move |now| Some(handshake.saturating_sub(now).max(MS))),
        far_reports: false,
        ..Scene::default()
    };
    let (transitions, tunnel) = scene.play(10 * SECOND);
    assert_eq!(transitions, []);
    assert_eq!(tunnel.round_trip().smoothed().map(|time| time / MS), Some(1));
    assert_eq!(tunnel.loss().ppm(), 0);
}

#[test]
fn what_was_dropped_before_the_first_answer_does_not_make_a_tunnel_dead() {
    // The far end appears after 15 s. WireGuard has kept one of the probes; the others found no room.
    let begin = 15 * SECOND;
    let scene = Scene {
        there: Box::new(move |now| match now {
            now if now >= begin => Some(MS),
            now if now / (100 * MS) == 131 => Some(begin - now),
            _ => None,
        }),
        far_reports: false,
        ..Scene::default()
    };
    let (transitions, tunnel) = scene.play(30 * SECOND);
    assert_eq!(transitions, []);
    assert!(tunnel.ever_answered());
}

#[test]
fn a_stalled_process_does_not_blame_the_tunnels() {
    let mut tunnel = Tunnel::new(DEFAULT, true, RoundTrip::default(), SECOND);
    let answer = |tunnel: &mut Tunnel, now: Nanos| {
        if let Some(sequence) = tunnel.poll(now).send {
            tunnel.answered(sequence, now + MS);
        }
    };
    (0..50).for_each(|i| answer(&mut tunnel, SECOND + i * 100 * MS));
    // The process runs again two seconds later. Its last probe was answered.
    for i in 0..50 {
        let step = tunnel.poll(8 * SECOND + i * 100 * MS);
        assert_eq!(step.transition, None);
        step.send.into_iter().for_each(|sequence| tunnel.answered(sequence, 8 * SECOND + i * 100 * MS + MS));
    }
}

#[test]
fn down_after_and_up_after_are_heeded() {
    for (down_after, up_after) in [(1, 1), (5, 20), (20, 2)] {
        let (from, to) = (10 * SECOND + 50 * MS, 20 * SECOND);
        let settings = Settings { interval: 50 * MS, down_after, up_after };
        let (transitions, _) = Scene { there: hole(MS, from, to), settings, ..Scene::default() }.play(30 * SECOND);
        let [(down, Transition::Down(_)), (up, Transition::Up)] = transitions[..] else { panic!("{transitions:?}") };
        let (down, up) = ((down - from) / MS, (up - to) / MS);
        let (interval, down_after, up_after) = (50, u64::from(down_after), u64::from(up_after));
        assert!(down >= (down_after - 1) * interval && down <= down_after * interval + 60, "{down_after}: {down}");
        assert!(up >= (up_after - 1) * interval && up <= (up_after + 3) * interval, "{up_after}: {up}");
    }
}
