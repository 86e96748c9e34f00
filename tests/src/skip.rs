//! Where each test runs: the tiers that it states, and the features that it needs from the kernel. A test is left out
//! of the other tiers. It is skipped, loudly, where a feature is missing.

use std::fmt;
use std::fs::{self, File};
use std::sync::OnceLock;

use anyhow::{Context as _, ensure};
use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use libtest_mimic::{Arguments, Failed, Trial};

use crate::cgroup::Cgroup;
use crate::log;
use crate::netns::Netns;

/// Environment variable that names the tier in which this process runs. `xtask/src/tier.rs` sets it.
pub const TIER: &str = "ECMPVPN_TIER";

/// A place where tests run. `docs/laboratories.md` says what each can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// The running kernel.
    Here,
    /// Simulated time on Linux 6.12.
    Simulated,
    /// Simulated time on Linux 6.1, where programs are attached by clsact.
    Clsact,
    /// Emulated machines with a distribution's kernel.
    Emulated,
}

impl Tier {
    pub const ALL: [Self; 4] = [Self::Here, Self::Simulated, Self::Clsact, Self::Emulated];

    /// The name of the tier in [`TIER`].
    const fn word(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::Simulated => "simulated",
            Self::Clsact => "clsact",
            Self::Emulated => "emulated",
        }
    }

    /// The tier that `word` names.
    fn named(word: &str) -> anyhow::Result<Self> {
        let words = Self::ALL.map(Self::word);
        let found = Self::ALL.into_iter().find(|tier| tier.word() == word);
        found.with_context(|| format!("{TIER}={word}: there is no such tier, use one of {}", words.join(", ")))
    }

    /// The tier in which this process runs. A wrong name ends the process: the wrong tests would run, and pass.
    fn current() -> Self {
        let Some(word) = std::env::var_os(TIER) else { return Self::Here };
        Self::named(&word.to_string_lossy()).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            std::process::exit(2)
        })
    }
}

/// Environment variable that names the features which must be there, as in `wireguard,bonding`. A test that lacks one
/// of them fails instead of being skipped. `1` names all features.
pub const REQUIRE: &str = "ECMPVPN_REQUIRE";

/// systemd's manager, from the package `systemd`.
pub const SYSTEMD: &str = "/lib/systemd/systemd";

/// A feature that a test may need from the kernel or the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    WireGuard,
    Bonding,
    Tun,
    /// TC programs attached as BPF links (Linux 6.6 and later).
    Tcx,
    /// What systemd needs as PID 1 of namespaces: its program, pid namespaces, and a cgroup2 hierarchy to write to.
    Systemd,
    /// The user is root.
    Root,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WireGuard => "kernel WireGuard",
            Self::Bonding => "kernel bonding",
            Self::Tun => "TUN devices",
            Self::Tcx => "tcx",
            Self::Systemd => "systemd in namespaces",
            Self::Root => "root privilege",
        })
    }
}

impl Feature {
    #[cfg(test)]
    const ALL: [Self; 6] = [Self::WireGuard, Self::Bonding, Self::Tun, Self::Tcx, Self::Systemd, Self::Root];

    /// The name of the feature in [`REQUIRE`].
    const fn word(self) -> &'static str {
        match self {
            Self::WireGuard => "wireguard",
            Self::Bonding => "bonding",
            Self::Tun => "tun",
            Self::Tcx => "tcx",
            Self::Systemd => "systemd",
            Self::Root => "root",
        }
    }

    /// Whether [`REQUIRE`] names the feature.
    fn is_required(self) -> bool {
        let required = std::env::var(REQUIRE).unwrap_or_default();
        required == "1" || required.split(',').any(|word| word == self.word())
    }

    /// Why the running kernel seems to lack the feature. `None` if the kernel has it. Probed once and remembered.
    pub fn missing(self) -> Option<&'static str> {
        static RESULTS: [OnceLock<Option<String>>; 6] = [const { OnceLock::new() }; 6];
        RESULTS[self as usize].get_or_init(|| self.probe().err().map(|e| format!("no {self} here: {e:#}"))).as_deref()
    }

    /// Tries the feature. A kernel version says nothing reliable.
    fn probe(self) -> anyhow::Result<()> {
        match self {
            Self::WireGuard => Netns::new("probe")?.ip("link add probe0 type wireguard").map(drop),
            Self::Bonding => Netns::new("probe")?.ip("link add probe0 type bond").map(drop),
            Self::Tun => Ok(File::open("/dev/net/tun").map(drop)?),
            Self::Tcx => {
                let query = || SchedClassifier::query_tcx("lo", TcAttachType::Ingress).map(drop);
                Ok(Netns::new("probe")?.run(query)?)
            }
            Self::Systemd => {
                for file in [SYSTEMD, "/proc/self/ns/pid", "/proc/self/ns/cgroup"] {
                    fs::metadata(file).with_context(|| format!("looking for {file}"))?;
                }
                Cgroup::new("probe").map(drop)
            }
            Self::Root => {
                let user = rustix::process::geteuid();
                ensure!(user.is_root(), "the user's id is {user}");
                Ok(())
            }
        }
    }
}

