//! What the running kernel lacks, and tests that need it.

use std::fmt;
use std::fs::File;
use std::sync::OnceLock;

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use libtest_mimic::{Failed, Trial};

use crate::netns::Netns;

/// With this in the environment a missing feature fails a test instead of skipping it.
pub const REQUIRE: &str = "ECMPVPN_REQUIRE";

/// Something that a test may need of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Kernel WireGuard.
    WireGuard,
    /// Kernel bonding.
    Bonding,
    /// TUN devices.
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
    /// Why the running kernel seems not to have it; `None` if it has. Tried out once and remembered.
    pub fn missing(self) -> Option<&'static str> {
        static RESULTS: [OnceLock<Option<String>>; 4] = [const { OnceLock::new() }; 4];
        RESULTS[self as usize].get_or_init(|| self.probe().err().map(|e| format!("no {self} here: {e:#}"))).as_deref()
    }

    /// Tried out, never told from a version.
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

/// A test that needs `features`. Where one is missing it is ignored, and says why on standard error; with
/// `ECMPVPN_REQUIRE=1` in the environment it fails instead.
pub fn requires<F>(features: &[Feature], name: &str, test: F) -> Trial
where
    F: FnOnce() -> Result<(), Failed> + Send + 'static,
{
    let missing =
        features.iter().find_map(|feature| feature.probe().err().map(|e| format!("no {feature} here: {e:#}")));
    match missing {
        None => Trial::test(name, test),
        Some(why) if std::env::var_os(REQUIRE).is_some_and(|v| v == "1") => {
            Trial::test(name, move || Err(format!("{why} ({REQUIRE}=1 is set)").into()))
        }
        Some(why) => {
            eprintln!("skipped: {name}: {why}");
            Trial::test(name, || Ok(())).with_ignored_flag(true).with_kind("skipped")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_skipped_and_not_passed() {
        for feature in [Feature::WireGuard, Feature::Bonding, Feature::Tun, Feature::Tcx] {
            let trial = requires(&[feature], "probe", || Ok(()));
            let forced = std::env::var_os(REQUIRE).is_some_and(|v| v == "1");
            assert_eq!(trial.has_ignored_flag(), feature.missing().is_some() && !forced, "{feature}");
        }
    }
}
