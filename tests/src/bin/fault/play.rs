//! One run: carries out the events of the schedule and checks the invariants all the time.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::act::Actor;
use crate::event::{Event, SITES};
use crate::exchange::{Broken, Exchange, Invariant};
use crate::judge::Verdict;
use crate::ledger::Outage;
use crate::report::{self, Tally};
use crate::schedule::Schedule;
use crate::stage::Stage;
use lab::clear;

/// Time between two checks of the invariants.
const LOOK: Duration = Duration::from_millis(200);
/// How many lines of each `run`'s output a broken invariant shows.
const SHOWN: usize = 25;

/// Describes an event in words.
pub fn describe(event: &Event) -> String {
    let lasts = if event.lasts.is_zero() { String::new() } else { format!(", for {}", seconds(event.lasts)) };
    format!("{} {}{lasts}", stamp(event.at), event.fault)
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

fn stamp(time: Duration) -> String {
    format!("{:10.3}", time.as_secs_f64())
}

fn interrupted(outage: &Outage) -> String {
    format!(
        "flow {} from {}: {} datagrams were lost, sent from {} {} {}",
        outage.flow,
        SITES[outage.sender],
        outage.lost,
        stamp(outage.from).trim_start(),
        if outage.goes_on { "on and at least until" } else { "until" },
        stamp(outage.to).trim_start(),
    )
}

/// Moves that were seen in the traffic, and moves that the programs counted, by site.
#[derive(Default)]
struct Moves {
    seen: [u64; 2],
    counted: [Vec<u64>; 2],
    sum: u64,
}

/// A run of a schedule.
struct Run<'a> {
    schedule: &'a Schedule,
    actor: Actor<'a>,
    tally: Tally,
    moves: Moves,
    begun: Vec<usize>,
    verbose: bool,
}

/// Plays a schedule. Returns whether all invariants held. `again` is the command line that repeats the run. With
/// `verbose`, prints every interruption.
pub fn play(schedule: &Schedule, program: &Path, again: &str, verbose: bool) -> Result<bool> {
    println!(
        "seed {}: {} tunnels, {} faults in {}",
        schedule.seed,
        schedule.tunnels,
        schedule.events.len(),
        seconds(schedule.length)
    );
    let mut stage = Stage::new(schedule, program)?;
    let traffic = stage.traffic()?;
    let (broken, tally, begun, moves) = {
        let actor = Actor::new(&mut stage, &traffic);
        let mut run =
            Run { schedule, actor, tally: Tally::default(), moves: Moves::default(), begun: Vec::new(), verbose };
        let broken = run.events()?;
        (broken, run.tally, run.begun, run.moves.sum)
    };
    let at = traffic.now();
    let (by_bond, in_the_clear) = {
        let known = traffic.state();
        (known.by_bond, known.in_the_clear)
    };
    let counts = traffic.stop()?;
    let mut broken = broken;
    if broken.is_none() {
        broken = restored(schedule, &mut stage, at)?;
    }
    println!("\n{}", tally.table());
    println!("{}", report::traffic(&counts, moves, by_bond));
    let frames = clear::frames(stage.lab.wires()?.namespace())?;
    println!("frames on the wires: {frames}, in the clear: {in_the_clear}");
    if let Some(broken) = &broken {
        println!("\nbroken invariant: {}, at {}", broken.invariant.name(), stamp(broken.at).trim_start());
        println!("  {}", broken.description.trim_end().replace('\n', "\n  "));
        match begun.last() {
            Some(event) => println!("the event before it:\n  {}", describe(&schedule.events[*event])),
            None => println!("there was no event before it"),
        }
        println!("{}", stage.underlay());
        println!("{}", stage.outputs(SHOWN));
        println!("seed {}: broken invariant: {}; again: {again}", schedule.seed, broken.invariant.name());
    } else {
        println!("seed {}: no broken invariant", schedule.seed);
    }
    let sum = |field: fn(&crate::ledger::Counts) -> u64| counts.iter().map(field).sum::<u64>();
    println!(
        "@json {}",
        json!({
            "seed": schedule.seed, "seconds": at.as_secs_f64(), "faults": tally.json(), "sent": sum(|c| c.sent),
            "lost": sum(crate::ledger::Counts::lost), "late": sum(|c| c.late), "overtaken": sum(|c| c.overtaken),
            "moves": moves, "frames": frames, "in_the_clear": in_the_clear,
            "broken": broken.as_ref().map(|broken| broken.invariant.name()),
        })
    );
    Ok(broken.is_none())
}

/// Takes both sites down. Returns what is not as it was before.
fn restored(schedule: &Schedule, stage: &mut Stage, at: Duration) -> Result<Option<Broken>> {
    let broken = |description: String| Broken { at, invariant: Invariant::Restored, description };
    for (site, killed) in schedule.ends_killed.into_iter().enumerate() {
        println!("{} {} is taken down{}", stamp(at), SITES[site], if killed { " after SIGKILL" } else { "" });
        let mut wrong = stage.take_down(site, killed)?;
        if wrong.is_none() {
            wrong = stage.left_at(site)?;
        }
        if let Some(wrong) = wrong {
            return Ok(Some(broken(format!("{}: {wrong}", SITES[site]))));
        }
    }
    Ok(stage.left_behind()?.map(broken))
}

