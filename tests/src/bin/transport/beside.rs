//! Short transfers and an interactive stream beside one bulk TCP flow: what a flow over all tunnels costs the others.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use lab::comparison::Comparison;
use lab::quantiles::quantiles;
use lab::traffic::{RtpLoad, ShortLoad};

use crate::load::{Times, bulk};
use crate::sample::{Figures, figure, figures, milliseconds};

/// Number of short transfers, and bytes of each.
const TRANSFERS: usize = 200;
const BYTES: usize = 100_000;
/// Payload of the interactive stream's datagrams, bytes, and its rate: 50 a second, as of a voice call.
const PAYLOAD: usize = 160;
const RATE: f64 = 0.064;

/// Sends the bulk flow for as long as `times` say, and the others while it is measured.
pub fn run(comparison: &Comparison, times: Times, seed: u64) -> Result<Figures> {
    let path = comparison.lab.path_v4();
    let window = times.window();
    let (goodput, transfers, stream) = thread::scope(|scope| -> Result<_> {
        let long = scope.spawn(|| bulk(path, times).run());
        let stream = scope.spawn(|| {
            let (begin, end) = (window.start, window.end);
            RtpLoad { payload: PAYLOAD, rate: RATE, begin, end, window: begin..end }.run(path)
        });
        thread::sleep(window.start);
        let mean_gap = window.end.saturating_sub(window.start) / u32::try_from(TRANSFERS)?;
        let transfers = ShortLoad { count: TRANSFERS, bytes: BYTES, mean_gap, seed }.run(path);
        let long = long.join().expect("the bulk flow does not panic")?;
        let stream = stream.join().expect("the stream does not panic")?;
        Ok((long.goodput(), transfers?, stream))
    })?;
    let [median, p99] = quantiles(transfers.into_iter().map(milliseconds), [0.5, 0.99]);
    Ok(figures(&[
        (figure::GOODPUT, goodput),
        (figure::SHORT_MEDIAN, median),
        (figure::SHORT_P99, p99),
        (figure::LOST, stream.loss()),
        (figure::OUT_OF_ORDER, stream.out_of_order()),
        (figure::DELAY_LEAST, milliseconds(stream.delays.least)),
        (figure::DELAY_MEDIAN, milliseconds(stream.delays.median)),
        (figure::DELAY_P99, milliseconds(stream.delays.p99)),
        (figure::DELAY_GREATEST, milliseconds(stream.delays.greatest)),
    ]))
}

/// How long the bulk flow must last at least for the short transfers to need no more than a third of `sum`, 10^6 bits a
/// second.
pub fn least_time(sum: f64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let bits = (TRANSFERS * BYTES * 8) as f64;
    // The transfers have the second half.
    2 * Duration::from_secs_f64(bits / (sum * 1e6 / 3.0))
}
