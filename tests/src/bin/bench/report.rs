//! Prints the results: a table for people, and a line of JSON for programs.

use std::io::BufRead;

use anyhow::{Context as _, Result, ensure};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::bulk::{Repetition, Sample};
use crate::series::{RowSpec, Series};
use lab::comparison::{Counters, Method};
use lab::quantiles::{SHARES, quantiles};

/// Begin of the line with JSON, which `cargo xtask bench` collects.
const JSON: &str = "@json ";

/// All transfers of one row.
struct Row<'a> {
    desired: RowSpec,
    /// Each transfer, with its seed and its ratio to one tunnel in the same repetition.
    samples: Vec<(u64, f64, &'a Sample)>,
}

impl Row<'_> {
    fn ratios(&self) -> impl Iterator<Item = f64> {
        self.samples.iter().map(|(_, ratio, _)| *ratio)
    }

    fn goodputs(&self) -> impl Iterator<Item = f64> {
        self.samples.iter().map(|(.., sample)| sample.goodput)
    }

    /// Whether the target is met, and the target in words.
    fn verdict(&self) -> Option<(bool, String)> {
        let target = self.desired.target?;
        let [median] = quantiles(self.ratios(), [0.5]);
        Some((median >= target.median && self.missed().next().is_none(), target.words()))
    }

    /// Transfers that miss the target for a single transfer.
    fn missed(&self) -> impl Iterator<Item = &(u64, f64, &Sample)> {
        let target = self.desired.target.unwrap_or_default();
        self.samples.iter().filter(move |(_, ratio, sample)| !target.is_met_by(sample.goodput, *ratio))
    }

    /// A counter as a share of all segments.
    fn share(&self, count: fn(&Counters) -> u64) -> String {
        let sum = |count: fn(&Counters) -> u64| self.samples.iter().map(|(.., s)| count(&s.gained)).sum::<u64>();
        #[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
        let percent = sum(count) as f64 / sum(|gained| gained.segments).max(1) as f64 * 100.0;
        format!("{percent:.2}%")
    }

    fn cells(&self) -> Vec<Cell> {
        let [goodput] = quantiles(self.goodputs(), [0.5]);
        let mut numbers = vec![self.desired.flows.to_string(), format!("{goodput:.1}")];
        numbers.extend(quantiles(self.ratios(), SHARES).map(|ratio| format!("{ratio:.2}")));
        numbers.extend([self.share(|gained| gained.retransmitted), self.share(|gained| gained.out_of_order)]);
        let mut cells = vec![Cell::new(self.desired.method_name())];
        cells.extend(numbers.into_iter().map(number));
        cells.push(Cell::new(self.verdict().map_or_else(String::new, |(met, desired)| verdict(&desired, met))));
        cells
    }

    fn json(&self) -> Value {
        let each = |value: fn(&Counters) -> Value| -> Vec<Value> {
            self.samples.iter().map(|(.., sample)| value(&sample.gained)).collect()
        };
        let [least, tenth, median, ninetieth, greatest] = quantiles(self.ratios(), SHARES);
        json!({
            "contestant": self.desired.method.name(),
            "policy": if self.desired.policy.is_empty() { Value::Null } else { json!(self.desired.policy) },
            "flows": self.desired.flows,
            "goodput_mbps": self.goodputs().collect::<Vec<_>>(),
            "ratio": self.ratios().collect::<Vec<_>>(),
            "ratio_median": median,
            "ratio_min": least,
            "ratio_max": greatest,
            "ratio_10_percent": tenth,
            "ratio_90_percent": ninetieth,
            "retransmitted": each(|gained| json!(gained.retransmitted)),
            "out_of_order": each(|gained| json!(gained.out_of_order)),
            "segments": each(|gained| json!(gained.segments)),
            "moves": each(|gained| json!(gained.moves)),
            "tunnel_percent": each(|gained| json!(gained.shares())),
            "target": self.verdict().map(|(met, desired)| json!({"wanted": desired, "met": met})),
        })
    }
}

/// The rows of a series. Ratios are to one tunnel with the same number of flows. If it was not measured with that
/// number, they are to the first row of one tunnel.
fn rows<'a>(series: &Series, repetitions: &'a [Repetition]) -> Vec<Row<'a>> {
    let desired: Vec<RowSpec> = series.rows().collect();
    let alone = |flows: Option<usize>| {
        let is_it = |row: &RowSpec| row.method == Method::OneTunnel && flows.is_none_or(|count| count == row.flows);
        desired.iter().position(is_it)
    };
    let row = |(place, row): (usize, &RowSpec)| {
        let base = alone(Some(row.flows)).or_else(|| alone(None));
        let sample = |repetition: &'a Repetition| {
            let sample = repetition.samples.get(place)?;
            let base = base.and_then(|base| repetition.samples.get(base)).map_or(f64::NAN, |base| base.goodput);
            Some((repetition.seed, sample.goodput / base, sample))
        };
        Row { desired: *row, samples: repetitions.iter().filter_map(sample).collect() }
    };
    let mut rows: Vec<Row<'a>> = desired.iter().enumerate().map(row).collect();
    // One tunnel comes first. Then methods with the same number of flows come together.
    rows.sort_by_key(|row| {
        let method = row.desired.method;
        let flows = if method == Method::OneTunnel { 0 } else { row.desired.flows };
        (flows, method)
    });
    rows
}

/// Prints a line of JSON for programs.
pub fn json(series: &Value) {
    println!("{JSON}{series}");
}

