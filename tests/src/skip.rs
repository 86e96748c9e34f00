//! Finds out what the running kernel lacks, and skips the tests that need it.

use std::fmt;
use std::fs::File;
use std::sync::OnceLock;

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use libtest_mimic::{Arguments, Failed, Trial};

use crate::log;
use crate::netns::Netns;

/// Environment variable that names the features which must be there, as in `wireguard,bonding`. A test that lacks one
/// of them fails instead of being skipped. `1` names all features.
pub const REQUIRE: &str = "ECMPVPN_REQUIRE";

/// A feature that a test may need from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    WireGuard,
    Bonding,
    Tun,
    /// TC programs attached as BPF links (Linux 6.6 and later).
    Tcx,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WireGuard => "kernel WireGuard",
            Self::Bonding => "kernel bonding",
            Self::Tun => "TUN devices",
            Self::Tcx => "tcx",
        })
    }
}

impl Feature {
    /// The name of the feature in [`REQUIRE`].
    const fn word(self) -> &'static str {
        match self {
            Self::WireGuard => "wireguard",
            Self::Bonding => "bonding",
            Self::Tun => "tun",
            Self::Tcx => "tcx",
        }
    }

    /// Whether [`REQUIRE`] names the feature.
    fn is_required(self) -> bool {
        let required = std::env::var(REQUIRE).unwrap_or_default();
        required == "1" || required.split(',').any(|word| word == self.word())
    }

    /// Why the running kernel seems to lack the feature. `None` if the kernel has it. Probed once and remembered.
    pub fn missing(self) -> Option<&'static str> {
        static RESULTS: [OnceLock<Option<String>>; 4] = [const { OnceLock::new() }; 4];
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
        }
    }
}

/// An error that a test can fail with.
pub trait Failure {
    /// The message that the test harness prints.
    fn into_failed(self) -> Failed;
}

impl Failure for anyhow::Error {
    /// Gives the whole chain of causes. `Failed` by itself would give only the outermost error. Also prints what the
    /// labs did last.
    fn into_failed(self) -> Failed {
        for line in log::last(LOG_LINES) {
            eprintln!("  {line}");
        }
        format!("{self:#}").into()
    }
}

impl Failure for Failed {
    fn into_failed(self) -> Failed {
        self
    }
}

/// How many lines of the labs' log a failure shows.
const LOG_LINES: usize = 80;

/// Makes a test that needs `features`. If one is missing, the test is ignored and says why on standard error. If the
/// environment requires that feature ([`REQUIRE`]), the test fails instead.
pub fn requires<F, E>(features: &[Feature], name: &str, test: F) -> Trial
where
    F: FnOnce() -> Result<(), E> + Send + 'static,
    E: Failure,
{
    let missing = features.iter().find_map(|feature| Some((feature, feature.missing()?)));
    match missing {
        None => Trial::test(name, || test().map_err(Failure::into_failed)),
        Some((feature, why)) if feature.is_required() => {
            Trial::test(name, move || Err(format!("{why} ({REQUIRE} demands it)").into()))
        }
        Some((_, why)) => {
            eprintln!("skipped: {name}: {why}");
            Trial::test(name, || Ok(())).with_ignored_flag(true).with_kind("skipped")
        }
    }
}

/// Environment variable that is set when a suite runs in an emulated machine, where everything takes ten times as long.
pub const EMULATED: &str = "ECMPVPN_EMULATED";

/// Makes an emulated machine skip this test. It takes minutes there, and the simulation runs it.
#[must_use]
pub fn not_emulated(trial: Trial) -> Trial {
    let is_spared = std::env::var_os(EMULATED).is_some();
    if is_spared {
        eprintln!("skipped: {}: the simulation runs it", trial.name());
    }
    let ignored = is_spared || trial.has_ignored_flag();
    trial.with_ignored_flag(ignored)
}

/// Runs a suite as its command line says, and ends the process. By default the tests run one after another.
///
/// Tests do not run in parallel, because a program that one test starts holds a duplicate of every descriptor from its
/// fork to its exec. If another test closes a descriptor in that time, the address is still in use, the lock is still
/// held and the device still exists. On a slow machine this lasts long enough to make tests fail.
pub fn run(trials: Vec<Trial>) -> ! {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(1));
    libtest_mimic::run(&arguments, trials).exit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_skipped_and_not_passed() {
        for feature in [Feature::WireGuard, Feature::Bonding, Feature::Tun, Feature::Tcx] {
            let trial = requires(&[feature], "probe", || anyhow::Ok(()));
            assert_eq!(trial.has_ignored_flag(), feature.missing().is_some() && !feature.is_required(), "{feature}");
        }
    }

    #[test]
    fn a_failure_shows_its_causes() {
        let error = anyhow::anyhow!("address in use").context("binding 10.2.3.4:5000");
        assert_eq!(error.into_failed().message(), Some("binding 10.2.3.4:5000: address in use"));
    }
}
