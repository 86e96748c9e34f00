//! What carries the tunnels of a test: the userspace backend, or kernel WireGuard over a bond.

use libtest_mimic::Trial;

use crate::sites::{Options, Underlay};
use crate::skip::{Feature, Tier, requires};

/// The backend and the underlay of a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Userspace,
    Kernel,
}

impl Kind {
    pub const ALL: [Self; 2] = [Self::Userspace, Self::Kernel];

    /// The beginning of the names of its tests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::Kernel => "kernel_and_bond",
        }
    }

    pub const fn needs(self) -> &'static [Feature] {
        match self {
            Self::Userspace => &[Feature::Tun],
            Self::Kernel => &[Feature::WireGuard, Feature::Bonding],
        }
    }

    /// Where its tests can run. The userspace backend needs nothing of another kernel, so its tests run only on the
    /// running one.
    pub const fn tiers(self) -> &'static [Tier] {
        match self {
            Self::Userspace => &[Tier::Here],
            Self::Kernel => &Tier::ALL,
        }
    }

    /// A lab of this kind.
    pub fn options(self) -> Options {
        let (underlay, backend) = match self {
            Self::Userspace => (Underlay::Routed, "userspace"),
            Self::Kernel => (Underlay::Bonded, "kernel"),
        };
        Options { underlay, backend, ..Options::default() }
    }

    /// Makes a test of this kind, which runs in those of `tiers` that this kind has. `None` in another tier.
    pub fn trial(self, tiers: &[Tier], name: &str, test: fn(Self) -> anyhow::Result<()>) -> Option<Trial> {
        self.trial_with(tiers, &[], name, test)
    }

    /// As [`Kind::trial`], for a test that needs more features than this kind.
    pub fn trial_with(
        self,
        tiers: &[Tier],
        features: &[Feature],
        name: &str,
        test: fn(Self) -> anyhow::Result<()>,
    ) -> Option<Trial> {
        let tiers: Vec<Tier> = tiers.iter().copied().filter(|tier| self.tiers().contains(tier)).collect();
        let features = [self.needs(), features].concat();
        requires(&tiers, &features, &format!("{}::{name}", self.name()), move || test(self))
    }
}
