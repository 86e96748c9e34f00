//! Tests the loads on one link, without ecmpvpn.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::sites::InnerTunnel;
use lab::topology::Quality;
use lab::traffic::{CongestionControl, QuicLoad, RtpLoad, TcpLoad, wait_for_reply};

use crate::pair::Pair;

const DELAY: Duration = Duration::from_millis(2);
/// Rate of the link, Mbit/s. A low one, since the tests take as long as the packets they send.
const RATE: f64 = 20.0;

pub fn a_quic_flow_fills_a_link_with_each_congestion_control() -> Result<()> {
    let pair = Pair::new(Quality::delayed(DELAY), Some(RATE))?;
    for congestion in [CongestionControl::Cubic, CongestionControl::Bbr, CongestionControl::NewReno] {
        let [begin, from, end] = [0, 1_000, 2_000].map(Duration::from_millis);
        let report = QuicLoad { congestion, begin, end, window: from..end }.run(pair.path())?;
        // With packets of 1,452 bytes, at least 1,420 of the 1,494 bytes that the shaper counts for a frame are payload:
        // 0.95. What follows a lost packet is read together once that has come again: in the window there may be more or
        // less of it than was sent, by as much as the queue holds, 5% of the window. BBR loses half of its packets here,
        // and may keep to smaller packets, because its probes for the MTU are lost too.
        let range = if congestion == CongestionControl::Bbr { 0.8..1.1 } else { 0.90..1.01 };
        let goodput = report.goodput();
        ensure!(range.contains(&(goodput / RATE)), "{congestion:?}: {goodput:.2} Mbit/s, {report:?}");
        ensure!(report.mtu > 1_300, "{congestion:?}: {report:?}");
    }
    Ok(())
}

pub fn a_paced_stream_is_timed_and_its_order_counted() -> Result<()> {
    let pair = Pair::new(Quality::delayed(DELAY), Some(RATE))?;
    let [begin, from, end] = [0, 0, 1_000].map(Duration::from_millis);
    let load = RtpLoad { payload: 1_200, rate: 9.6, begin, end, window: from..end };
    let report = load.run(pair.path())?;
    // A datagram each millisecond, and none waits for another.
    ensure!((report.sent, report.order.received) == (1_000, 1_000), "{report:?}");
    ensure!((report.order.reordered, report.order.duplicated) == (0, 0), "{report:?}");
    let most = DELAY + Duration::from_micros(100);
    ensure!(DELAY <= report.delays.least && report.delays.greatest < most, "{report:?}");
    // Jitter without a rate overtakes.
    pair.wires.namespace().tc("qdisc replace dev b0 root netem delay 10ms 5ms")?;
    let report = load.run(pair.path())?;
    ensure!(report.order.received == 1_000, "{report:?}");
    let (order, delays) = (&report.order, report.delays);
    // The first that overtakes a datagram arrives less than 10 ms before it, which is the range of the delays. What
    // arrives in such a time was sent during 20 ms, one each millisecond.
    ensure!(order.reordered > 300 && (3..20).contains(&order.extent), "{report:?}");
    ensure!(order.beyond_threshold > 100 && order.beyond_threshold < order.reordered, "{report:?}");
    let ms = Duration::from_millis;
    ensure!(delays.least >= ms(5) && delays.greatest < ms(16) && delays.p99 > ms(14), "{report:?}");
    ensure!(delays.median > ms(9) && delays.median < ms(11), "{report:?}");
    Ok(())
}

pub fn a_tunnel_between_hosts_carries_tcp() -> Result<()> {
    let pair = Pair::new(Quality::delayed(DELAY), Some(RATE))?;
    {
        let tunnel = InnerTunnel::new(pair.path())?;
        let inner = tunnel.path();
        wait_for_reply(inner.from, inner.source, inner.destination, Duration::from_secs(10))?;
        let goodput = TcpLoad::timed(1, 2.0).run(inner)?.goodput();
        // Of a frame of 1,434 bytes (MTU 1,360, and 60 and 14 bytes of headers), 1,308 are payload.
        ensure!((0.90 * RATE..0.92 * RATE).contains(&goodput), "{goodput:.2} Mbit/s");
    }
    for end in &pair.ends {
        ensure!(end.query("ip", "link show inner0").is_err(), "the tunnel was left in {}", end.name());
    }
    Ok(())
}
