//! The report at the end of a run: a table of faults and their cost, sums, and the same as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Row, Table, presets};
use serde_json::{Value, json};

use crate::bounds::{self, Cost};
use crate::event::Event;
use crate::ledger::Counts;

/// The cost of one kind of fault.
#[derive(Clone, Copy, Debug, Default)]
struct Kind {
    count: u32,
    interruptions: u32,
    worst: Option<Duration>,
    bound: Option<Duration>,
}

/// The cost of all faults, by kind, ordered by name.
#[derive(Clone, Debug, Default)]
pub struct Tally(BTreeMap<&'static str, Kind>);

impl Tally {
    /// Counts an event that has begun.
    pub fn on_begin(&mut self, event: &Event) {
        let kind = self.0.entry(event.fault.kind()).or_default();
        kind.count += 1;
        let bound = match bounds::cost(event) {
            Cost::Nothing => Duration::ZERO,
            Cost::Interruptions { longest, .. } => longest,
            Cost::Standstill { after } => after,
        };
        kind.bound = kind.bound.max(Some(bound));
    }

    /// Counts an interruption of a flow by `event`. The flow continued after the time `after`.
    pub fn recovered(&mut self, event: &Event, after: Duration) {
        let kind = self.0.entry(event.fault.kind()).or_default();
        kind.interruptions += 1;
        kind.worst = kind.worst.max(Some(after));
    }

    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["fault", "count", "flows interrupted", "worst recovery", "bound"]);
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        for (name, kind) in &self.0 {
            let time = |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{} ms", time.as_millis()));
            let bound = if kind.bound == Some(Duration::ZERO) { "none lost".to_owned() } else { time(kind.bound) };
            let mut row = Row::from(vec![Cell::new(name)]);
            row.add_cell(right(kind.count.to_string()));
            row.add_cell(right(kind.interruptions.to_string()));
            row.add_cell(right(time(kind.worst)));
            row.add_cell(right(bound));
            table.add_row(row);
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }

    pub fn json(&self) -> Value {
        let ms = |time: Option<Duration>| time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let kind = |(name, kind): (&&str, &Kind)| {
            let value = json!({
                "count": kind.count, "interruptions": kind.interruptions, "worst_ms": ms(kind.worst),
                "bound_ms": ms(kind.bound),
            });
            ((*name).to_owned(), value)
        };
        self.0.iter().map(kind).collect::<serde_json::Map<_, _>>().into()
    }
}

/// The sums of the traffic in both directions, as one line.
pub fn traffic(counts: &[Counts; 2], moves: u64, by_bond: u64) -> String {
    let sum = |field: fn(&Counts) -> u64| counts.iter().map(field).sum::<u64>();
    format!(
        "datagrams: {} sent, {} in time, {} later than 1 s, {} lost; {} overtaken, of them {} within a tunnel while links \
         differed; moved to another tunnel {} times, {moves} counted",
        sum(|c| c.sent),
        sum(|c| c.on_arrival),
        sum(|c| c.late),
        sum(Counts::lost),
        sum(|c| c.overtaken),
        by_bond,
        sum(|c| c.moves),
    )
}
