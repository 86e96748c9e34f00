//! `packaging/ecmpvpn.service` under systemd itself. `machine.rs` says how systemd runs here.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod exposure;
mod machine;
mod stage;
mod unit;

use anyhow::Result;
use lab::kind::Kind;
use lab::skip::{self, Feature, Tier, requires};
use lab::tests;

/// `lifecycle` shows what differs on other kernels.
const TIERS: [Tier; 2] = [Tier::Here, Tier::Simulated];

type Test = (&'static str, fn(Kind) -> Result<()>);

fn main() {
    let each: &[Test] = &tests![
        unit::the_unit_starts_reloads_and_stops,
        unit::a_hung_process_is_replaced,
        unit::a_wrong_configuration_is_not_tried_again,
        unit::the_process_is_confined,
        unit::keys_are_renewed,
        unit::a_system_that_ends_leaves_nothing,
    ];
    let kernel: &[Test] = &tests![unit::a_restart_loses_no_packet];
    let mut trials = Vec::new();
    for (kind, tests) in [(Kind::Userspace, each), (Kind::Kernel, each), (Kind::Kernel, kernel)] {
        trials.extend(tests.iter().map(|(name, test)| kind.trial_with(&TIERS, &[Feature::Systemd], name, *test)));
    }
    // It looks at the file only.
    trials.push(requires(&[Tier::Here], &[], "the_unit_is_little_exposed", exposure::the_unit_is_little_exposed));
    skip::run(trials);
}
