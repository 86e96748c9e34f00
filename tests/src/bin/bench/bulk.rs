//! Long TCP flows: how much gets across.

use std::path::Path;

use anyhow::Result;
use lab::interrupt;
use lab::traffic::TcpLoad;

use crate::contest::{Contest, Contestant, Counters, MEMBERS, PAUSE};
use crate::report::{Row, Sample, Target};
use crate::{Arguments, Case, Ends};

/// Flows of the transfer over one tunnel, which one flow fills already.
const ON_ONE_TUNNEL: usize = 3;
/// Repetitions unless a target asks for more.
const RUNS: u32 = 5;

/// A series of measurements in one lab.
pub struct Bulk {
    pub title: String,
    policy: &'static str,
    rates: Vec<f64>,
    delays: Vec<f64>,
    /// Numbers of flows, with what is asked of ecmpvpn at each.
    flows: Vec<(usize, Option<Target>)>,
    runs: u32,
}

/// What a case measures by long TCP flows alone.
pub fn of_case(case: Case, arguments: &Arguments) -> Vec<Bulk> {
    let equal = vec![arguments.rate; usize::from(MEMBERS)];
    let even = Some(Target { median: 2.85, worst: 0.0 });
    let bulk = |what: &str, policy: &'static str, flows: Vec<(usize, Option<Target>)>| Bulk {
        title: format!("{what}, {MEMBERS} members of {} Mbit/s", arguments.rate),
        policy,
        rates: equal.clone(),
        delays: vec![],
        flows,
        runs: RUNS,
    };
    let mut series = match case {
        Case::Adaptive => vec![bulk("adaptive", "adaptive", [3, 4, 6, 12].map(|flows| (flows, even)).into())],
        Case::Spray => {
            let one = Some(Target { median: 2.6, worst: 2.0 });
            let delayed = Some(Target { median: 0.0, worst: 1.0 });
            vec![
                Bulk { runs: 10, ..bulk("spray", "spray", vec![(1, one), (3, even)]) },
                Bulk {
                    delays: vec![0.0, 5.0, 0.0],
                    ..bulk("spray, second tunnel slower by 5 ms", "spray", vec![(1, delayed)])
                },
            ]
        }
        Case::Unequal => {
            // 0.9 of 45 Mbit/s, as a ratio to the first tunnel's 20.
            let target = Some(Target { median: 0.9 * 45.0 / 20.0, worst: 0.0 });
            vec![Bulk {
                title: "adaptive, members of 20, 20 and 5 Mbit/s".to_owned(),
                rates: vec![20.0, 20.0, 5.0],
                ..bulk("", "adaptive", vec![(12, target)])
            }]
        }
        Case::Short | Case::Reorder | Case::Changes => return Vec::new(),
        Case::Custom => {
            let rates = if arguments.rates.is_empty() { equal.clone() } else { arguments.rates.clone() };
            let title = format!("members of {rates:?} Mbit/s, delays {:?} ms", arguments.delays);
            let flows = [1, 3, 4, 6, 12].map(|flows| (flows, None)).into();
            vec![Bulk { title, rates, delays: arguments.delays.clone(), ..bulk("", "adaptive", flows) }]
        }
    };
    for bulk in &mut series {
        bulk.title += match arguments.ends {
            Ends::Gateways => ", between the gateways",
            Ends::Hosts => ", between LAN hosts",
        };
        bulk.runs = arguments.runs(bulk.runs);
        if let Some(policy) = arguments.policy {
            bulk.title = format!("{}, with policy {policy}", bulk.title);
            bulk.policy = policy;
        }
        if !arguments.flows.is_empty() {
            let target = |flows: usize| bulk.flows.iter().find(|(known, _)| *known == flows).and_then(|(_, t)| *t);
            bulk.flows = arguments.flows.iter().map(|flows| (*flows, target(*flows))).collect();
        }
    }
    series
}

impl Bulk {
    /// Measures; a row for each contestant and number of flows.
    pub fn run(&self, arguments: &Arguments, program: &Path) -> Result<Vec<Row>> {
        eprintln!("==> {}: building two sites", self.title);
        let contest = Contest::new(program, self.policy, &self.rates, &self.delays, &arguments.extra)?;
        // The first tunnel must be one of the fastest, for ratios.
        let first = usize::from(contest.lab.tunnels[0].members[0]);
        let mut rates = self.rates.clone();
        rates.swap(0, first);
        contest.lab.shape_each(&rates)?;
        let path = match arguments.ends {
            Ends::Gateways => contest.lab.path_of_gateways_v4(),
            Ends::Hosts => contest.lab.path_v4(),
        };

        let mut rows = vec![Row::new(Contestant::OneTunnel, ON_ONE_TUNNEL, None)];
        for (flows, target) in &self.flows {
            if !arguments.without_ecmp {
                rows.push(Row::new(Contestant::Ecmp, *flows, None));
            }
            rows.push(Row::new(Contestant::Ecmpvpn, *flows, *target));
        }
        for run in 1..=self.runs {
            let mut one_tunnel = None;
            for row in &mut rows {
                interrupt::check()?;
                let (goodput, gained) = contest.with(row.contestant, || {
                    let before = Counters::read(&contest.lab, path)?;
                    let report = TcpLoad::timed(row.flows, arguments.seconds).run(path)?;
                    interrupt::sleep(PAUSE);
                    Ok((report.goodput(), Counters::read(&contest.lab, path)?.since(&before)))
                })?;
                let ratio = goodput / *one_tunnel.get_or_insert(goodput);
                let sample = Sample { goodput, ratio, gained };
                eprintln!("    {run}/{}: {}, {} flows: {sample}", self.runs, row.contestant.name(), row.flows);
                row.samples.push(sample);
            }
        }
        Ok(rows)
    }
}
