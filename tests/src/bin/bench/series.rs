//! Describes a table to measure: its labs and rows, and the flows that a seed draws. Pure.

use std::ops::Range;
use std::time::Duration;

use crate::draw::{self, Drawn};
use crate::target::Target;
use lab::comparison::{Links, Method};

/// When flows begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coming {
    /// All flows begin nearly together and stay.
    Together,
    /// Flows arrive and leave.
    Passing,
}

/// Describes one row of a table to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSpec {
    pub method: Method,
    /// Policy of ecmpvpn. Empty for other methods.
    pub policy: &'static str,
    pub flows: usize,
    pub target: Option<Target>,
}

/// Rows that are measured in one lab.
#[derive(Clone, Debug)]
pub struct Stage {
    pub links: Links,
    pub rows: Vec<RowSpec>,
}

/// Describes one table to measure.
#[derive(Clone, Debug)]
pub struct Series {
    pub title: String,
    pub stages: Vec<Stage>,
    pub runs: u32,
    pub seconds: f64,
    /// The share of the time after which long flows have reached their speed.
    pub settles: f64,
    pub coming: Coming,
    /// Time between two looks of the receiver.
    pub look: Duration,
    /// Pause between two transfers.
    pub pause: Duration,
}

impl Series {
    /// All rows, in the order in which they are measured.
    pub fn rows(&self) -> impl Iterator<Item = RowSpec> {
        self.stages.iter().flat_map(|stage| stage.rows.iter().copied())
    }

    /// The flows of a row, as a seed draws them. They are the same for all methods with this number of flows.
    pub fn draw(&self, seed: u64, flows: usize) -> Vec<Drawn> {
        match self.coming {
            Coming::Together => draw::together(seed, flows, self.seconds),
            Coming::Passing => draw::coming_and_going(seed, flows, self.seconds),
        }
    }

    /// The time in which flows are measured. Passing flows are few at both ends of the time, which are left out.
    pub fn window(&self, flows: &[Drawn]) -> Range<Duration> {
        let begin = flows.iter().map(|flow| flow.begin).min().unwrap_or_default();
        let end = flows.iter().map(|flow| flow.end).max().unwrap_or_default();
        let time = end.saturating_sub(begin);
        match self.coming {
            Coming::Together => begin + time.mul_f64(self.settles)..end,
            Coming::Passing => begin + time / 6..end.saturating_sub(time / 6),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::arguments::{Arguments, Case};
    use crate::cases;

    #[test]
    fn how_long_flows_begin_is_not_measured() {
        let table = |case, options: &[&str]| {
            let arguments = Arguments::parse_from([&["bench"], options].concat());
            cases::of_case(case, &arguments).remove(0)
        };
        let simulated = table(Case::Main, &["--simulated"]);
        let emulated = table(Case::Main, &[]);
        let flow =
            |begin, end| Drawn { begin: Duration::from_secs(begin), end: Duration::from_secs(end), from: 0, to: 0 };
        let window = |series: &Series, flows: &[Drawn]| {
            let window = series.window(flows);
            [window.start, window.end].map(|time| time.as_millis())
        };
        assert_eq!(window(&simulated, &[flow(1, 4), flow(2, 4)]), [2_500, 4_000]);
        assert_eq!(window(&emulated, &[flow(1, 9), flow(2, 9)]), [3_000, 9_000]);
        let passing = table(Case::Passing, &["--simulated"]);
        assert_eq!(window(&passing, &[flow(1, 3), flow(4, 7)]), [2_000, 6_000]);
    }
}
