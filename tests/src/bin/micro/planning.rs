//! Measures how long a plan of ports takes.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use ecmpvpn::config::XmitHashPolicy;
use ecmpvpn::plan::ports::{End, Request, plan};
use ecmpvpn_common::flow::mix;
use serde_json::json;

use crate::output;

const TUNNELS: usize = 16;
/// Longest time that a plan may take, also in a debug build.
const LIMIT: Duration = Duration::from_millis(50);

/// Plans for `count` random endpoint pairs, every other one IPv6, with 2 to 8 members at each end. Returns whether
/// every plan was below [`LIMIT`].
pub fn measure(count: u32) -> Result<bool> {
    eprintln!("==> planning {TUNNELS} tunnels for {count} random endpoint pairs");
    let mut times = Vec::new();
    for number in 0..count {
        let word = |what: u64| mix((u64::from(number) + 1) << 8 | what);
        let end = |side: u64| {
            let bytes = (u128::from(word(side)) << 64 | u128::from(word(side + 1))).to_be_bytes();
            let [a, b, c, d, ..] = bytes;
            let address = if number % 2 == 0 { IpAddr::from([a, b, c, d]) } else { IpAddr::from(bytes) };
            let members = u8::try_from(word(side + 2) % 7).map_or(2, |members| members + 2);
            End::new(address, members, XmitHashPolicy::Layer34)
        };
        let request = Request { a: end(0), b: end(3), tunnels: TUNNELS, base_port: 51820 };
        let since = Instant::now();
        plan(&request)?;
        times.push(since.elapsed());
    }
    times.sort();
    let (middle, worst) = (times[times.len() / 2], times[times.len() - 1]);
    let met = worst < LIMIT;
    println!("\nplanning {TUNNELS} tunnels, {count} random endpoint pairs: median {middle:.1?}, worst {worst:.1?}");
    println!("target: every one below {LIMIT:?}: {}\n", if met { "met" } else { "MISSED" });
    output::print(&json!({
        "series": "planning",
        "tunnels": TUNNELS,
        "pairs": count,
        "median_us": middle.as_micros(),
        "worst_us": worst.as_micros(),
        "target": {"wanted_us": LIMIT.as_micros(), "met": met},
    }));
    Ok(met)
}
