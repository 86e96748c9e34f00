//! Which of the points are tried.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// `all`, or numbers.
const POINTS: &str = "ECMPVPN_CRASH";
const SEED: &str = "ECMPVPN_CRASH_SEED";
/// The seed of an ordinary run, which must end the same each time.
const FIRST_SEED: usize = 1;
/// How long an ordinary run tries points of one operation, and how many it tries at least.
const BUDGET: Duration = Duration::from_secs(6);
const AT_LEAST: usize = 2;

/// The points of one operation that are tried.
pub struct Choice {
    numbers: Vec<usize>,
    until: Option<Instant>,
    tried: usize,
}

impl Choice {
    /// Chooses among the points 1 to `count`.
    pub fn among(count: usize) -> Result<Self> {
        match std::env::var(POINTS).ok().as_deref() {
            Some("all") => return Ok(Self { numbers: (1..=count).collect(), until: None, tried: 0 }),
            Some(list) => {
                let numbers: Result<Vec<usize>, _> = list.split(',').map(str::parse).collect();
                return Ok(Self { numbers: numbers.context(POINTS)?, until: None, tried: 0 });
            }
            None => {}
        }
        let seed = std::env::var(SEED).map_or(Ok(FIRST_SEED), |text| text.parse()).context(SEED)?;
        eprintln!("  {count} points; {SEED}={seed}, {POINTS}=all tries all of them");
        Ok(Self { numbers: scattered(count, seed), until: Some(Instant::now() + BUDGET), tried: 0 })
    }

    pub fn is_all(&self) -> bool {
        self.until.is_none()
    }
}

impl Iterator for Choice {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let is_over = self.tried >= AT_LEAST && self.until.is_some_and(|until| Instant::now() >= until);
        if is_over || self.numbers.is_empty() {
            return None;
        }
        self.tried += 1;
        Some(self.numbers.remove(0))
    }
}

/// The numbers 1 to `count`, such that each beginning of the list is spread over all of them.
fn scattered(count: usize, seed: usize) -> Vec<usize> {
    // Steps of the golden ratio.
    let step = (1..=count).rev().find(|step| *step * 1_000 <= count * 618 && gcd(*step, count) == 1).unwrap_or(1);
    (0..count).map(|at| (seed + at * step) % count + 1).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
