//! The cases with long TCP flows: their tables, and the links, rows and targets of each. Pure.

use std::time::Duration;

use crate::arguments::{Arguments, Case};
use crate::series::{Coming, RowSpec, Series, Stage};
use crate::target::Target;
use lab::comparison::{Links, MEMBERS, Method, PAUSE};

/// Rate of the published recipe, Mbit/s. There, 10 flows reached 890 Mbit/s over one tunnel and 1,620 over three.
const RECIPE_RATE: f64 = 1_000.0;
/// Numbers of flows in the table of all policies.
const FLOWS: [usize; 8] = [1, 2, 3, 4, 6, 10, 12, 48];
/// Numbers of flows in the main table.
const EVEN: [usize; 5] = [3, 4, 6, 12, 48];
/// Number of flows that arrive and leave.
const PASSING: usize = 30;
const POLICIES: [&str; 4] = ["hash", "flowlet", "adaptive", "spray"];

/// Pause between two transfers in simulated time, where a pause costs almost nothing. After it, the daemon has
/// forgotten what the last transfer carried.
const IDLE: Duration = Duration::from_secs(3);

/// Repetitions, unless a case needs more.
const RUNS: u32 = 5;
/// Repetitions of the cases main and recipe in simulated time.
const SEEDS: u32 = 20;

fn one_tunnel(flows: usize, target: Option<Target>) -> RowSpec {
    RowSpec { method: Method::OneTunnel, policy: "", flows, target }
}

fn ecmp(flows: usize) -> RowSpec {
    RowSpec { method: Method::Ecmp, policy: "", flows, target: None }
}

fn recipe(flows: usize) -> RowSpec {
    RowSpec { method: Method::EqualPorts, policy: "", flows, target: None }
}

fn ours(policy: &'static str, flows: usize, target: Option<Target>) -> RowSpec {
    RowSpec { method: Method::Ecmpvpn, policy, flows, target }
}

/// The tables of a case. Empty if the case has no long flows.
pub fn of_case(case: Case, arguments: &Arguments) -> Vec<Series> {
    let rate = if case == Case::Recipe { arguments.rate_or(RECIPE_RATE) } else { arguments.rate() };
    let make = Make { arguments, rate };
    let mut series = match case {
        Case::Main => vec![make.main()],
        Case::Recipe => vec![make.recipe()],
        Case::Policies => vec![make.policies()],
        Case::Adaptive => vec![make.adaptive()],
        Case::Spray => make.spray(),
        Case::Unequal => vec![make.unequal()],
        Case::Delayed => [5.0, 20.0].map(|delay| make.delayed(delay)).into(),
        Case::Lossy => [0.01, 1.0].map(|loss| make.lossy(loss)).into(),
        Case::Passing => vec![make.passing()],
        Case::Custom => vec![make.custom()],
        Case::Short | Case::Reorder | Case::Changes => Vec::new(),
    };
    for series in &mut series {
        series.apply(arguments);
    }
    series
}

/// Makes series. All links have the same rate, unless a series says otherwise.
struct Make<'a> {
    arguments: &'a Arguments,
    rate: f64,
}