impl Run<'_> {
    /// Carries out the events up to the end of the schedule, or until an invariant is broken.
    fn events(&mut self) -> Result<Option<Broken>> {
        self.moves.begin(self.actor.traffic)?;
        let mut turns: Vec<(Duration, bool, usize)> = Vec::new();
        for (number, event) in self.schedule.events.iter().enumerate() {
            turns.push((event.at, true, number));
            turns.push((event.end(), false, number));
        }
        // An event without a length begins before it ends.
        turns.sort_by_key(|(at, begins, number)| (*at, !begins, *number));
        for (at, begins, number) in turns {
            if let Some(broken) = self.wait_until(at)? {
                return Ok(Some(broken));
            }
            let event = &self.schedule.events[number];
            if let Some(broken) = self.count_moves()? {
                return Ok(Some(broken));
            }
            if begins {
                println!(
                    "{} {}",
                    stamp(self.now()),
                    describe(event).trim_start().split_once(' ').map_or("", |(_, description)| description)
                );
                self.begun.push(number);
                self.tally.on_begin(event);
                if let Some(broken) = self.actor.begin(number, event)? {
                    return Ok(Some(broken));
                }
            } else {
                if !event.lasts.is_zero() {
                    println!("{} over: {}", stamp(self.now()), event.fault);
                }
                self.actor.end(number, event)?;
            }
        }
        if let Some(broken) = self.wait_until(self.schedule.length)? {
            return Ok(Some(broken));
        }
        self.count_moves()
    }

    fn now(&self) -> Duration {
        self.actor.traffic.now()
    }

    /// Waits until `at`, checks the invariants meanwhile, and prints what happens.
    fn wait_until(&mut self, at: Duration) -> Result<Option<Broken>> {
        loop {
            if let Some(broken) = self.look() {
                return Ok(Some(broken));
            }
            match self.actor.attend() {
                // New maps count from zero.
                Ok(up) => up.iter().filter(|(_, again)| *again).for_each(|(site, _)| self.moves.counted[*site].clear()),
                Err(broken) => return Ok(Some(broken)),
            }
            let Some(left) = at.checked_sub(self.now()).filter(|left| !left.is_zero()) else { return Ok(None) };
            thread::sleep(left.min(LOOK));
        }
    }

    /// Checks the invariants. Returns one that is broken.
    fn look(&mut self) -> Option<Broken> {
        let now = self.now();
        let mut state = self.actor.traffic.state();
        for (at, site, live) in std::mem::take(&mut state.lives) {
            let names: Vec<String> =
                (0..32).filter(|slot| live >> slot & 1 == 1).map(|slot| slot.to_string()).collect();
            println!("{}   {} uses tunnels {}", stamp(at), SITES[site], names.join(" "));
        }
        let outages: Vec<Outage> = state.ledgers.iter_mut().flat_map(|ledger| ledger.judge(now)).collect();
        let broken = std::mem::take(&mut state.broken).into_iter().next();
        drop(state);
        if broken.is_some() {
            return broken;
        }
        for outage in outages {
            if self.verbose && !outage.goes_on {
                println!("{}   {}", stamp(now), interrupted(&outage));
            }
            match self.actor.explanations.judge(&outage) {
                Verdict::Within { event, recovery } if !outage.goes_on => {
                    self.tally.recovered(&self.schedule.events[event], recovery);
                }
                Verdict::Within { .. } => {}
                Verdict::Beyond { event, by } => return Some(self.too_long(&outage, event, by)),
            }
        }
        self.actor.explanations.forget(now.saturating_sub(Duration::from_secs(60)));
        None
    }

    fn too_long(&self, outage: &Outage, event: Option<usize>, by: Duration) -> Broken {
        let cause = event.map_or("no fault explains it".to_owned(), |event| {
            format!(
                "{} beyond what is allowed after: {}",
                seconds(by),
                describe(&self.schedule.events[event]).trim_start()
            )
        });
        Broken {
            at: self.now(),
            invariant: Invariant::Recovery,
            description: format!("{}; {cause}", interrupted(outage)),
        }
    }

    /// Checks that the programs have counted every move that was seen.
    fn count_moves(&mut self) -> Result<Option<Broken>> {
        self.moves.check(self.actor.traffic)
    }
}

impl Moves {
    fn check(&mut self, traffic: &Exchange) -> Result<Option<Broken>> {
        let state = traffic.state();
        for (site, name) in SITES.iter().enumerate() {
            let Some(counted) = state.counted_moves(site)? else { continue };
            let seen = state.ledgers[site].counts().moves;
            let before = &self.counted[site];
            let grown =
                |(slot, now): (usize, &u64)| now - before.get(slot).filter(|before| *before <= now).unwrap_or(&0);
            let grown: u64 = counted.iter().enumerate().map(grown).sum();
            let moved = seen - self.seen[site];
            self.seen[site] = seen;
            self.counted[site] = counted;
            self.sum += grown;
            if moved > grown {
                let description =
                    format!("flows from {name} moved {moved} times to another tunnel, and {grown} moves were counted");
                return Ok(Some(Broken { at: traffic.now(), invariant: Invariant::Order, description }));
            }
        }
        Ok(None)
    }

    /// Takes the counters as they are now as the base.
    fn begin(&mut self, traffic: &Exchange) -> Result<()> {
        let state = traffic.state();
        for site in 0..2 {
            if let Some(counted) = state.counted_moves(site)? {
                self.counted[site] = counted;
            }
            self.seen[site] = state.ledgers[site].counts().moves;
        }
        Ok(())
    }
}
