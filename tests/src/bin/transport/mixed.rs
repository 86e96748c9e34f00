//! Several bulk flows at once, TCP and QUIC in turn.

use std::ops::Range;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use lab::traffic::{CongestionControl, Path, QuicLoad};

use crate::load::{Times, bulk};
use crate::sample::{Figures, figure, figures};

/// The flows begin one after another within this time, so that their first packets do not come in one burst.
const BEGIN_WITHIN: Duration = Duration::from_millis(200);

/// Sends `count` flows over `path`. Measures their sum, and the least of them as a share of the mean.
pub fn run(path: Path<'_>, times: Times, count: u32) -> Result<Figures> {
    let goodputs = thread::scope(|scope| {
        let flows: Vec<_> = (0..count)
            .map(|number| {
                let window = times.window();
                let times = Times { begin: times.begin + BEGIN_WITHIN * number / count, ..times };
                scope.spawn(move || one(path, times, window, number % 2 == 0))
            })
            .collect();
        flows.into_iter().map(|flow| flow.join().expect("a flow does not panic")).collect::<Result<Vec<f64>>>()
    })?;
    let sum: f64 = goodputs.iter().sum();
    let least = goodputs.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(figures(&[(figure::GOODPUT, sum), (figure::LEAST_SHARE, least * f64::from(count) / sum)]))
}

/// The goodput of one flow in `window`, 10^6 bits a second.
fn one(path: Path<'_>, times: Times, window: Range<Duration>, by_tcp: bool) -> Result<f64> {
    let Times { begin, end } = times;
    if by_tcp {
        let mut flow = bulk(path, times);
        flow.window = window;
        return Ok(flow.run()?.goodput());
    }
    Ok(QuicLoad { congestion: CongestionControl::Cubic, begin, end, window }.run(path)?.goodput())
}
