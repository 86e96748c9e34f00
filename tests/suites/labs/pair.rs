//! Two hosts and one link.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::netns::Netns;
use lab::topology::{Quality, Wires, shaper};
use lab::traffic::{Path, PingReport, ping};

pub const A: Ipv4Addr = Ipv4Addr::new(10, 2, 3, 4);
pub const B: Ipv4Addr = Ipv4Addr::new(10, 2, 3, 5);

/// Two namespaces, joined by one wire.
pub struct Pair {
    pub ends: [Netns; 2],
    pub wires: Wires,
}

impl Pair {
    pub fn new(quality: Quality, rate: Option<f64>) -> Result<Self> {
        let mut pair = Self { ends: [Netns::new("a")?, Netns::new("b")?], wires: Wires::new("wires")? };
        pair.wires.join([("u0", &pair.ends[0]), ("u0", &pair.ends[1])], [quality; 2])?;
        for (end, address) in pair.ends.iter().zip([A, B]) {
            end.apply("ip", &[format!("address add {address}/24 dev u0"), "link set u0 up".to_owned()])?;
            if let Some(rate) = rate {
                end.tc(&format!("qdisc replace dev u0 root {}", shaper(rate, None)))?;
            }
        }
        // Resolves the neighbours before anything is measured.
        ensure!(pair.ping(3)?.answered() == 3, "the pair is not joined");
        Ok(pair)
    }

    pub fn path(&self) -> Path<'_> {
        Path { from: &self.ends[0], source: A.into(), to: &self.ends[1], destination: B.into() }
    }

    pub fn ping(&self, count: u16) -> Result<PingReport> {
        ping(&self.ends[0], A.into(), B.into(), count, 56, Duration::from_secs(1))
    }
}
