//! Measures how long short transfers take while all tunnels are busy, above all the slowest ones.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use lab::interrupt;
use lab::sites::Lab;
use lab::traffic::{LOOK, ShortLoad, connect_all};
use serde_json::json;

use crate::arguments::Arguments;
use crate::report::{self, number, verdict};
use lab::comparison::{Comparison, Counters, Links, MEMBERS, Method, PAUSE};
use lab::quantiles::spread;

/// Number of transfers in a run, and bytes of each.
const TRANSFERS: usize = 200;
const BYTES: usize = 100_000;
/// Share of the capacity of all members that the transfers need. The long flows have the rest.
const SHARE: f64 = 0.25;
/// Greatest ratio of the 99th percentile to that of ECMP.
const TARGET: f64 = 0.8;
/// The 99th percentile of 200 transfers is the third slowest one, and varies, so that several runs are needed.
const RUNS: u32 = 10;
/// Bytes that a new long flow sends to find out which tunnel carries it.
const TRIAL: usize = 60_000;
/// How many connections are tried until each tunnel has a long flow. A hash almost never misses one of three tunnels 60
/// times in a row.
const TRIALS: usize = 60;
/// How long the long flows run before the first transfer.
const WARM_UP: Duration = Duration::from_secs(2);

/// The result of one run.
struct Sample {
    median: f64,
    p99: f64,
    /// Each tunnel's share of the bytes, percent.
    shares: Vec<f64>,
}

/// Measures and prints.
pub fn measure(arguments: &Arguments, program: &Path) -> Result<()> {
    let policy = arguments.policy("adaptive");
    let title = format!("{TRANSFERS} transfers of {BYTES} bytes over three busy tunnels, policy {policy}");
    eprintln!("==> {title}: building two sites");
    let rate = arguments.rate();
    let comparison = Comparison::new(program, policy, &Links::alike(arguments.simulated, rate), &arguments.overrides)?;
    let methods = [Method::Ecmp, Method::Ecmpvpn];
    let mut samples = methods.map(|_| Vec::new());
    let runs = arguments.runs(RUNS);
    for run in 1..=runs {
        for (who, samples) in methods.into_iter().zip(&mut samples) {
            interrupt::check()?;
            let sample = comparison.with(who, || transfers(&comparison.lab, rate, arguments.seed_of(run)))?;
            eprintln!(
                "    {run}/{runs}: {}: median {:.0} ms, 99th percentile {:.0} ms; tunnels {:.0?}%",
                who.name(),
                sample.median,
                sample.p99,
                sample.shares
            );
            samples.push(sample);
        }
    }
    show(&title, &samples);
    Ok(())
}

