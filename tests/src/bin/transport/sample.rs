//! The figures of one flow, and their JSON. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::job::Job;
use crate::transport::Transport;

/// Begin of a line with JSON, which `cargo xtask bench` collects.
pub const JSON: &str = "@json ";

/// Figures by their names. All are numbers, so that they survive the way through JSON without a type for each transport.
pub type Figures = BTreeMap<String, f64>;

/// Names of figures that the tables show.
pub mod figure {
    /// 10^6 bits a second, of payload that the receiver got.
    pub const GOODPUT: &str = "goodput_mbps";
    /// Share of what arrived that arrived after a later one, 0 to 1.
    pub const OUT_OF_ORDER: &str = "out_of_order";
    /// Share of what arrived that arrived after one that was sent 3 or more later, 0 to 1.
    pub const BEYOND_THRESHOLD: &str = "beyond_threshold";
    /// Greatest reordering extent, datagrams.
    pub const EXTENT: &str = "extent";
    /// Share of what was sent that the sender took for lost or that did not arrive, 0 to 1.
    pub const LOST: &str = "lost";
    /// One-way delay, milliseconds.
    pub const DELAY_LEAST: &str = "delay_ms_least";
    pub const DELAY_MEDIAN: &str = "delay_ms_median";
    pub const DELAY_P99: &str = "delay_ms_p99";
    pub const DELAY_GREATEST: &str = "delay_ms_greatest";
    /// The goodput of the slowest of several flows, as a share of their mean.
    pub const LEAST_SHARE: &str = "least_share";
    /// Duration of short transfers, milliseconds.
    pub const SHORT_MEDIAN: &str = "short_ms_median";
    pub const SHORT_P99: &str = "short_ms_p99";
}

/// One flow that was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub transport: Transport,
    /// How the flow was carried: [`ONE_TUNNEL`], or a policy.
    pub method: String,
    pub figures: Figures,
}

/// The method with which the others are compared.
pub const ONE_TUNNEL: &str = "one tunnel";
/// Kernel ECMP, with which short transfers are compared.
pub const ECMP: &str = "kernel ECMP";

pub fn figures(list: &[(&str, f64)]) -> Figures {
    list.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Sample {
    pub fn get(&self, name: &str) -> Option<f64> {
        self.figures.get(name).copied()
    }

    /// A description for people.
    pub fn words(&self) -> String {
        let words: Vec<String> = self.figures.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        format!("{}, {}: {}", self.transport.word(), self.method, words.join(", "))
    }

    fn json(&self) -> Value {
        json!({ "transport": self.transport.word(), "method": self.method, "figures": self.figures })
    }

    fn of_json(json: &Value) -> Option<Self> {
        let figure = |(name, value): (&String, &Value)| Some((name.clone(), value.as_f64()?));
        Some(Self {
            transport: Transport::named(json["transport"].as_str()?)?,
            method: json["method"].as_str()?.to_owned(),
            figures: json["figures"].as_object()?.iter().map(figure).collect::<Option<_>>()?,
        })
    }
}

/// All flows of a job, in the order in which they were measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    pub job: Job,
    pub samples: Vec<Sample>,
}

impl Measured {
    pub fn json(&self) -> Value {
        json!({ "job": self.job.to_string(), "samples": self.samples.iter().map(Sample::json).collect::<Vec<_>>() })
    }

    pub fn of_json(json: &Value) -> Option<Self> {
        let samples = json["samples"].as_array()?.iter().map(Sample::of_json).collect::<Option<_>>()?;
        Some(Self { job: json["job"].as_str()?.parse().ok()?, samples })
    }

    /// The sample of a transport and a method.
    pub fn find(&self, transport: Transport, method: &str) -> Option<&Sample> {
        self.samples.iter().find(|sample| sample.transport == transport && sample.method == method)
    }

    /// The goodput of a transport with a method, as a ratio to that over one tunnel.
    pub fn ratio(&self, transport: Transport, method: &str) -> Option<f64> {
        let goodput = |method: &str| self.find(transport, method)?.get(figure::GOODPUT);
        Some(goodput(method)? / goodput(ONE_TUNNEL)?)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A job with one transport, by method and goodput.
    pub fn measured(job: &str, transport: Transport, goodputs: &[(&str, f64)]) -> Measured {
        let sample = |(method, goodput): &(&str, f64)| Sample {
            transport,
            method: (*method).to_owned(),
            figures: [(figure::GOODPUT.to_owned(), *goodput), (figure::OUT_OF_ORDER.to_owned(), 0.1 / 3.0)].into(),
        };
        Measured { job: job.parse().unwrap(), samples: goodputs.iter().map(sample).collect() }
    }

    #[test]
    fn results_survive_the_way_through_json() {
        let measured = measured("slower/9", Transport::Quic, &[(ONE_TUNNEL, 88.4), ("spray", 15.2)]);
        let back = Measured::of_json(&serde_json::from_str(&measured.json().to_string()).unwrap());
        assert_eq!(back, Some(measured));
        assert_eq!(Measured::of_json(&json!({ "job": "slower/9" })), None);
    }

    #[test]
    fn ratios_are_to_one_tunnel() {
        let measured = measured("equal/1", Transport::Tcp, &[(ONE_TUNNEL, 90.0), ("spray", 270.0)]);
        assert!((measured.ratio(Transport::Tcp, "spray").unwrap() - 3.0).abs() < 1e-9);
        assert_eq!(measured.ratio(Transport::Quic, "spray"), None);
        assert_eq!(measured.ratio(Transport::Tcp, "hash"), None);
    }
}