impl Make<'_> {
    fn links(&self) -> Links {
        Links::alike(self.arguments.simulated, self.rate)
    }

    fn series(&self, title: &str, stages: Vec<Stage>) -> Series {
        Series {
            title: format!("{title}, {MEMBERS} members of {} Mbit/s", self.rate),
            stages,
            runs: RUNS,
            seconds: self.arguments.seconds(),
            coming: Coming::Together,
            // Half of the one-way delay: with a longer time, the windows of new flows would not open.
            look: self.links().wire.map_or(lab::traffic::LOOK, |wire| wire / 2),
            pause: if self.arguments.simulated { IDLE } else { PAUSE },
            settles: if self.arguments.simulated { 0.5 } else { 0.25 },
        }
    }

    fn one_stage(&self, title: &str, links: Links, rows: Vec<RowSpec>) -> Series {
        self.series(title, vec![Stage { links, rows }])
    }

    /// The target for flows that can fill all links. In simulated time, only the links limit them.
    fn even(&self) -> Target {
        if self.arguments.simulated { Target::each(2.95) } else { Target::median(2.85) }
    }

    /// The target for one tunnel alone: the link's rate without headers.
    fn alone(&self) -> Option<Target> {
        self.arguments.simulated.then(|| Target::between(0.91 * self.rate, 0.92 * self.rate))
    }

    fn seeds(&self) -> u32 {
        if self.arguments.simulated { SEEDS } else { RUNS }
    }

    fn with_equal_ports(&self, flows: &[usize]) -> Stage {
        let links = Links { equal_ports: true, ..self.links() };
        Stage { links, rows: flows.iter().map(|flows| recipe(*flows)).collect() }
    }

    fn main(&self) -> Series {
        let mut rows = vec![one_tunnel(1, self.alone())];
        rows.extend(EVEN.iter().flat_map(|flows| [ecmp(*flows), ours("adaptive", *flows, Some(self.even()))]));
        rows.push(ours("spray", 1, Some(self.even())));
        let stages = vec![Stage { links: self.links(), rows }, self.with_equal_ports(&[3, 12])];
        Series { runs: self.seeds(), ..self.series("main", stages) }
    }

    fn recipe(&self) -> Series {
        const MANY: usize = 10;
        let rows = vec![
            one_tunnel(1, self.alone()),
            ecmp(MANY),
            ours("adaptive", MANY, Some(self.even())),
            ours("spray", 1, Some(self.even())),
        ];
        let stages = vec![Stage { links: self.links(), rows }, self.with_equal_ports(&[MANY])];
        let series = self.series("recipe (published: 890 Mbit/s over one tunnel, 1,620 over three)", stages);
        Series { runs: self.seeds(), ..series }
    }

    fn policies(&self) -> Series {
        let mut rows = vec![one_tunnel(1, None)];
        for flows in FLOWS {
            rows.push(ecmp(flows));
            rows.extend(POLICIES.map(|policy| ours(policy, flows, None)));
        }
        self.one_stage("policies", self.links(), rows)
    }

    fn adaptive(&self) -> Series {
        let mut rows = vec![one_tunnel(3, None)];
        rows.extend([3, 4, 6, 12].iter().flat_map(|flows| [ecmp(*flows), ours("adaptive", *flows, Some(self.even()))]));
        self.one_stage("adaptive", self.links(), rows)
    }

    fn spray(&self) -> Vec<Series> {
        let emulated = Target { worst: 2.0, ..Target::median(2.6) };
        let one = Some(if self.arguments.simulated { self.even() } else { emulated });
        let three = Some(self.even());
        let rows = vec![one_tunnel(3, None), ecmp(1), ours("spray", 1, one), ecmp(3), ours("spray", 3, three)];
        let delayed = vec![one_tunnel(3, None), ecmp(1), ours("spray", 1, Some(Target::each(1.0)))];
        let links = Links { delays: vec![0.0, 5.0, 0.0], ..self.links() };
        vec![
            Series { runs: 10, ..self.one_stage("spray", self.links(), rows) },
            self.one_stage("spray, second tunnel slower by 5 ms", links, delayed),
        ]
    }

    fn unequal(&self) -> Series {
        let rates: Vec<f64> = [2.0, 2.0, 0.5].map(|share| share * self.rate).into();
        // 0.9 of the sum of the rates, as a ratio to the first tunnel.
        let target = Some(Target::median(0.9 * rates.iter().sum::<f64>() / rates[0]));
        let title = format!("adaptive, members of {} Mbit/s", listed(&rates));
        let rows = vec![one_tunnel(3, None), ecmp(12), ours("adaptive", 12, target)];
        let series = self.one_stage("", Links { rates, ..self.links() }, rows);
        Series { title, ..series }
    }

    fn delayed(&self, delay: f64) -> Series {
        let links = Links { delays: vec![0.0, delay, 0.0], ..self.links() };
        let mut rows = vec![one_tunnel(1, None)];
        for flows in [1, 3, 12] {
            rows.extend([ecmp(flows), ours("adaptive", flows, None), ours("spray", flows, None)]);
        }
        self.one_stage(&format!("delayed, second tunnel slower by {delay} ms"), links, rows)
    }

    fn lossy(&self, loss: f64) -> Series {
        let mut rows = Vec::new();
        for flows in [1, 3, 12] {
            rows.extend([one_tunnel(flows, None), ecmp(flows)]);
            rows.extend([ours("adaptive", flows, None), ours("spray", flows, None)]);
        }
        self.one_stage(
            &format!("lossy, {loss}% lost in each direction"),
            Links { losses: vec![loss; usize::from(MEMBERS)], ..self.links() },
            rows,
        )
    }

    fn passing(&self) -> Series {
        let ours = POLICIES.map(|policy| ours(policy, PASSING, None));
        let rows = [&[one_tunnel(PASSING, None), ecmp(PASSING)][..], &ours].concat();
        let series = self.one_stage("passing: flows that arrive and leave", self.links(), rows);
        Series { coming: Coming::Passing, seconds: 2.0 * series.seconds, ..series }
    }

    fn custom(&self) -> Series {
        let Arguments { rates, delays, jitter, loss, .. } = self.arguments;
        let rates = if rates.is_empty() { self.links().rates } else { rates.clone() };
        let title = format!(
            "members of {} Mbit/s, delays of {} ms, jitter of {jitter} ms, {loss}% lost",
            listed(&rates),
            listed(delays)
        );
        let mut rows = vec![one_tunnel(3, None)];
        rows.extend([1, 3, 4, 6, 12].iter().flat_map(|flows| [ecmp(*flows), ours("adaptive", *flows, None)]));
        let links = Links {
            rates,
            delays: delays.clone(),
            jitter: *jitter,
            losses: vec![*loss; usize::from(MEMBERS)],
            ..self.links()
        };
        Series { title, ..self.one_stage("", links, rows) }
    }
}