/// One run: a long flow on each tunnel, and the transfers, which begin at the same times for every method.
fn transfers(lab: &Lab, rate: f64, seed: u64) -> Result<Sample> {
    let long = long_flows(lab)?;
    let stop = AtomicBool::new(false);
    let (times, gained) = thread::scope(|scope| {
        for (sender, receiver) in long {
            scope.spawn(|| flow(sender, &stop));
            scope.spawn(|| drain(receiver));
        }
        let work = || {
            interrupt::sleep(WARM_UP);
            let before = Counters::read(lab, lab.path_v4())?;
            #[expect(clippy::cast_precision_loss, reason = "a small number")]
            let gap = BYTES as f64 * 8.0 / (rate * 1e6 * f64::from(MEMBERS) * SHARE);
            let load = ShortLoad { count: TRANSFERS, bytes: BYTES, mean_gap: Duration::from_secs_f64(gap), seed };
            let times = load.run(lab.path_v4())?;
            anyhow::Ok((times, Counters::read(lab, lab.path_v4())?.since(&before)))
        };
        let result = work();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    interrupt::sleep(PAUSE);
    let mut milliseconds: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    milliseconds.sort_by(f64::total_cmp);
    let rank = |percent: usize| milliseconds[(milliseconds.len() * percent).div_ceil(100) - 1];
    Ok(Sample { median: rank(50), p99: rank(99), shares: gained.shares() })
}

/// Makes a connection on each tunnel. With any method, one connection after another sends a little data alone. It is
/// kept if it used a tunnel that has no connection yet.
fn long_flows(lab: &Lab) -> Result<Vec<(TcpStream, TcpStream)>> {
    let mut long: Vec<Option<(TcpStream, TcpStream)>> = lab.tunnels.iter().map(|_| None).collect();
    for _ in 0..TRIALS {
        interrupt::check()?;
        let before = Counters::read(lab, lab.path_v4())?;
        let Some((_, mut sender, mut receiver)) = connect_all(1, lab.path_v4())?.pop() else { continue };
        thread::scope(|scope| {
            let receiving = scope.spawn(|| receiver.read_exact(&mut vec![0; TRIAL]));
            sender.write_all(&vec![0; TRIAL])?;
            receiving.join().expect("the receiver does not panic")
        })?;
        let sent = Counters::read(lab, lab.path_v4())?.since(&before).sent;
        let most = (0..sent.len()).max_by_key(|tunnel| sent[*tunnel]).unwrap_or(0);
        ensure!(sent[most] >= TRIAL as u64 / 2, "a trial of {TRIAL} bytes was sent as {sent:?}");
        long[most].get_or_insert((sender, receiver));
        if long.iter().all(Option::is_some) {
            return Ok(long.into_iter().flatten().collect());
        }
    }
    bail!("{TRIALS} connections left a tunnel without one")
}

/// Sends as much as possible until `stop` is set.
fn flow(mut sender: TcpStream, stop: &AtomicBool) {
    let block = [0; 16 << 10];
    while !stop.load(Ordering::Relaxed) && sender.write_all(&block).is_ok() {}
}

/// Reads until the sender has closed the connection.
fn drain(mut receiver: TcpStream) {
    let mut block = vec![0; 64 << 10];
    while matches!(receiver.read(&mut block), Ok(1..)) {
        thread::sleep(LOOK);
    }
}

fn show(title: &str, samples: &[Vec<Sample>; 2]) {
    let [ecmp, ours] = samples;
    let ratios: Vec<f64> = ours.iter().zip(ecmp).map(|(ours, ecmp)| ours.p99 / ecmp.p99).collect();
    let [least, ratio, greatest] = spread(ratios.clone());
    let met = ratio <= TARGET;
    let mut table = report::table(&["", "median", "99th percentile", "least", "greatest", "to ECMP's", "target"]);
    let milliseconds = |value: f64| number(format!("{value:.0} ms"));
    for (name, samples) in [("kernel ECMP", ecmp), ("ecmpvpn", ours)] {
        let [_, median, _] = spread(samples.iter().map(|sample| sample.median));
        let [low, p99, high] = spread(samples.iter().map(|sample| sample.p99));
        let mut row = vec![comfy_table::Cell::new(name), milliseconds(median)];
        row.extend([p99, low, high].map(milliseconds));
        if name == "ecmpvpn" {
            row.push(number(format!("{ratio:.2} ({least:.2} to {greatest:.2})")));
            row.push(comfy_table::Cell::new(verdict(&format!("<= {TARGET}"), met)));
        }
        table.add_row(row);
    }
    println!("\n{title}; {} runs\n{table}\n", ours.len());
    let rows = [("kernel ECMP", ecmp), ("ecmpvpn", ours)].map(|(name, samples)| {
        json!({
            "contestant": name,
            "median_ms": samples.iter().map(|sample| sample.median).collect::<Vec<_>>(),
            "p99_ms": samples.iter().map(|sample| sample.p99).collect::<Vec<_>>(),
            "tunnel_percent": samples.iter().map(|sample| sample.shares.clone()).collect::<Vec<_>>(),
        })
    });
    report::json(&json!({
        "series": title,
        "rows": rows,
        "p99_ratio": ratios,
        "p99_ratio_median": ratio,
        "target": {"wanted": format!("median <= {TARGET}"), "met": met},
    }));
}
