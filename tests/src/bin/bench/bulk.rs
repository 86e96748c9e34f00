//! Measures the goodput of long TCP flows.

use std::net::IpAddr;
use std::path::Path as FsPath;

use anyhow::{Context as _, Result};
use lab::interrupt;
use lab::traffic::{Path, TimedFlow, Timetable};
use serde_json::{Value, json};

use crate::arguments::{Arguments, Ends};
use crate::draw;
use crate::series::{RowSpec, Series};
use lab::comparison::{Comparison, Counters};

/// The result of one transfer.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Goodput at the receiver, Mbit/s.
    pub goodput: f64,
    /// Increase of the counters during the transfer.
    pub gained: Counters,
}

/// All transfers that one seed drew, in the order of the rows of the series.
#[derive(Clone, Debug, PartialEq)]
pub struct Repetition {
    pub number: u32,
    pub seed: u64,
    pub samples: Vec<Sample>,
}

impl Series {
    /// Measures these repetitions. The lab of each stage is built once.
    pub fn measure(&self, arguments: &Arguments, program: &FsPath, numbers: &[u32]) -> Result<Vec<Repetition>> {
        let repetition = |number: &u32| Repetition {
            number: *number,
            seed: arguments.seed_of(*number),
            samples: Vec::with_capacity(self.rows().count()),
        };
        let mut repetitions: Vec<Repetition> = numbers.iter().map(repetition).collect();
        for stage in &self.stages {
            eprintln!("==> {}: building two sites", self.title);
            let policy = stage.rows.iter().map(|row| row.policy).find(|policy| !policy.is_empty());
            let comparison =
                Comparison::new(program, policy.unwrap_or("adaptive"), &stage.links, &arguments.overrides)?;
            for repetition in &mut repetitions {
                for row in &stage.rows {
                    interrupt::check()?;
                    let sample = self.sample(&comparison, row, arguments.ends(), repetition.seed)?;
                    eprintln!("    {}/{}: {}: {}", repetition.number, self.runs, row.name(), sample.words());
                    repetition.samples.push(sample);
                }
            }
        }
        Ok(repetitions)
    }

    /// Makes one transfer, as the seed draws it.
    fn sample(&self, comparison: &Comparison, row: &RowSpec, ends: Ends, seed: u64) -> Result<Sample> {
        let lab = &comparison.lab;
        let base = match ends {
            Ends::Gateways => lab.path_of_gateways_v4(),
            Ends::Hosts => lab.path_v4(),
        };
        if !row.policy.is_empty() {
            comparison.set_policy(row.policy)?;
        }
        let [sources, destinations] = [0, 1].map(|site| draw::hosts(seed, lab.sites[site].number));
        for (ns, addresses) in [(base.from, &sources), (base.to, &destinations)] {
            let command = |address| format!("address replace {address}/16 dev lan0");
            ns.apply("ip", &addresses.iter().map(command).collect::<Vec<_>>())?;
        }
        let drawn = self.draw(seed, row.flows);
        let flows = drawn.iter().map(|flow| TimedFlow {
            path: Path {
                source: IpAddr::V4(sources[flow.from]),
                destination: IpAddr::V4(destinations[flow.to]),
                ..base
            },
            begin: flow.begin,
            end: flow.end,
        });
        let timetable = Timetable { flows: flows.collect(), window: self.window(&drawn), look: self.look };
        let mut gained = None;
        let mut goodput = 0.0;
        comparison.with(row.method, || {
            let before = Counters::read(lab, base)?;
            goodput = timetable.run()?.goodput();
            interrupt::sleep(self.pause);
            gained = Some(Counters::read(lab, base)?.since(&before));
            Ok(())
        })?;
        Ok(Sample { goodput, gained: gained.context("it was not measured")? })
    }
}

impl RowSpec {
    /// A description for people.
    pub fn name(&self) -> String {
        format!("{}, {} flow{}", self.method_name(), self.flows, if self.flows == 1 { "" } else { "s" })
    }

    /// The name of the method, with its policy if it has one.
    pub fn method_name(&self) -> String {
        let name = self.method.name();
        if self.policy.is_empty() { name.to_owned() } else { format!("{name}, `{}`", self.policy) }
    }
}

impl Sample {
    /// A description for people.
    pub fn words(&self) -> String {
        let shares: Vec<String> = self.gained.shares().iter().map(|share| format!("{share:.0}")).collect();
        let [at_gaps, while_busy] = self.gained.moves;
        format!(
            "{:.2} Mbit/s; tunnels {}%; {} retransmitted and {} out of order of {}; moves {at_gaps} + {while_busy}",
            self.goodput,
            shares.join("/"),
            self.gained.retransmitted,
            self.gained.out_of_order,
            self.gained.segments,
        )
    }

    fn json(&self) -> Value {
        let Counters { sent, retransmitted, segments, out_of_order, moves, restored, dropped } = &self.gained;
        json!({
            "goodput_mbps": self.goodput,
            "tunnel_bytes": sent,
            "retransmitted": retransmitted,
            "segments": segments,
            "out_of_order": out_of_order,
            "moves": moves,
            "restored": restored,
            "dropped": dropped,
        })
    }

    fn of_json(json: &Value) -> Option<Self> {
        let count = |value: &Value| value.as_u64();
        let counts = |field: &str| json[field].as_array()?.iter().map(count).collect::<Option<Vec<u64>>>();
        let gained = Counters {
            sent: counts("tunnel_bytes")?,
            retransmitted: count(&json["retransmitted"])?,
            segments: count(&json["segments"])?,
            out_of_order: count(&json["out_of_order"])?,
            moves: counts("moves")?.try_into().ok()?,
            restored: counts("restored")?.try_into().ok()?,
            dropped: counts("dropped")?.try_into().ok()?,
        };
        Some(Self { goodput: json["goodput_mbps"].as_f64()?, gained })
    }
}

impl Repetition {
    /// The JSON that [`crate::report::merge`] reads. `title` is that of the series.
    pub fn json(&self, title: &str) -> Value {
        let samples: Vec<Value> = self.samples.iter().map(Sample::json).collect();
        json!({ "series": title, "repetition": self.number, "seed": self.seed, "samples": samples })
    }

    /// Reads the title of the series and the repetition from JSON.
    pub fn of_json(json: &Value) -> Option<(String, Self)> {
        let samples = json["samples"].as_array()?.iter().map(Sample::of_json).collect::<Option<_>>()?;
        let number = u32::try_from(json["repetition"].as_u64()?).ok()?;
        Some((json["series"].as_str()?.to_owned(), Self { number, seed: json["seed"].as_u64()?, samples }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_survive_the_way_through_json() {
        let gained = Counters {
            sent: vec![1, 2, u64::MAX],
            retransmitted: 3,
            moves: [6, 7],
            dropped: [8, 9],
            ..Counters::default()
        };
        let sample = Sample { goodput: 274.123_456_789_012_3, gained };
        let repetition = Repetition { number: 2, seed: 9, samples: vec![sample.clone(), sample] };
        let text = repetition.json("main").to_string();
        let back = Repetition::of_json(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(back, ("main".to_owned(), repetition));
        assert_eq!(Repetition::of_json(&json!({"series": "main"})), None);
    }
}
