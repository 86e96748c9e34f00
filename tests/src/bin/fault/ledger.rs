//! Records for each datagram whether it was lost, late or overtaken, and within which tunnel. Pure: the caller gives
//! the times, counted from the first datagram.

use std::collections::VecDeque;
use std::time::Duration;

/// A datagram that takes longer than this is late.
pub const IN_TIME: Duration = Duration::from_secs(1);
/// A datagram that takes longer than this is forgotten, and counts as lost.
const REMEMBERED: Duration = Duration::from_secs(120);

/// Consecutive datagrams of one flow that did not arrive in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outage {
    /// The site that sent them, 0 for A.
    pub sender: usize,
    /// Number of the flow.
    pub flow: usize,
    /// When the first of these datagrams was sent.
    pub from: Duration,
    /// When the next datagram that arrived in time was sent. If there is none yet: when the last judged datagram was
    /// sent.
    pub to: Duration,
    /// Number of these datagrams.
    pub lost: u32,
    /// Whether no later datagram has arrived in time yet.
    pub goes_on: bool,
}

/// How a datagram arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// No later datagram of the flow has arrived before it.
    InOrder,
    /// After a later datagram, but not after a later one of the same tunnel.
    OvertakenElsewhere,
    /// After datagram `by`, which was sent later to the same tunnel.
    Overtaken { by: u32, tunnel: u8 },
    /// It has arrived before.
    Repeated,
    /// It was not sent, or is forgotten.
    Unknown,
}

/// Sums over all flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub sent: u64,
    /// Arrived in time.
    pub on_arrival: u64,
    pub late: u64,
    /// Arrived after a later datagram of the same flow. Part of `came` or `late`.
    pub overtaken: u64,
    pub repeated: u64,
    /// How often a datagram took another tunnel than the datagram of the same flow before it.
    pub moves: u64,
}

impl Counts {
    /// Datagrams that did not arrive.
    pub fn lost(&self) -> u64 {
        self.sent - self.on_arrival - self.late
    }
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    at: Duration,
    tunnel: Option<u8>,
    on_arrival: Option<Duration>,
}

#[derive(Clone, Debug, Default)]
struct Flow {
    /// The number of the first datagram in `sent`.
    first: u32,
    sent: VecDeque<Sent>,
    /// How many in `sent` have been judged.
    judged: usize,
    outage: Option<(Duration, u32)>,
    /// When the last judged datagram was sent.
    judged_until: Duration,
    /// The highest number that has arrived.
    highest: Option<u32>,
    /// The highest number that has arrived, by tunnel.
    by_tunnel: Vec<Option<u32>>,
    last_tunnel: Option<u8>,
}

/// The record of all flows in one direction.
#[derive(Clone, Debug)]
pub struct Ledger {
    sender: usize,
    flows: Vec<Flow>,
    counts: Counts,
}