/// A target, and whether it is met, in words.
pub fn verdict(desired: &str, met: bool) -> String {
    format!("{desired}: {}", if met { "met" } else { "MISSED" })
}

/// A Markdown table without rows.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

/// A table cell with a number, aligned to the right.
pub fn number(text: impl Into<String>) -> Cell {
    Cell::new(text.into()).set_alignment(CellAlignment::Right)
}

/// Prints a series.
pub fn show(series: &Series, repetitions: &[Repetition]) {
    let rows = rows(series, repetitions);
    let mut table = table(&[
        "",
        "flows",
        "Mbit/s",
        "least",
        "10%",
        "median",
        "90%",
        "greatest",
        "sent again",
        "out of order",
        "target",
    ]);
    for row in &rows {
        table.add_row(row.cells());
    }
    let runs = repetitions.len();
    println!("\n{}; {runs} runs: median goodput, and ratios to one tunnel in the same run\n\n{table}", series.title);
    for row in rows.iter().filter(|row| row.desired.target.is_some()) {
        for (seed, ratio, sample) in row.missed() {
            println!("\nMISSED by seed {seed}: {}: {ratio:.3}x, {}", row.desired.name(), sample.words());
        }
    }
    println!();
    json(&json!({
        "series": series.title,
        "seeds": repetitions.iter().map(|repetition| repetition.seed).collect::<Vec<_>>(),
        "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
    }));
}

/// Merges the repetitions in `lines`, and prints those of each series.
pub fn merge(all: &[Series], lines: impl BufRead) -> Result<()> {
    let mut repetitions = Vec::new();
    for line in lines.lines() {
        let line = line.context("reading repetitions")?;
        let json: Value = serde_json::from_str(&line).with_context(|| format!("a repetition: {line}"))?;
        repetitions.push(Repetition::of_json(&json).with_context(|| format!("not a repetition: {line}"))?);
    }
    for series in all {
        let own = repetitions.iter().filter(|(title, _)| *title == series.title);
        let mut own: Vec<Repetition> = own.map(|(_, repetition)| repetition.clone()).collect();
        // Jobs that run in parallel end in any order.
        own.sort_by_key(|repetition| repetition.number);
        let rows = series.rows().count();
        ensure!(own.iter().all(|one| one.samples.len() == rows), "a repetition of `{}` is of other rows", series.title);
        if !own.is_empty() {
            show(series, &own);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::arguments::{Arguments, Case};
    use crate::cases;
    use crate::target::Target;

    fn series() -> Series {
        let arguments = Arguments::parse_from(["bench", "--simulated", "--flows", "3"]);
        cases::of_case(Case::Lossy, &arguments).remove(0)
    }

    fn repetition(number: u32, goodputs: &[f64]) -> Repetition {
        let sample = |goodput: &f64| Sample { goodput: *goodput, gained: Counters::default() };
        Repetition { number, seed: number.into(), samples: goodputs.iter().map(sample).collect() }
    }

    #[test]
    fn ratios_are_to_one_tunnel_with_as_many_flows_in_the_same_repetition() {
        let series = series();
        let names: Vec<String> = series.rows().map(|row| row.name()).collect();
        assert_eq!(names[1], "kernel ECMP, 3 flows");
        let three = series.rows().position(|row| row.method == Method::OneTunnel && row.flows == 3).unwrap();
        let mut goodputs = vec![100.0; names.len()];
        (goodputs[0], goodputs[1], goodputs[three]) = (50.0, 120.0, 60.0);
        let first = repetition(1, &goodputs);
        goodputs[three] = 40.0;
        let all = [first, repetition(2, &goodputs)];
        let rows = rows(&series, &all);
        let row = rows.iter().find(|row| row.desired.method == Method::Ecmp).unwrap();
        assert_eq!(row.ratios().collect::<Vec<_>>(), [2.0, 3.0]);
        assert_eq!(rows[0].ratios().collect::<Vec<_>>(), [1.0, 1.0]);
    }

    #[test]
    fn targets_are_of_the_middle_or_of_each() {
        let row = |target, ratios: &[f64]| {
            let desired = RowSpec { target: Some(target), ..series().rows().next().unwrap() };
            let sample: &Sample = Box::leak(Box::new(repetition(1, &[91.5]).samples.remove(0)));
            Row { desired, samples: ratios.iter().map(|ratio| (1, *ratio, sample)).collect() }
        };
        let verdict = |target, ratios: &[f64]| row(target, ratios).verdict().unwrap();
        assert_eq!(verdict(Target::each(2.95), &[2.95, 3.0]), (true, "each >= 2.95".to_owned()));
        assert!(!verdict(Target::each(2.95), &[2.949, 3.0]).0);
        assert!(verdict(Target::median(2.85), &[1.0, 2.9, 2.9]).0 && !verdict(Target::median(2.85), &[2.0, 3.0]).0);
        assert_eq!(verdict(Target::between(91.0, 92.0), &[1.0]), (true, "each 91 to 92 Mbit/s".to_owned()));
        assert!(!verdict(Target::between(92.0, 93.0), &[1.0]).0);
    }

    #[test]
    fn merging_refuses_what_is_no_repetition() {
        let title = series().title;
        let rows = series().rows().count();
        let good = repetition(1, &vec![1.0; rows]).json(&title);
        assert!(merge(&[series()], format!("{good}\n").as_bytes()).is_ok());
        for bad in ["{}".to_owned(), "no JSON".to_owned(), repetition(1, &[1.0]).json(&title).to_string()] {
            assert!(merge(&[series()], bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
