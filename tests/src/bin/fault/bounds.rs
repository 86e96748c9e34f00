//! What each kind of fault may cost, and why: the bounds that the invariant "recovery" holds the program to.

use std::time::Duration;

use crate::schedule::{Change, Event, Fault};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// A flow sends each 80 ms, its datagram is on its way for up to 80 ms, and is looked for each 20 ms: what is measured of an
/// interruption is longer by as much.
pub const SAMPLING: Duration = Duration::from_millis(180);
/// One tunnel of several dies: its flows go on over another one after so long.
pub const FAILOVER: Duration = Duration::from_millis(500);
/// Where probes are lost by chance, up to 12 must be missed instead of 3 (docs/health.md), 20 ms each.
const DOUBTFUL: Duration = Duration::from_millis(200);
/// A new `run` gives a tunnel that it has not yet heard of so long, beside the failover itself.
pub const NEW: Duration = Duration::from_millis(3_500);
/// LACP, fast: a port leaves the bond 3 s after the last word of its partner, which comes each second: two words lost, and
/// the third may come too late. It comes back with the next word, within a second, and two more for the aggregator to wait
/// (802.1AX: `Aggregate_Wait_Time`); the partner learns of it a second later.
const LACP_LEAVES: Duration = Duration::from_secs(1);
const LACP_JOINS: Duration = Duration::from_secs(5);
/// Another 3 s later the port's partner counts as unknown, and with both ends in that state each sends its word only every
/// 30 s (802.1AX: `Slow_Periodic_Time`; `ad_periodic_machine()`, `drivers/net/bonding/bond_3ad.c`).
pub const LACP_FORGETS: Duration = Duration::from_secs(4);
const LACP_SLOW: Duration = Duration::from_secs(30);
/// Dead tunnels are probed each 100 ms, and used after 5 answers.
const PROBED: Duration = Duration::from_millis(800);
/// A tunnel dead for so long is started anew: it has no session, and needs a handshake (docs/health.md).
const STARTED_ANEW: Duration = Duration::from_millis(4_500);
/// WireGuard sends a handshake again 5 s after one without an answer, and up to a third of a second later (drivers/net/
/// wireguard/messages.h: `REKEY_TIMEOUT`, `REKEY_TIMEOUT_JITTER_MAX_JIFFIES`).
const HANDSHAKE: Duration = Duration::from_millis(5_400);

/// What may happen to traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Nothing.
    Nothing,
    /// Flows are interrupted, each time for at most so long, until so long after the fault's end.
    Interruptions { longest: Duration, settles: Duration },
    /// Nothing flows while it lasts, and all of it flows again so long after its end.
    Standstill { after: Duration },
}

/// What `event` may cost.
pub fn cost(event: &Event) -> Cost {
    let joins = if event.lasts >= LACP_FORGETS {
        LACP_SLOW + LACP_JOINS
    } else if event.lasts >= LACP_LEAVES {
        LACP_JOINS
    } else {
        Duration::ZERO
    };
    let interruptions = |longest, settles| Cost::Interruptions { longest: longest + SAMPLING, settles };
    let standstill = |after| Cost::Standstill { after: after + SAMPLING };
    match event.fault {
        Fault::Cut { .. } => interruptions(FAILOVER, S + joins),
        // The bond sees it at once, and the port joins anew.
        Fault::Pull { .. } => interruptions(FAILOVER, S + LACP_JOINS),
        Fault::Loss { .. } => interruptions(FAILOVER + DOUBTFUL, S + LACP_JOINS),
        Fault::Move { .. } => interruptions(FAILOVER, S),
        // What sabotage breaks is no part of its cost.
        Fault::Delay { .. }
        | Fault::Kill { .. }
        | Fault::Reload { change: Change::Nothing | Change::Weight { .. } | Change::Prefix, .. }
        | Fault::Sabotage { .. } => Cost::Nothing,
        // What the other site sends through it meanwhile is lost until its probes miss it (docs/operation.md).
        Fault::Reload { change: Change::Tunnel | Change::Port { .. }, .. } => interruptions(FAILOVER, 2 * S),
        Fault::CutAll => standstill(joins + sessions(event.lasts)),
        Fault::PullAll => standstill(LACP_JOINS + sessions(event.lasts)),
        Fault::Unaddress { .. } => standstill(sessions(event.lasts)),
        // Its bond joins while its first handshakes are already lost; they are repeated twice.
        Fault::Restart { .. } | Fault::PowerCut => standstill(LACP_JOINS + 2 * HANDSHAKE + PROBED),
    }
}

/// What it takes until all tunnels carry traffic, after they could not for `lasted`.
fn sessions(lasted: Duration) -> Duration {
    if lasted < 600 * MS {
        // None has died.
        Duration::ZERO
    } else if lasted < STARTED_ANEW {
        PROBED
    } else {
        // Both ends may have begun handshakes that cross, and begin again.
        2 * HANDSHAKE + PROBED
    }
}

/// What one lost packet of a handshake costs more, where packets are lost.
pub fn by_loss(cost: Cost) -> Cost {
    match cost {
        Cost::Standstill { after } => Cost::Standstill { after: after + HANDSHAKE },
        Cost::Interruptions { longest, settles } => Cost::Interruptions { longest: longest + DOUBTFUL, settles },
        Cost::Nothing => Cost::Nothing,
    }
}

/// How long after its end traffic may still suffer: the next fault comes later.
pub fn recovery(event: &Event) -> Duration {
    match by_loss(cost(event)) {
        Cost::Nothing => 2 * S,
        Cost::Interruptions { longest, settles } => settles + longest,
        Cost::Standstill { after } => after,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Way;

    fn standstill(fault: Fault, lasts: Duration) -> Duration {
        match cost(&Event { at: S, lasts, fault }) {
            Cost::Standstill { after } => after.saturating_sub(SAMPLING),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_takes_longer_costs_more_as_timers_have_it() {
        assert_eq!(standstill(Fault::CutAll, 500 * MS), Duration::ZERO);
        assert_eq!(standstill(Fault::CutAll, 900 * MS), PROBED);
        assert_eq!(standstill(Fault::CutAll, 3 * S), LACP_JOINS + PROBED);
        assert_eq!(standstill(Fault::CutAll, 8 * S), LACP_SLOW + LACP_JOINS + 2 * HANDSHAKE + PROBED);
        assert_eq!(standstill(Fault::Unaddress { site: 0 }, 3 * S), PROBED);
    }

    #[test]
    fn one_tunnel_of_several_costs_half_a_second_each_time() {
        let cut = Event { at: S, lasts: 500 * MS, fault: Fault::Cut { link: 0, way: Way::Both } };
        assert_eq!(cost(&cut), Cost::Interruptions { longest: FAILOVER + SAMPLING, settles: S });
        assert_eq!(by_loss(cost(&cut)), Cost::Interruptions { longest: FAILOVER + SAMPLING + DOUBTFUL, settles: S });
        assert_eq!(cost(&Event { fault: Fault::Kill { site: 1 }, ..cut }), Cost::Nothing);
    }
}
