//! The tiers in which suites run. Each test states its own tiers (`tests/src/skip.rs`); nothing here decides where a
//! test runs.

use std::fmt;

use anyhow::{Context as _, Result, bail};

use crate::sh::{self, Cmd};
use crate::suites::Suite;
use crate::vm::kernel::Series;

/// The variable that tells a suite its tier.
const VARIABLE: &str = "ECMPVPN_TIER";

/// A place where tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// The running kernel.
    Here,
    /// Simulated time on the newest kernel.
    Simulated,
    /// Simulated time on a kernel that attaches programs by clsact.
    Clsact,
    /// Emulated machines with a distribution's kernel.
    Emulated,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Here => "on the running kernel",
            Self::Simulated => "in simulated time",
            Self::Clsact => "in simulated time with clsact",
            Self::Emulated => "in emulated machines",
        })
    }
}

impl Tier {
    const ALL: [Self; 4] = [Self::Here, Self::Simulated, Self::Clsact, Self::Emulated];

    /// The tier of simulated time on a kernel.
    pub const fn simulated(series: Series) -> Self {
        match series {
            Series::V6_12 => Self::Simulated,
            Series::V6_1 => Self::Clsact,
        }
    }

    /// The word that suites know. They refuse an unknown one.
    const fn word(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::Simulated => "simulated",
            Self::Clsact => "clsact",
            Self::Emulated => "emulated",
        }
    }

    /// A suite's variable, `KEY=VALUE`.
    pub fn env(self) -> String {
        format!("{VARIABLE}={}", self.word())
    }

    /// The suites that take long, the longest first. They only begin earlier; a suite without a name here comes last.
    const fn longest(self) -> &'static [&'static str] {
        match self {
            Self::Here => &["lifecycle", "failover", "namespaces", "host"],
            Self::Simulated | Self::Clsact => &["lifecycle", "namespaces", "failover", "ports", "host", "bond_hash"],
            Self::Emulated => &["host", "namespaces", "bpf", "bond_hash"],
        }
    }

    /// The place of a suite in the order of jobs.
    pub fn order(self, suite: &str) -> usize {
        let longest = self.longest();
        longest.iter().position(|name| *name == suite).unwrap_or(longest.len())
    }

    /// The suites that have a test in this tier, in the order of jobs. `filter`: the words for the suites. If no suite
    /// has one, a line says so.
    pub fn suites<'a>(self, suites: &'a [Suite], filter: &[String]) -> Result<Vec<&'a Suite>> {
        let mut found = Vec::new();
        for suite in suites {
            if self.has_tests(suite, filter)? {
                found.push(suite);
            }
        }
        if found.is_empty() {
            sh::note(format!("nothing runs {self}: no selected test belongs there"));
        }
        found.sort_by_key(|suite| self.order(&suite.name));
        Ok(found)
    }

    /// This tier, or another one that has the tests which `filter` names: a test that a user names must run.
    pub fn or_where_named(self, suite: &Suite, filter: &[String]) -> Result<Self> {
        for tier in std::iter::once(self).chain(Self::ALL) {
            if tier.has_tests(suite, filter)? {
                return Ok(tier);
            }
        }
        let words = filter.join(" ");
        bail!("{} has no test that `{words}` selects", suite.name)
    }

    /// Whether a suite has a test in this tier. The suite lists its tests on this host, without privilege.
    fn has_tests(self, suite: &Suite, filter: &[String]) -> Result<bool> {
        let words = filter.iter().filter(|word| *word != "--list");
        let list = Cmd::new(&suite.program).arg("--list").args(words).env(VARIABLE, self.word()).output();
        Ok(lists_a_test(&list.with_context(|| format!("listing the tests of {}", suite.name))?))
    }
}

/// Whether the output of `--list` has a test. Its lines are `NAME: test`.
fn lists_a_test(list: &str) -> bool {
    list.lines().any(|line| line.ends_with(": test"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// A suite with one test in each of `tiers`. It lists the test if its last argument is no filter, or its name.
    fn suite(dir: &Path, name: &str, tiers: &str) -> Suite {
        let program = dir.join(name);
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = --list ] || exit 1\ncase \"$2\" in ''|{name}) ;; *) exit 0;; esac\n\
             case $ECMPVPN_TIER in {tiers}) echo '{name}: test';; esac\n"
        );
        // Another process writes the program. A process that another test forks meanwhile would hold a file which this
        // one has open for writing, and the kernel does not start such a program.
        let text = dir.join(format!("{name}.sh"));
        fs::write(&text, script).unwrap();
        Cmd::new("install").args(["-m", "755"]).arg(&text).arg(&program).run().unwrap();
        Suite { name: name.to_owned(), program }
    }

    #[test]
    fn only_suites_with_tests_run_and_the_longest_first() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, tiers: &str| suite(dir.path(), name, tiers);
        let suites = [of("new", "here|clsact"), of("failover", "here"), of("lifecycle", "here|simulated")];
        let names = |tier: Tier, filter: &[String]| -> Vec<String> {
            tier.suites(&suites, filter).unwrap().into_iter().map(|suite| suite.name.clone()).collect()
        };
        assert_eq!(names(Tier::Here, &[]), ["lifecycle", "failover", "new"]);
        assert_eq!(names(Tier::Simulated, &[]), ["lifecycle"]);
        assert!(names(Tier::Emulated, &[]).is_empty());
        assert_eq!(names(Tier::Here, &["new".to_owned()]), ["new"]);
        assert!(names(Tier::Simulated, &["new".to_owned()]).is_empty());
    }

    #[test]
    fn a_named_test_runs_in_a_tier_that_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let suite = suite(dir.path(), "links", "simulated|clsact");
        assert_eq!(Tier::Clsact.or_where_named(&suite, &[]).unwrap(), Tier::Clsact);
        assert_eq!(Tier::Here.or_where_named(&suite, &["links".to_owned()]).unwrap(), Tier::Simulated);
        assert!(Tier::Here.or_where_named(&suite, &["nothing".to_owned()]).is_err());
    }

    #[test]
    fn a_list_without_tests_is_empty() {
        assert!(lists_a_test("userspace::fragments_cross: test\n"));
        assert!(!lists_a_test("") && !lists_a_test("Usage: ..."));
    }
}
