//! The traffic: one flow of a transport, and its figures.

use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use lab::comparison::{Comparison, Counters};
use lab::sites::InnerTunnel;
use lab::traffic::{CongestionControl, Path, QuicLoad, RtpLoad, TimedFlow, Timetable, wait_for_reply};

use crate::sample::{Figures, figure, figures, milliseconds};

/// UDP payload of the RTP-like stream, bytes: what video over WebRTC has.
const PAYLOAD: usize = 1_200;
/// How long the inner tunnel may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// When a flow is sent and measured, from the start of a load.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub begin: Duration,
    pub end: Duration,
}

impl Times {
    /// The second half. A flow has to find its speed, and `adaptive` looks for elephants once a second.
    pub fn window(self) -> Range<Duration> {
        self.begin + self.end.saturating_sub(self.begin) / 2..self.end
    }
}

/// One bulk TCP flow.
pub fn bulk(path: Path<'_>, times: Times) -> Timetable<'_> {
    let flow = TimedFlow { path, begin: times.begin, end: times.end };
    // Half of the shortest one-way delay, so that the receiver's window stays open.
    Timetable { flows: vec![flow], window: times.window(), look: Duration::from_millis(1) }
}

/// One bulk TCP flow, and what the kernel counts of it.
pub fn tcp(comparison: &Comparison, path: Path<'_>, times: Times) -> Result<Figures> {
    let before = Counters::read(&comparison.lab, path)?;
    let goodput = bulk(path, times).run()?.goodput();
    let gained = Counters::read(&comparison.lab, path)?.since(&before);
    Ok(figures(&[
        (figure::GOODPUT, goodput),
        (figure::LOST, share(gained.retransmitted, gained.segments)),
        (figure::OUT_OF_ORDER, share(gained.out_of_order, gained.segments)),
    ]))
}

/// One bulk TCP flow in a WireGuard tunnel between the ends of the path.
pub fn wireguard(comparison: &Comparison, path: Path<'_>, times: Times) -> Result<Figures> {
    let tunnel = InnerTunnel::new(path)?;
    let inner = tunnel.path();
    wait_for_reply(inner.from, inner.source, inner.destination, PATIENCE)?;
    tcp(comparison, inner, times)
}

/// One bulk QUIC flow.
pub fn quic(path: Path<'_>, times: Times, congestion: CongestionControl) -> Result<Figures> {
    let load = QuicLoad { congestion, begin: times.begin, end: times.end, window: times.window() };
    let report = load.run(path)?;
    Ok(figures(&[
        (figure::GOODPUT, report.goodput()),
        (figure::LOST, share(report.lost, report.packets)),
        ("congestion_events", small(report.congestion_events)),
        ("mtu", report.mtu.into()),
    ]))
}

/// A paced stream. `rate` is in 10^6 bits of payload a second.
pub fn rtp(path: Path<'_>, times: Times, rate: f64) -> Result<Figures> {
    let load = RtpLoad { payload: PAYLOAD, rate, begin: times.begin, end: times.end, window: times.window() };
    let report = load.run(path)?;
    let delays = report.delays;
    Ok(figures(&[
        (figure::GOODPUT, report.goodput()),
        (figure::LOST, report.loss()),
        (figure::OUT_OF_ORDER, report.out_of_order()),
        (figure::BEYOND_THRESHOLD, share(report.order.beyond_threshold.into(), report.order.received.into())),
        (figure::EXTENT, report.order.extent.into()),
        ("duplicated", report.order.duplicated.into()),
        (figure::DELAY_LEAST, milliseconds(delays.least)),
        (figure::DELAY_MEDIAN, milliseconds(delays.median)),
        (figure::DELAY_P99, milliseconds(delays.p99)),
        (figure::DELAY_GREATEST, milliseconds(delays.greatest)),
    ]))
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn small(count: u64) -> f64 {
    count as f64
}

fn share(part: u64, all: u64) -> f64 {
    small(part) / small(all.max(1))
}