impl Ledger {
    pub fn new(sender: usize, flows: usize) -> Self {
        Self { sender, flows: vec![Flow::default(); flows], counts: Counts::default() }
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The number of the next datagram of the flow.
    pub fn next_number(&self, flow: usize) -> u32 {
        let flow = &self.flows[flow];
        flow.first + u32::try_from(flow.sent.len()).expect("few are remembered")
    }

    /// Records a datagram that was sent to `tunnel`. `None`: the tunnel is not known.
    pub fn sent(&mut self, flow: usize, at: Duration, tunnel: Option<u8>) {
        let flow = &mut self.flows[flow];
        self.counts.sent += 1;
        if let (Some(now), Some(last)) = (tunnel, flow.last_tunnel) {
            self.counts.moves += u64::from(now != last);
        }
        flow.last_tunnel = tunnel.or(flow.last_tunnel);
        flow.sent.push_back(Sent { at, tunnel, on_arrival: None });
    }

    /// Forgets which tunnels the flows took. From now on the tunnels are different ones.
    pub fn forget_tunnels(&mut self) {
        for flow in &mut self.flows {
            flow.last_tunnel = None;
            flow.by_tunnel.clear();
        }
    }

    /// Records a datagram that has arrived.
    pub fn on_arrival(&mut self, flow: usize, number: u32, at: Duration) -> Arrival {
        let Some(flow) = self.flows.get_mut(flow) else { return Arrival::Unknown };
        let Some(place) = number.checked_sub(flow.first) else { return Arrival::Unknown };
        let Some(sent) = flow.sent.get_mut(place as usize) else { return Arrival::Unknown };
        if sent.on_arrival.is_some() {
            self.counts.repeated += 1;
            return Arrival::Repeated;
        }
        sent.on_arrival = Some(at);
        if at.saturating_sub(sent.at) <= IN_TIME {
            self.counts.on_arrival += 1;
        } else {
            self.counts.late += 1;
        }
        let (tunnel, mut arrival) = (sent.tunnel, Arrival::InOrder);
        if flow.highest.is_some_and(|highest| highest > number) {
            self.counts.overtaken += 1;
            arrival = Arrival::OvertakenElsewhere;
        }
        flow.highest = flow.highest.max(Some(number));
        if let Some(tunnel) = tunnel {
            let slot = usize::from(tunnel);
            if flow.by_tunnel.len() <= slot {
                flow.by_tunnel.resize(slot + 1, None);
            }
            if let Some(by) = flow.by_tunnel[slot].filter(|highest| *highest > number) {
                arrival = Arrival::Overtaken { by, tunnel };
            }
            flow.by_tunnel[slot] = flow.by_tunnel[slot].max(Some(number));
        }
        arrival
    }

    /// Judges all datagrams that were sent more than [`IN_TIME`] before `now`. Returns every interruption that has
    /// ended since the last call or that continues.
    pub fn judge(&mut self, now: Duration) -> Vec<Outage> {
        let Some(until) = now.checked_sub(IN_TIME) else { return Vec::new() };
        let mut outages = Vec::new();
        for (number, flow) in self.flows.iter_mut().enumerate() {
            let outage =
                |(from, lost), to, goes_on| Outage { sender: self.sender, flow: number, from, to, lost, goes_on };
            while let Some(sent) = flow.sent.get(flow.judged).filter(|sent| sent.at < until) {
                flow.judged += 1;
                flow.judged_until = sent.at;
                if sent.on_arrival.is_some_and(|on_arrival| on_arrival.saturating_sub(sent.at) <= IN_TIME) {
                    outages.extend(flow.outage.take().map(|open| outage(open, sent.at, false)));
                } else {
                    let (from, lost) = flow.outage.unwrap_or((sent.at, 0));
                    flow.outage = Some((from, lost + 1));
                }
            }
            outages.extend(flow.outage.map(|open| outage(open, flow.judged_until, true)));
            while flow.judged > 0 && flow.sent.front().is_some_and(|sent| sent.at + REMEMBERED < now) {
                flow.sent.pop_front();
                flow.first += 1;
                flow.judged -= 1;
            }
        }
        outages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Ten datagrams, one every 100 ms, all to tunnel 0.
    fn ten() -> Ledger {
        let mut ledger = Ledger::new(0, 1);
        (0..10).for_each(|number| ledger.sent(0, ms(100 * number), Some(0)));
        ledger
    }

    #[test]
    fn an_outage_is_from_the_first_lost_to_the_next_that_came_in_time() {
        let mut ledger = ten();
        for number in [0, 1, 4, 5, 6] {
            ledger.on_arrival(0, number, ms(u64::from(number) * 100 + 10));
        }
        // A late datagram does not end an interruption.
        ledger.on_arrival(0, 7, ms(1_800));
        let found = ledger.judge(ms(10_000));
        let outage = |from, to, lost, goes_on| Outage { sender: 0, flow: 0, from: ms(from), to: ms(to), lost, goes_on };
        assert_eq!(found, [outage(200, 400, 2, false), outage(700, 900, 3, true)]);
        let counts = ledger.counts();
        assert_eq!((counts.sent, counts.on_arrival, counts.late, counts.lost()), (10, 5, 1, 4));
        // An interruption that continues is returned again, and a last time when it has ended.
        ledger.sent(0, ms(10_000), Some(0));
        ledger.on_arrival(0, 10, ms(10_010));
        assert_eq!(ledger.judge(ms(12_000)), [outage(700, 10_000, 3, false)]);
        assert!(ledger.judge(ms(13_000)).is_empty());
    }

    #[test]
    fn what_was_sent_a_moment_ago_is_not_judged() {
        let mut ledger = ten();
        assert!(ledger.judge(ms(1_000)).is_empty());
        assert_eq!(ledger.judge(ms(1_250)).len(), 1);
    }

    #[test]
    fn overtaking_within_a_tunnel_differs_from_overtaking_between_tunnels() {
        use Arrival::{InOrder, OvertakenElsewhere};
        let mut ledger = Ledger::new(0, 1);
        for (at, tunnel) in [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0)] {
            ledger.sent(0, ms(at), Some(tunnel));
        }
        let on_arrival = [2, 0, 1, 4, 3].map(|number| ledger.on_arrival(0, number, ms(10)));
        assert_eq!(on_arrival, [InOrder, OvertakenElsewhere, OvertakenElsewhere, InOrder, OvertakenElsewhere]);
        assert_eq!((ledger.counts().overtaken, ledger.counts().moves), (3, 2));
        let mut ledger = ten();
        ledger.on_arrival(0, 3, ms(400));
        assert_eq!(ledger.on_arrival(0, 2, ms(401)), Arrival::Overtaken { by: 3, tunnel: 0 });
        assert_eq!(ledger.on_arrival(0, 2, ms(402)), Arrival::Repeated);
        assert_eq!(ledger.on_arrival(0, 99, ms(402)), Arrival::Unknown);
    }

    #[test]
    fn old_datagrams_are_forgotten_and_numbers_go_on() {
        let mut ledger = ten();
        ledger.judge(ms(500_000));
        assert_eq!(ledger.next_number(0), 10);
        assert_eq!(ledger.on_arrival(0, 3, ms(500_000)), Arrival::Unknown);
        ledger.sent(0, ms(500_000), None);
        assert_eq!(ledger.on_arrival(0, 10, ms(500_010)), Arrival::InOrder);
    }
}
