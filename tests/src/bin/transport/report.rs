//! Merges the results of all jobs and prints them: a table for each profile, and one of all.

use std::collections::BTreeSet;
use std::io::BufRead;

use anyhow::{Context as _, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use lab::quantiles::spread;
use serde_json::{Value, json};

use crate::profile::Profile;
use crate::sample::{ECMP, JSON, Measured, ONE_TUNNEL, Sample, figure};
use crate::target::Target;
use crate::transport::Transport;

/// Reads what jobs printed, a line each, and shows it.
pub fn merge(lines: impl BufRead) -> Result<()> {
    let mut all = Vec::new();
    for line in lines.lines() {
        let line = line.context("reading results")?;
        let json: Value = serde_json::from_str(&line).with_context(|| format!("a result: {line}"))?;
        all.push(Measured::of_json(&json).with_context(|| format!("not a result: {line}"))?);
    }
    // Jobs that run in parallel end in any order.
    all.sort_by_key(|measured| (measured.job.profile, measured.job.seed));
    let profiles: BTreeSet<Profile> = all.iter().map(|measured| measured.job.profile).collect();
    for profile in &profiles {
        let rows = rows(&of_profile(&all, *profile));
        println!("\n{}; {}\n\n{}", profile.title(), seeds(&all, *profile), table(&rows));
        println!(
            "{JSON}{}",
            json!({
                "series": profile.title(),
                "profile": profile.word(),
                "seeds": of_profile(&all, *profile).iter().map(|measured| measured.job.seed).collect::<Vec<_>>(),
                "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
            })
        );
    }
    if !profiles.is_empty() {
        println!("\none flow, times one tunnel: median (worst) of all seeds\n\n{}\n", overview(&all, &profiles));
    }
    Ok(())
}

fn of_profile(all: &[Measured], profile: Profile) -> Vec<&Measured> {
    all.iter().filter(|measured| measured.job.profile == profile).collect()
}

fn seeds(all: &[Measured], profile: Profile) -> String {
    let seeds: Vec<String> = of_profile(all, profile).iter().map(|measured| measured.job.seed.to_string()).collect();
    format!("seed{} {}", if seeds.len() == 1 { "" } else { "s" }, seeds.join(", "))
}

/// A transport with a method, in one profile.
struct Row<'a> {
    profile: Profile,
    transport: Transport,
    method: &'a str,
    /// Each seed's sample, with its ratio to one tunnel.
    samples: Vec<(f64, &'a Sample)>,
}

/// The rows of one profile, in the order in which they were measured.
fn rows<'a>(measured: &[&'a Measured]) -> Vec<Row<'a>> {
    let Some(first) = measured.first() else { return Vec::new() };
    let row = |sample: &'a Sample| {
        let (transport, method) = (sample.transport, sample.method.as_str());
        let of = |one: &&'a Measured| Some((one.ratio(transport, method)?, one.find(transport, method)?));
        Row { profile: first.job.profile, transport, method, samples: measured.iter().filter_map(of).collect() }
    };
    first.samples.iter().map(row).collect()
}

impl Row<'_> {
    /// Least, median and greatest ratio to one tunnel.
    fn ratios(&self) -> [f64; 3] {
        spread(self.samples.iter().map(|(ratio, _)| *ratio))
    }

    /// Least, median and greatest value of a figure. `None` if this transport does not have it.
    fn figure(&self, name: &str) -> Option<[f64; 3]> {
        let values: Vec<f64> = self.samples.iter().filter_map(|(_, sample)| sample.get(name)).collect();
        (!values.is_empty()).then(|| spread(values))
    }

    fn target(&self) -> Option<Target> {
        let is_judged = self.method != ONE_TUNNEL && self.method != ECMP && self.transport != Transport::Short;
        is_judged.then(|| Target::of(self.profile, self.transport, self.method))
    }

    fn is_met(&self) -> Option<bool> {
        let [.., most] = self.figure(figure::OUT_OF_ORDER).unwrap_or_default();
        let [least, ..] = self.figure(figure::LEAST_SHARE).unwrap_or_default();
        Some(self.target()?.is_met(self.ratios()[0], most, least))
    }

    fn cells(&self) -> Vec<Cell> {
        let [least, median, _] = self.ratios();
        let middle = |name: &str| self.figure(name).map(|[_, median, _]| median);
        // Of what should be small, the greatest.
        let most = |name: &str| self.figure(name).map(|[.., most]| most);
        let numbers = [
            middle(figure::GOODPUT).map(|rate| format!("{rate:.1}")),
            Some(format!("{median:.2}")),
            Some(format!("{least:.2}")),
            most(figure::LOST).map(percent),
            most(figure::OUT_OF_ORDER).map(percent),
            most(figure::BEYOND_THRESHOLD).map(percent),
            most(figure::EXTENT).map(|extent| format!("{extent:.0}")),
            middle(figure::DELAY_MEDIAN).map(|delay| format!("{delay:.1}")),
            most(figure::DELAY_P99).map(|delay| format!("{delay:.1}")),
            most(figure::DELAY_GREATEST).map(|delay| format!("{delay:.1}")),
            most(figure::SHORT_P99).map(|time| format!("{time:.0}")),
            self.figure(figure::LEAST_SHARE).map(|[least, ..]| format!("{least:.2}")),
        ];
        let mut cells = vec![Cell::new(self.transport.title()), Cell::new(method(self.method))];
        cells.extend(numbers.map(|text| number(text.unwrap_or_default())));
        let verdict = self
            .target()
            .zip(self.is_met())
            .map(|(target, met)| format!("{}: {}", target.words(), if met { "met" } else { "MISSED" }));
        cells.push(Cell::new(verdict.unwrap_or_default()));
        cells
    }

    fn json(&self) -> Value {
        let [least, median, greatest] = self.ratios();
        let figures: Vec<_> = self.samples.iter().map(|(_, sample)| json!(sample.figures)).collect();
        json!({
            "transport": self.transport.word(),
            "method": self.method,
            "ratio": self.samples.iter().map(|(ratio, _)| *ratio).collect::<Vec<_>>(),
            "ratio_min": least,
            "ratio_median": median,
            "ratio_max": greatest,
            "figures": figures,
            "target": self.target().map(|target| json!({"wanted": target.words(), "met": self.is_met()})),
        })
    }
}

