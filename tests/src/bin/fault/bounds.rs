//! What each kind of fault may cost, and why. The invariant "recovery" uses these bounds.

use std::time::Duration;

use crate::event::{Change, Event, Fault};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// How much longer than the real interruption the measured one may be. A flow sends every 80 ms, its datagram takes up
/// to 80 ms, and the receiver looks every 20 ms.
pub const SAMPLING: Duration = Duration::from_millis(180);
/// If one tunnel of several goes down, its flows continue over another one within this time.
pub const FAILOVER: Duration = Duration::from_millis(500);
/// Additional failover time while probes are lost by chance. Up to 12 must be missed instead of 3 (docs/health.md), 20
/// ms each.
const DOUBTFUL: Duration = Duration::from_millis(200);
/// Additional time that a new `run` gives a tunnel from which it has not heard yet.
pub const NEW: Duration = Duration::from_millis(3_500);
/// LACP with fast rate: a port leaves the bond 3 s after its partner's last LACPDU. LACPDUs come each second: after two
/// lost ones, the third may come too late. The port joins again with the next LACPDU, which comes within a second, plus
/// two seconds in which the aggregator waits (802.1AX: `Aggregate_Wait_Time`). The partner learns of it a second later.
const LACP_LEAVES: Duration = Duration::from_secs(1);
const LACP_JOINS: Duration = Duration::from_secs(5);
/// After another 3 s, the port's partner counts as unknown. With both ends in that state, each end sends an LACPDU only
/// every 30 s (802.1AX: `Slow_Periodic_Time`; `ad_periodic_machine()`, `drivers/net/bonding/bond_3ad.c`).
pub const LACP_FORGETS: Duration = Duration::from_secs(4);
const LACP_SLOW: Duration = Duration::from_secs(30);
/// Until a tunnel that works again is used. Tunnels that are down are probed every 100 ms, and used after 5 answers.
const PROBED: Duration = Duration::from_millis(800);
/// A tunnel that is down for this long is started again. It then has no session and needs a handshake (docs/health.md).
const STARTED_ANEW: Duration = Duration::from_millis(4_500);
/// WireGuard repeats an unanswered handshake after 5 s and a random time of up to a third of a second
/// (drivers/net/wireguard/messages.h: `REKEY_TIMEOUT`, `REKEY_TIMEOUT_JITTER_MAX_JIFFIES`).
const HANDSHAKE: Duration = Duration::from_millis(5_400);

/// How soon `run` makes again what somebody else takes away (docs/operation.md).
const MENDED: Duration = Duration::from_millis(300);

/// What a fault may do to traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    Nothing,
    /// Flows are interrupted, each time for at most `longest`, until `settles` after the fault's end.
    Interruptions {
        longest: Duration,
        settles: Duration,
    },
    /// Nothing flows during the fault, and everything flows again at the latest `after` its end.
    Standstill {
        after: Duration,
    },
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
        // The bond notices at once, and the port joins again.
        Fault::Pull { .. } => interruptions(FAILOVER, S + LACP_JOINS),
        Fault::Loss { .. } => interruptions(FAILOVER + DOUBTFUL, S + LACP_JOINS),
        Fault::Move { .. } => interruptions(FAILOVER, S),
        // Sabotage has no allowed cost: what it breaks must be found.
        Fault::Delay { .. }
        | Fault::Kill { .. }
        | Fault::Reload { change: Change::Nothing | Change::Weight { .. } | Change::Prefix, .. }
        | Fault::Locks { .. }
        | Fault::Flood { .. }
        | Fault::Sabotage { .. } => Cost::Nothing,
        // Until it is mended, packets of that site are refused, and not sent elsewhere.
        Fault::Disturb { .. } => interruptions(MENDED, S),
        // Until its probes fail, the other site still sends through that tunnel, and loses what it sends
        // (docs/operation.md).
        Fault::Reload { change: Change::Tunnel | Change::Port { .. }, .. } => interruptions(FAILOVER, 2 * S),
        Fault::CutAll => standstill(joins + sessions(event.lasts)),
        Fault::PullAll => standstill(LACP_JOINS + sessions(event.lasts)),
        Fault::Unaddress { .. } => standstill(sessions(event.lasts)),
        // While the bond joins, the first handshakes are lost. They are repeated twice.
        Fault::Restart { .. } | Fault::PowerCut => standstill(LACP_JOINS + 2 * HANDSHAKE + PROBED),
    }
}

/// How long it takes until all tunnels carry traffic, after they could not for `lasted`.
fn sessions(lasted: Duration) -> Duration {
    if lasted < 600 * MS {
        // No tunnel was declared down.
        Duration::ZERO
    } else if lasted < STARTED_ANEW {
        PROBED
    } else {
        // Both ends may have begun handshakes that cross each other, and must begin again.
        2 * HANDSHAKE + PROBED
    }
}

/// `cost` while packets are lost: one packet of a handshake may be among them.
pub fn by_loss(cost: Cost) -> Cost {
    match cost {
        Cost::Standstill { after } => Cost::Standstill { after: after + HANDSHAKE },
        Cost::Interruptions { longest, settles } => Cost::Interruptions { longest: longest + DOUBTFUL, settles },
        Cost::Nothing => Cost::Nothing,
    }
}

/// How long traffic may still suffer after the end of the fault. The next fault comes later.
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
    use crate::event::Way;

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
