//! Counts the datagrams that arrive out of order when the tunnels have different delays.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::interrupt;
use lab::traffic::{TcpLoad, UdpLoad};
use serde_json::json;

use crate::arguments::Arguments;
use crate::report::{self, number, verdict};
use lab::comparison::{Comparison, Counters, Links, Method, PAUSE};

/// Additional delay of the second tunnel, milliseconds.
const DELAY_MS: f64 = 5.0;
/// Number of numbered flows, and datagrams a second of each. The time between two datagrams is shorter than the
/// difference of the tunnels' delays, so that a flow that changes its tunnel carelessly arrives out of order.
const FLOWS: usize = 6;
const PER_SECOND: u32 = 400;
/// Small, so that the links have room for long TCP flows. These make the load on which the decisions depend.
const PAYLOAD: usize = 200;
const TCP_FLOWS: usize = 3;
/// Share of the datagrams that may be out of order.
const TARGET: f64 = 1e-4;
const RUNS: u32 = 5;
const SECONDS: f64 = 10.0;
/// When a busy bucket moves, a datagram may be ahead of its predecessors by the difference of the delays and by this
/// time, which a full queue of a member takes.
const QUEUE: Duration = Duration::from_millis(60);

/// The result of one run, or of all runs together.
#[derive(Clone, Copy, Default)]
struct Sample {
    sent: u64,
    received: u64,
    reordered: u64,
    moves: [u64; 2],
}

impl Sample {
    fn add(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.reordered += other.reordered;
        self.moves = [self.moves[0] + other.moves[0], self.moves[1] + other.moves[1]];
    }

    /// Datagrams out of order that no counted move of a busy bucket explains.
    fn unaccounted(self) -> u64 {
        let window = QUEUE + Duration::from_secs_f64(DELAY_MS / 1e3);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
        let a_move = (window.as_secs_f64() * f64::from(PER_SECOND)).ceil() as u64;
        self.reordered.saturating_sub(self.moves[1] * a_move)
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn share(part: u64, all: u64) -> f64 {
    part as f64 / all.max(1) as f64
}

/// Measures and prints.
pub fn measure(arguments: &Arguments, program: &Path) -> Result<()> {
    let policy = arguments.policy("adaptive");
    let title = format!(
        "out of order: {FLOWS} flows of {PER_SECOND} datagrams a second and {TCP_FLOWS} long TCP flows, second tunnel \
         slower by {DELAY_MS} ms, policy {policy}"
    );
    eprintln!("==> {title}: building two sites");
    let links = Links { delays: vec![0.0, DELAY_MS, 0.0], ..Links::alike(arguments.simulated, arguments.rate()) };
    let comparison = Comparison::new(program, policy, &links, &arguments.overrides)?;
    let seconds = arguments.seconds.unwrap_or(SECONDS);
    // The first two show what the lab itself does to the order, the last one what the policy adds.
    let methods = [Method::OneTunnel, Method::Ecmp, Method::Ecmpvpn];
    let mut sums = [Sample::default(); 3];
    let runs = arguments.runs(RUNS);
    for run in 1..=runs {
        for (who, sum) in methods.into_iter().zip(&mut sums) {
            interrupt::check()?;
            let sample = comparison.with(who, || datagrams(&comparison, seconds))?;
            eprintln!(
                "    {run}/{runs}: {}: {} of {} out of order, {} lost, moves {} + {}",
                who.name(),
                sample.reordered,
                sample.received,
                sample.sent - sample.received,
                sample.moves[0],
                sample.moves[1]
            );
            sum.add(sample);
        }
    }
    let mut table = report::table(&[
        "",
        "datagrams",
        "out of order",
        "share",
        "moves at gaps",
        "while busy",
        "unaccounted",
        "target",
    ]);
    let mut rows = Vec::new();
    for (who, sum) in methods.into_iter().zip(sums) {
        let (all, left) = (share(sum.reordered, sum.received), share(sum.unaccounted(), sum.received));
        let ours = who == Method::Ecmpvpn;
        let numbers = [
            sum.received.to_string(),
            sum.reordered.to_string(),
            format!("{:.4}%", all * 100.0),
            sum.moves[0].to_string(),
            sum.moves[1].to_string(),
            format!("{:.4}%", left * 100.0),
        ];
        let mut cells = vec![comfy_table::Cell::new(who.name())];
        cells.extend(numbers.map(number));
        cells.push(comfy_table::Cell::new(if ours { verdict("< 0.01%", left < TARGET) } else { String::new() }));
        table.add_row(cells);
        rows.push(json!({
            "contestant": who.name(),
            "sent": sum.sent,
            "received": sum.received,
            "reordered": sum.reordered,
            "moves": sum.moves,
            "unaccounted_share": left,
            "target": ours.then(|| json!({"wanted": "< 0.0001 unaccounted", "met": left < TARGET})),
        }));
    }
    println!("\n{title}; {runs} runs together\n{table}\n");
    report::json(&json!({"series": title, "rows": rows}));
    Ok(())
}

/// Makes one run.
fn datagrams(comparison: &Comparison, seconds: f64) -> Result<Sample> {
    let path = comparison.lab.path_v4();
    let before = Counters::read(&comparison.lab, path)?;
    let report = thread::scope(|scope| {
        let bulk = scope.spawn(move || TcpLoad::timed(TCP_FLOWS, seconds).run(path));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
        let packets = (seconds * f64::from(PER_SECOND)) as u32;
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let rate = (FLOWS * PAYLOAD * 8) as f64 * f64::from(PER_SECOND) / 1e6;
        let report = UdpLoad { flows: FLOWS, packets, payload: PAYLOAD, rate }.run(path);
        bulk.join().expect("the TCP flows do not panic").context("the TCP flows")?;
        report
    })?;
    interrupt::sleep(PAUSE);
    let gained = Counters::read(&comparison.lab, path)?.since(&before);
    Ok(Sample {
        sent: report.sent().into(),
        received: report.received().into(),
        reordered: report.reordered().into(),
        moves: gained.moves,
    })
}
