//! Flows of transports that do not adapt to reordering.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::comparison::{Comparison, Links, Method};
use lab::interrupt;
use lab::kind::Kind;
use lab::sites::{Overrides, binary};
use lab::traffic::{CongestionControl, QuicLoad};

/// Rate of each link, Mbit/s.
const RATE: f64 = 50.0;
/// Less than 1, since the same flow sent twice over one tunnel differs by so much.
const LEAST: f64 = 0.97;

/// Needs simulated time: on a real CPU the figures mean nothing.
pub fn one_quic_flow_is_no_slower_than_over_one_tunnel(_: Kind) -> Result<()> {
    // Jitter is what sprayed packets overtake each other by.
    let links = Links { rates: vec![RATE; 2], delays: vec![5.0; 2], jitter: 5.0, ..Links::alike(true, RATE) };
    let comparison = Comparison::new(&binary()?, "adaptive", &links, &Overrides::default())?;
    let [begin, from, end] = [0, 2_000, 4_000].map(Duration::from_millis);
    let load = QuicLoad { congestion: CongestionControl::Cubic, begin, end, window: from..end };
    let goodput = |method| {
        interrupt::sleep(Duration::from_secs(3));
        comparison.with(method, || Ok(load.run(comparison.lab.path_v4())?.goodput()))
    };
    let (alone, ours) = (goodput(Method::OneTunnel)?, goodput(Method::Ecmpvpn)?);
    ensure!(ours >= LEAST * alone, "{ours:.1} Mbit/s, and {alone:.1} over one tunnel");
    Ok(())
}
