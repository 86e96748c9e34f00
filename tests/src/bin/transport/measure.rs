//! Runs a job: builds the sites, and sends each flow over one tunnel and with each policy.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ecmpvpn_common::flow::mix;
use lab::comparison::{Comparison, Counters, Method};
use lab::interrupt;
use lab::traffic::CongestionControl;

use crate::arguments::Arguments;
use crate::beside;
use crate::job::Job;
use crate::load::{self, Times};
use crate::mixed;
use crate::sample::{ECMP, Figures, Measured, ONE_TUNNEL, Sample};
use crate::transport::Transport;

/// Pause between two flows. After it, the daemon has forgotten what the last flow carried.
const IDLE: Duration = Duration::from_secs(3);
/// The policy that ecmpvpn starts with.
const FIRST: &str = "adaptive";

/// Measures one profile with one seed.
pub fn measure(arguments: &Arguments, program: &Path, job: Job) -> Result<Measured> {
    eprintln!("==> {}: building two sites", job.profile.title());
    let links = job.profile.links();
    let build = if arguments.cold { Comparison::cold } else { Comparison::new };
    let comparison = build(program, FIRST, &links, &arguments.overrides)?;
    let mut samples = Vec::new();
    for transport in &arguments.transport {
        let mut methods = vec![(ONE_TUNNEL, Method::OneTunnel)];
        if *transport == Transport::Short {
            methods.push((ECMP, Method::Ecmp));
        }
        methods.extend(arguments.policy.iter().map(|policy| (*policy, Method::Ecmpvpn)));
        for (name, method) in methods {
            interrupt::check()?;
            let sample = sample(arguments, &comparison, job, *transport, (name, method))
                .with_context(|| format!("{}, {name}", transport.title()))?;
            eprintln!("    {job}: {}", sample.words());
            samples.push(sample);
        }
    }
    Ok(Measured { job, samples })
}

fn sample(
    arguments: &Arguments,
    comparison: &Comparison,
    job: Job,
    transport: Transport,
    (name, method): (&'static str, Method),
) -> Result<Sample> {
    let lab = &comparison.lab;
    interrupt::sleep(IDLE);
    if method == Method::Ecmpvpn {
        comparison.set_policy(name)?;
    }
    let rates: f64 = job.profile.links().rates.iter().sum();
    let least = if transport == Transport::Short { beside::least_time(rates) } else { Duration::ZERO };
    // The periodic work of the daemons has another phase with each seed.
    let begin = Duration::from_nanos(mix(job.seed) % 1_000_000_000);
    let times = Times { begin, end: begin + least.max(Duration::from_secs_f64(arguments.seconds)) };
    let before = Counters::read(lab, lab.path_v4())?;
    let mut figures = comparison.with(method, || carry(comparison, job, transport, times))?;
    let gained = Counters::read(lab, lab.path_v4())?.since(&before);
    figures.extend((0..).zip(gained.shares()).map(|(tunnel, share)| (format!("tunnel{tunnel}_percent"), share)));
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let mut extend = |name: &str, count: u64| figures.insert(name.to_owned(), count as f64);
    for (name, count) in ["restored", "late", "given_up"].iter().zip(gained.restored) {
        extend(name, count);
    }
    for (name, count) in ["dropped_near", "dropped_far"].iter().zip(gained.dropped) {
        extend(name, count);
    }
    Ok(Sample { transport, method: name.to_owned(), figures })
}

/// Sends one flow between the sites' hosts.
fn carry(comparison: &Comparison, job: Job, transport: Transport, times: Times) -> Result<Figures> {
    let path = comparison.lab.path_v4();
    match transport {
        Transport::Tcp => load::tcp(comparison, path, times),
        Transport::Quic => load::quic(path, times, CongestionControl::Cubic),
        Transport::QuicBbr => load::quic(path, times, CongestionControl::Bbr),
        Transport::QuicNewReno => load::quic(path, times, CongestionControl::NewReno),
        Transport::Rtp => load::rtp(path, times, job.profile.stream_rate()),
        Transport::Wireguard => load::wireguard(comparison, path, times),
        Transport::Mixed3 => mixed::run(path, times, 3),
        Transport::Mixed12 => mixed::run(path, times, 12),
        Transport::Mixed48 => mixed::run(path, times, 48),
        Transport::Short => beside::run(comparison, times, job.seed),
    }
}
