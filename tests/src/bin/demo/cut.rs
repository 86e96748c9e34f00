//! Cuts one tunnel under traffic and finds out which flows are interrupted, and for how long.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::interrupt;
use lab::sites::{Hole, Lab};
use lab::traffic::{Outage, Stream};

use crate::say;

/// Number of the tunnel that is cut.
const TUNNEL: usize = 1;
/// Number of flows of the stream. With this many, a hash leaves a tunnel without a flow only once in 400,000 runs.
const FLOWS: usize = 32;
/// Datagrams a second, all flows together.
const RATE: u32 = 1_000;
/// How long the cut lasts.
const OPEN: Duration = Duration::from_secs(4);
/// How long the stream runs before and after the cut.
const AROUND: Duration = Duration::from_millis(500);

/// The result of a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Name of the tunnel.
    pub tunnel: String,
    /// How long the cut lasted.
    pub open: Duration,
    /// Number of flows.
    pub flows: usize,
    /// Number of flows that lost a datagram.
    pub hit: usize,
    /// Number of flows that stood still until the cut ended.
    pub dead: usize,
    /// Time from the first lost datagram until all interrupted flows were carried again. `None` if that was not before
    /// the end of the cut.
    pub gap: Option<Duration>,
}

/// Cuts a tunnel under a stream of numbered datagrams from A to B.
pub fn under_traffic(lab: &Lab, who: &str) -> Result<Cut> {
    interrupt::check()?;
    let tunnel = lab.tunnels[TUNNEL].name.clone();
    say::step(&format!("{who}: cutting {tunnel} for {} s under {FLOWS} flows", OPEN.as_secs()));
    let stream = Stream::start(lab.path_v4(), FLOWS, RATE)?;
    interrupt::sleep(AROUND);
    let from = Instant::now();
    let hole = Hole::dig(lab, 0, &[TUNNEL])?;
    interrupt::sleep(OPEN);
    let to = Instant::now();
    hole.fill()?;
    interrupt::sleep(AROUND);
    interrupt::check()?;
    let cut = judge(tunnel, &stream.stop()?.outages(), (from, to));
    ensure!(cut.hit > 0, "{who}: none of {FLOWS} flows was on {}", cut.tunnel);
    say::note(&cut.outcome());
    Ok(cut)
}

/// Judges the outages of a stream whose tunnel was cut from `from` to `to`.
fn judge(tunnel: String, outages: &[Outage], (from, to): (Instant, Instant)) -> Cut {
    let during: Vec<&Outage> = outages.iter().filter(|outage| (from..to).contains(&outage.from)).collect();
    let mut until = BTreeMap::new();
    for outage in &during {
        let until = until.entry(outage.flow).or_insert(outage.to);
        *until = outage.to.max(*until);
    }
    let dead: BTreeSet<usize> = until.iter().filter(|(_, until)| **until >= to).map(|(flow, _)| *flow).collect();
    // One write to a map moves all flows of a tunnel. So the gap ends with the first datagram of any flow after the
    // last lost one.
    let first = during.iter().map(|outage| outage.from).min();
    let last = during.iter().map(|outage| outage.last).max();
    let next = last.and_then(|last| during.iter().map(|outage| outage.to).filter(|to| *to > last).min());
    let gap = if dead.is_empty() { first.zip(next).map(|(first, next)| next - first) } else { None };
    Cut { tunnel, open: to - from, flows: FLOWS, hit: until.len(), dead: dead.len(), gap }
}

impl Cut {
    /// Describes the result in words.
    pub fn outcome(&self) -> String {
        let Self { flows, hit, dead, open, .. } = self;
        match self.gap {
            Some(gap) => format!("{hit} of {flows} flows interrupted, carried again after {} ms", gap.as_millis()),
            None => format!("no recovery within {} s; {dead} of {flows} flows dead", open.as_secs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_that_come_back_in_time_are_distinguished() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let outage = |flow, from, last, to| Outage { flow, from: at(from), last: at(last), to: at(to), lost: 1 };
        let judge = |outages: &[Outage]| judge("wg1".to_owned(), outages, (at(500), at(5_500)));

        let moved = judge(&[outage(3, 510, 690, 720), outage(7, 520, 700, 730), outage(1, 100, 110, 120)]);
        assert_eq!((moved.hit, moved.dead, moved.gap), (2, 0, Some(Duration::from_millis(210))));
        assert_eq!(moved.outcome(), "2 of 32 flows interrupted, carried again after 210 ms");

        let stuck = judge(&[outage(3, 510, 5_510, 5_520), outage(7, 520, 700, 730)]);
        assert_eq!((stuck.hit, stuck.dead, stuck.gap), (2, 1, None));
        assert_eq!(stuck.outcome(), "no recovery within 5 s; 1 of 32 flows dead");

        assert_eq!(judge(&[]).hit, 0);
    }
}