/// Numbers, separated by slashes.
fn listed(numbers: &[f64]) -> String {
    if numbers.is_empty() { "0".to_owned() } else { numbers.iter().map(f64::to_string).collect::<Vec<_>>().join("/") }
}

impl Series {
    /// Changes the series as the options say.
    fn apply(&mut self, arguments: &Arguments) {
        self.title += arguments.ends().words();
        self.runs = arguments.runs(self.runs);
        if let Some(policy) = arguments.policy {
            self.title = format!("{}, with policy {policy}", self.title);
        }
        for stage in &mut self.stages {
            stage.rows = applied(&stage.rows, arguments);
        }
        self.stages.retain(|stage| !stage.rows.is_empty());
    }
}

/// `rows` with the policies and numbers of flows of the options.
fn applied(rows: &[RowSpec], arguments: &Arguments) -> Vec<RowSpec> {
    let mut applied = Vec::new();
    let mut add = |row: RowSpec| {
        let same = |other: &RowSpec| RowSpec { target: None, ..*other } == RowSpec { target: None, ..row };
        if !applied.iter().any(same) {
            applied.push(row);
        }
    };
    for row in rows {
        let mut row = *row;
        match row.method {
            Method::OneTunnel => {
                add(row);
                continue;
            }
            Method::Ecmp | Method::EqualPorts if arguments.without_ecmp => continue,
            Method::Ecmpvpn => row.policy = arguments.policy.unwrap_or(row.policy),
            Method::Ecmp | Method::EqualPorts => {}
        }
        if arguments.flows.is_empty() {
            add(row);
        }
        for flows in &arguments.flows {
            let is_known =
                |known: &&RowSpec| known.method == row.method && known.policy == row.policy && known.flows == *flows;
            add(RowSpec { flows: *flows, target: rows.iter().find(is_known).and_then(|known| known.target), ..row });
        }
    }
    applied
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn series(case: Case, options: &str) -> Vec<Series> {
        let arguments = Arguments::parse_from(["bench"].into_iter().chain(options.split_whitespace()));
        of_case(case, &arguments)
    }

    #[test]
    fn the_main_table_has_twenty_seeds_and_tight_targets_in_simulated_time() {
        let [simulated] = &series(Case::Main, "--simulated")[..] else { panic!("one table") };
        let [emulated] = &series(Case::Main, "")[..] else { panic!("one table") };
        assert_eq!((simulated.runs, emulated.runs), (20, 5));
        let target = |series: &Series, policy: &str, flows: usize| {
            series.rows().find(|row| row.policy == policy && row.flows == flows).unwrap().target
        };
        for (policy, flows) in [("adaptive", 3), ("adaptive", 48), ("spray", 1)] {
            assert_eq!(target(simulated, policy, flows), Some(Target::each(2.95)));
            assert_eq!(target(emulated, policy, flows), Some(Target::median(2.85)));
        }
        assert_eq!(target(simulated, "", 1), Some(Target::between(91.0, 92.0)));
        assert!(simulated.title.contains("3 members of 100 Mbit/s"), "{}", simulated.title);
        assert!(simulated.stages[1].links.equal_ports && simulated.stages[0].links.wire.is_some());
        assert!(emulated.stages[0].links.wire.is_none());
    }

    #[test]
    fn the_recipe_runs_at_its_rates_by_default() {
        assert_eq!(series(Case::Recipe, "--simulated")[0].stages[0].links.rates, [1_000.0; 3]);
        assert_eq!(series(Case::Recipe, "--simulated --rate 50")[0].stages[0].links.rates, [50.0; 3]);
        assert_eq!(series(Case::Unequal, "--simulated")[0].stages[0].links.rates, [200.0, 200.0, 50.0]);
        assert_eq!(series(Case::Unequal, "")[0].stages[0].links.rates, [20.0, 20.0, 5.0]);
    }

    #[test]
    fn options_change_rows_and_each_is_there_once() {
        let rows = |options| {
            let series = series(Case::Policies, options);
            series[0].rows().map(|row| (row.method, row.policy, row.flows)).collect::<Vec<_>>()
        };
        assert_eq!(rows("").len(), 1 + 8 * 5);
        let few = rows("--flows 3,7 --policy spray --without-ecmp");
        let ours = |flows| (Method::Ecmpvpn, "spray", flows);
        assert_eq!(few, [(Method::OneTunnel, "", 1), ours(3), ours(7)]);
        let without = series(Case::Main, "--without-ecmp");
        assert_eq!(without[0].stages.len(), 1, "no lab for rows that are left out");
    }

    #[test]
    fn a_number_of_flows_keeps_its_target() {
        let series = series(Case::Main, "--simulated --flows 6,7");
        let targets =
            series[0].rows().filter(|row| row.policy == "adaptive").map(|row| (row.flows, row.target.is_some()));
        assert_eq!(targets.collect::<Vec<_>>(), [(6, true), (7, false)]);
    }
}
