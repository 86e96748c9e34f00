//! What was measured: a table for people, a line of JSON for programs.

use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::contest::{Contestant, Counters};

/// What the JSON line begins with; `cargo xtask bench` collects it.
const JSON: &str = "@json ";

/// What a row's ratios to one tunnel must reach.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The middle one.
    pub median: f64,
    /// Each.
    pub worst: f64,
}

/// One transfer.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Mbit/s at the receiver.
    pub goodput: f64,
    /// To one tunnel's in the same repetition.
    pub ratio: f64,
    /// What the counters gained.
    pub gained: Counters,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shares: Vec<String> = self.gained.shares().iter().map(|share| format!("{share:.0}")).collect();
        let [at_gaps, while_busy] = self.gained.moves;
        write!(
            f,
            "{:.2} Mbit/s, {:.2}x; tunnels {}%; {} retransmitted and {} out of order of {}; moves {at_gaps} + {while_busy}",
            self.goodput,
            self.ratio,
            shares.join("/"),
            self.gained.retransmitted,
            self.gained.out_of_order,
            self.gained.segments,
        )
    }
}

/// All transfers of one kind.
pub struct Row {
    pub contestant: Contestant,
    pub flows: usize,
    pub target: Option<Target>,
    pub samples: Vec<Sample>,
}

/// Least, middle and greatest.
pub fn spread(values: impl IntoIterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = |at: usize| values.get(at).copied().unwrap_or(f64::NAN);
    let half = values.len() / 2;
    let median =
        if values.len().is_multiple_of(2) { middle(half.wrapping_sub(1)).midpoint(middle(half)) } else { middle(half) };
    [middle(0), median, middle(values.len().wrapping_sub(1))]
}

impl Row {
    pub fn new(contestant: Contestant, flows: usize, target: Option<Target>) -> Self {
        Self { contestant, flows, target, samples: Vec::new() }
    }

    fn ratios(&self) -> [f64; 3] {
        spread(self.samples.iter().map(|sample| sample.ratio))
    }

    /// Whether the target is met, and what it is.
    fn verdict(&self) -> Option<(bool, String)> {
        let Target { median, worst } = self.target?;
        let [least, middle, _] = self.ratios();
        let mut wanted = Vec::new();
        if median > 0.0 {
            wanted.push(format!("median >= {median:.3}"));
        }
        if worst > 0.0 {
            wanted.push(format!("each >= {worst:.2}"));
        }
        Some((middle >= median && least >= worst, wanted.join(", ")))
    }
}

/// Prints a line for programs.
pub fn json(series: &Value) {
    println!("{JSON}{series}");
}

/// How a target is shown.
pub fn verdict(wanted: &str, met: bool) -> String {
    format!("{wanted}: {}", if met { "met" } else { "MISSED" })
}

/// A table without rows.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}

/// A cell of a number.
pub fn number(text: impl Into<String>) -> Cell {
    Cell::new(text.into()).set_alignment(CellAlignment::Right)
}

/// Prints a series.
pub fn show(title: &str, rows: &[Row]) {
    let header = ["", "flows", "Mbit/s", "ratio", "least", "greatest", "retransmitted", "out of order", "target"];
    let mut table = table(&header);
    for row in rows {
        let [least, median, greatest] = row.ratios();
        let [_, goodput, _] = spread(row.samples.iter().map(|sample| sample.goodput));
        let share = |count: fn(&Counters) -> u64| {
            let sum = |count: fn(&Counters) -> u64| row.samples.iter().map(|sample| count(&sample.gained)).sum::<u64>();
            #[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
            let percent = sum(count) as f64 / sum(|gained| gained.segments).max(1) as f64 * 100.0;
            format!("{percent:.2}%")
        };
        let verdict = row.verdict().map_or_else(String::new, |(met, wanted)| verdict(&wanted, met));
        let mut cells = vec![Cell::new(row.contestant.name())];
        let numbers = [
            row.flows.to_string(),
            format!("{goodput:.2}"),
            format!("{median:.2}"),
            format!("{least:.2}"),
            format!("{greatest:.2}"),
            share(|gained| gained.retransmitted),
            share(|gained| gained.out_of_order),
        ];
        cells.extend(numbers.map(number));
        cells.push(Cell::new(verdict));
        table.add_row(cells);
    }
    let runs = rows.first().map_or(0, |row| row.samples.len());
    println!("\n{title}; medians of {runs} runs, ratios to one tunnel in the same run\n{table}\n");
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let each = |value: fn(&Sample) -> f64| row.samples.iter().map(value).collect::<Vec<_>>();
            let [least, median, greatest] = row.ratios();
            json!({
                "contestant": row.contestant.name(),
                "flows": row.flows,
                "goodput_mbps": each(|sample| sample.goodput),
                "ratio": each(|sample| sample.ratio),
                "ratio_median": median,
                "ratio_min": least,
                "ratio_max": greatest,
                "retransmitted": row.samples.iter().map(|sample| sample.gained.retransmitted).collect::<Vec<_>>(),
                "out_of_order": row.samples.iter().map(|sample| sample.gained.out_of_order).collect::<Vec<_>>(),
                "segments": row.samples.iter().map(|sample| sample.gained.segments).collect::<Vec<_>>(),
                "moves": row.samples.iter().map(|sample| sample.gained.moves).collect::<Vec<_>>(),
                "target": row.verdict().map(|(met, wanted)| json!({"wanted": wanted, "met": met})),
            })
        })
        .collect();
    json(&json!({"series": title, "rows": rows}));
}