/// How many lines of the labs' log a failure shows.
const LOG_LINES: usize = 80;

/// What the test harness prints: the whole chain of causes. `Failed` by itself would give only the outermost error.
/// Also prints what the labs did last.
fn failed(error: &anyhow::Error) -> Failed {
    for line in log::last(LOG_LINES) {
        eprintln!("  {line}");
    }
    format!("{error:#}").into()
}

/// Whether this process only lists its tests. Then nothing is probed, so the list needs no privilege.
fn is_listing() -> bool {
    std::env::args_os().any(|word| word == "--list")
}

/// Makes a test that runs in `tiers` and needs `features`. `None` in another tier. If a feature is missing, the test is
/// ignored and says why on standard error. If the environment requires that feature ([`REQUIRE`]), the test fails
/// instead.
pub fn requires(
    tiers: &[Tier],
    features: &[Feature],
    name: &str,
    test: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Option<Trial> {
    if !tiers.contains(&Tier::current()) {
        return None;
    }
    let probed = if is_listing() { &[] } else { features };
    let missing = probed.iter().find_map(|feature| Some((feature, feature.missing()?)));
    Some(match missing {
        None => Trial::test(name, || test().map_err(|error| failed(&error))),
        Some((feature, why)) if feature.is_required() => {
            Trial::test(name, move || Err(format!("{why} ({REQUIRE} demands it)").into()))
        }
        Some((_, why)) => {
            eprintln!("skipped: {name}: {why}");
            Trial::test(name, || Ok(())).with_ignored_flag(true).with_kind("skipped")
        }
    })
}

/// Tests with their names: `tests![module::function, ...]` is an array of `("function", module::function)`.
#[macro_export]
macro_rules! tests {
    ($($($word:ident)::+),+ $(,)?) => {
        [$(($crate::skip::function_name(stringify!($($word)::+)), $($word)::+)),+]
    };
}

/// The last word of a function's path.
pub fn function_name(path: &'static str) -> &'static str {
    path.rsplit("::").next().unwrap_or(path).trim()
}

/// Runs the tests of a suite in this tier as its command line says, and ends the process. By default the tests run one
/// after another.
///
/// Tests do not run in parallel, because a program that one test starts holds a duplicate of every descriptor from its
/// fork to its exec. If another test closes a descriptor in that time, the address is still in use, the lock is still
/// held and the device still exists. On a slow machine this lasts long enough to make tests fail.
pub fn run(trials: impl IntoIterator<Item = Option<Trial>>) -> ! {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(1));
    libtest_mimic::run(&arguments, trials.into_iter().flatten().collect()).exit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_skipped_and_not_passed() {
        for feature in Feature::ALL {
            let trial = requires(&Tier::ALL, &[feature], "probe", || Ok(())).unwrap();
            assert_eq!(trial.has_ignored_flag(), feature.missing().is_some() && !feature.is_required(), "{feature}");
        }
    }

    #[test]
    fn a_test_is_left_out_of_other_tiers() {
        let others = Tier::ALL.into_iter().filter(|tier| *tier != Tier::current()).collect::<Vec<_>>();
        assert!(requires(&others, &[], "elsewhere", || Ok(())).is_none());
        assert!(requires(&[Tier::current()], &[], "here", || Ok(())).is_some());
    }

    #[test]
    fn a_tier_has_one_word_and_a_wrong_word_is_refused() {
        for tier in Tier::ALL {
            assert_eq!(Tier::named(tier.word()).unwrap(), tier);
        }
        let error = Tier::named("Here").unwrap_err().to_string();
        assert_eq!(error, "ECMPVPN_TIER=Here: there is no such tier, use one of here, simulated, clsact, emulated");
    }

    #[test]
    fn a_test_is_named_after_its_function() {
        type Test = (&'static str, fn() -> usize);
        let named: [Test; 2] = tests![self::module::inner, outer];
        assert_eq!(named.map(|(name, run)| (name, run())), [("inner", 1), ("outer", 2)]);
    }

    mod module {
        pub fn inner() -> usize {
            1
        }
    }

    fn outer() -> usize {
        2
    }

    #[test]
    fn a_failure_shows_its_causes() {
        let error = anyhow::anyhow!("address in use").context("binding 10.2.3.4:5000");
        assert_eq!(failed(&error).message(), Some("binding 10.2.3.4:5000: address in use"));
    }
}