fn table(rows: &[Row<'_>]) -> Table {
    let mut table = empty(&[
        "",
        "",
        "Mbit/s",
        "median",
        "worst",
        "lost",
        "out of order",
        "by 3 or more",
        "extent",
        "delay ms",
        "99%",
        "greatest",
        "short 99% ms",
        "slowest of all",
        "target",
    ]);
    for row in rows {
        table.add_row(row.cells());
    }
    table
}

/// A row for each profile and policy, a column for each transport.
fn overview(all: &[Measured], profiles: &BTreeSet<Profile>) -> Table {
    let transports: BTreeSet<Transport> =
        all.iter().flat_map(|measured| measured.samples.iter().map(|sample| sample.transport)).collect();
    let columns: Vec<&str> = transports.iter().map(|transport| transport.title()).collect();
    let mut table = empty(&[&["", "policy"], &columns[..]].concat());
    for profile in profiles {
        let rows = rows(&of_profile(all, *profile));
        let mut methods: Vec<&str> = Vec::new();
        for row in rows.iter().filter(|row| row.method != ONE_TUNNEL && row.method != ECMP) {
            if !methods.contains(&row.method) {
                methods.push(row.method);
            }
        }
        for name in methods {
            let cell = |transport: &Transport| {
                let row = rows.iter().find(|row| row.transport == *transport && row.method == name);
                number(row.map(words).unwrap_or_default())
            };
            let mut cells = vec![Cell::new(profile.title()), Cell::new(method(name))];
            cells.extend(transports.iter().map(cell));
            table.add_row(cells);
        }
    }
    table
}

/// A row in one cell.
fn words(row: &Row<'_>) -> String {
    let [least, median, _] = row.ratios();
    let order = row.figure(figure::EXTENT).and(row.figure(figure::OUT_OF_ORDER));
    let order = order.map(|[.., most]| format!(", {} out of order", percent(most)));
    let missed = if row.is_met() == Some(false) { " !" } else { "" };
    format!("{median:.2} ({least:.2}){}{missed}", order.unwrap_or_default())
}

/// A method, with policies marked as code.
fn method(name: &str) -> String {
    if name == ONE_TUNNEL || name == ECMP { name.to_owned() } else { format!("`{name}`") }
}

fn percent(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

fn empty(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

fn number(text: impl Into<String>) -> Cell {
    Cell::new(text.into()).set_alignment(CellAlignment::Right)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::float_cmp, reason = "these are exact")]

    use super::*;
    use crate::sample::tests::measured;

    fn two_seeds() -> Vec<Measured> {
        let of = |job: &str, spray: f64| measured(job, Transport::Quic, &[(ONE_TUNNEL, 100.0), ("spray", spray)]);
        vec![of("equal/1", 280.0), of("equal/2", 90.0), of("apart/1", 155.0)]
    }

    #[test]
    fn the_worst_seed_decides() {
        let all = two_seeds();
        let rows = rows(&of_profile(&all, Profile::Equal));
        let [one, spray] = &rows[..] else { panic!("two rows") };
        assert_eq!(spray.ratios(), [0.9, 1.85, 2.8]);
        assert_eq!((one.is_met(), spray.is_met()), (None, Some(false)));
        assert_eq!(words(spray), "1.85 (0.90) !");
        assert_eq!(spray.json()["target"]["met"], false);
    }

    #[test]
    fn the_overview_has_a_row_for_each_profile_and_policy() {
        let all = two_seeds();
        let profiles = all.iter().map(|measured| measured.job.profile).collect();
        let text = overview(&all, &profiles).to_string();
        assert_eq!(text.lines().filter(|line| line.contains("`spray`")).count(), 2, "{text}");
        assert!(text.contains("1.55 (1.55)") && !text.contains(ONE_TUNNEL), "{text}");
    }

    #[test]
    fn merging_refuses_what_is_no_result() {
        let good = two_seeds()[0].json();
        assert!(merge(format!("{good}\n").as_bytes()).is_ok());
        assert!(merge(&b"{}"[..]).is_err() && merge(&b"no JSON"[..]).is_err());
    }
}
