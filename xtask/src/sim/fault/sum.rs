//! The results of many runs together.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

/// The sum of all runs.
#[derive(Default)]
pub struct Sum {
    kinds: BTreeMap<String, Kind>,
    runs: u64,
    broken: u64,
    failed: u64,
    seconds: f64,
    counts: BTreeMap<&'static str, u64>,
}

/// What one kind of fault has cost in all runs.
#[derive(Default)]
struct Kind {
    count: u64,
    interruptions: u64,
    worst: u64,
    bound: u64,
}

impl Sum {
    /// Adds a run: its exit status, if it has one, and its line for programs.
    pub fn add(&mut self, status: Option<i32>, json: Option<&Value>) {
        self.runs += 1;
        match status {
            Some(0) => {}
            Some(1) => self.broken += 1,
            _ => self.failed += 1,
        }
        if let Some(json) = json {
            self.absorb(json);
        }
    }

    /// Whether all invariants held in all runs.
    pub fn is_sound(&self) -> bool {
        self.broken + self.failed == 0
    }

    fn absorb(&mut self, json: &Value) {
        self.seconds += json["seconds"].as_f64().unwrap_or(0.0);
        for field in ["sent", "lost", "late", "overtaken", "frames", "in_the_clear"] {
            *self.counts.entry(field).or_default() += json[field].as_u64().unwrap_or(0);
        }
        for (name, fault) in json["faults"].as_object().into_iter().flatten() {
            let kind = self.kinds.entry(name.clone()).or_default();
            let of = |field: &str| fault[field].as_u64().unwrap_or(0);
            kind.count += of("count");
            kind.interruptions += of("interruptions");
            kind.worst = kind.worst.max(of("worst_ms"));
            kind.bound = kind.bound.max(of("bound_ms"));
        }
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:20} {:>6} {:>18} {:>15} {:>9}",
            "fault", "count", "flows interrupted", "worst recovery", "bound"
        )?;
        for (name, kind) in &self.kinds {
            let bound = if kind.bound == 0 { "none lost".to_owned() } else { format!("{} ms", kind.bound) };
            let worst = if kind.interruptions == 0 { "-".to_owned() } else { format!("{} ms", kind.worst) };
            writeln!(f, "{name:20} {:>6} {:>18} {worst:>15} {bound:>9}", kind.count, kind.interruptions)?;
        }
        let counts = self.counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ");
        writeln!(f, "\n{:.1} simulated minutes; {}", self.seconds / 60.0, counts.replace('_', " "))?;
        let sound = self.runs - self.broken - self.failed;
        write!(f, "{} seeds: {sound} without a broken invariant, {} with one", self.runs, self.broken)?;
        if self.failed > 0 { writeln!(f, ", {} could not be tried", self.failed) } else { writeln!(f) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_take_the_worst_of_all_runs() {
        let mut sum = Sum::default();
        for (status, worst) in [(0, 240), (1, 900), (2, 10)] {
            let json = serde_json::json!({
                "seconds": 60.0, "sent": 100,
                "faults": {"link cut": {"count": 2, "interruptions": 3, "worst_ms": worst, "bound_ms": 680}},
            });
            sum.add(Some(status), Some(&json));
        }
        let text = sum.to_string();
        assert!(text.contains("3 seeds: 1 without a broken invariant, 1 with one, 1 could not be tried"), "{text}");
        let row = text.lines().find(|line| line.starts_with("link cut")).unwrap();
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(words, ["link", "cut", "6", "9", "900", "ms", "680", "ms"]);
        assert!(text.contains("3.0 simulated minutes") && text.contains("sent 300"), "{text}");
    }
}
