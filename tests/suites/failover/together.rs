//! Finding A11: both ends are started at the same instant.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::kind::Kind;
use lab::sites::{Lab, Options, Underlay, binary};

/// Number of starts. Each has other keys, so that the one end leads or the other.
const STARTS: usize = 6;
/// How soon every tunnel must have had its first handshake.
const CONNECTED: Duration = Duration::from_secs(2);
const TUNNELS: usize = 4;

/// Whether every tunnel of a site has had a handshake, and answers.
fn is_connected(lab: &Lab, site: usize) -> Result<bool> {
    let (exit, output, _) = lab.ecmpvpn(site, &["stats", "--json"])?;
    if exit != 0 {
        return Ok(false);
    }
    let stats: serde_json::Value = serde_json::from_str(&output)?;
    let tunnels = stats["tunnels"].as_array().context("no tunnels")?;
    let connected = |tunnel: &serde_json::Value| {
        tunnel["last_handshake_s"].as_i64() >= Some(0) && tunnel["rtt_us"].as_u64() > Some(0)
    };
    Ok(tunnels.len() == TUNNELS && tunnels.iter().all(connected))
}

/// In simulated time, both processes really begin at the same instant. The links work already: a bond that negotiates
/// would take longer than a handshake.
pub fn ends_that_start_together_connect_at_once(kind: Kind) -> Result<()> {
    for start in 0..STARTS {
        let options = Options { underlay: Underlay::Routed, tunnels: TUNNELS, ..kind.options() };
        let lab = Lab::new(options, &binary()?)?;
        let began = Instant::now();
        let running = [lab.start(0)?, lab.start(1)?];
        let mut after = [None; 2];
        while after.contains(&None) {
            for (site, after) in after.iter_mut().enumerate().filter(|(_, after)| after.is_none()) {
                *after = is_connected(&lab, site)?.then(|| began.elapsed());
            }
            let outputs = || format!("{}\n{}", running[0].output(), running[1].output());
            ensure!(began.elapsed() < CONNECTED, "start {start}: connected after {after:?}:\n{}", outputs());
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("start {start}: connected after {after:?}");
    }
    Ok(())
}
