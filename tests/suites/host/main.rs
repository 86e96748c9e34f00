//! Brings a host up and restores it. Whatever happens, the dump afterwards must equal the dump from before.
//!
//! ```text
//! ns (the host)                                       ns far
//! up0 10.2.3.4/24, fd00:2::4/64 ----- veth ----- f0
//!
//! with bonding:
//! m0, m1, m2 (with addresses, routes…) -- veth -- f0, f1, f2 in a bond
//! ```
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod bonded;
mod fixture;
mod shared;
mod tunnels;

use ecmpvpn::plan::Backend;
use lab::skip::{self, Feature, Tier, requires};
use lab::tests;

type Test = (&'static str, fn(Backend) -> anyhow::Result<()>);

/// A distribution's kernel has what the simulation's kernel lacks: modules, and other defaults.
const KERNEL: [Tier; 3] = [Tier::Here, Tier::Simulated, Tier::Emulated];
const USERSPACE: [Tier; 1] = [Tier::Here];
/// Those that bring a site up dozens of times, which takes minutes in an emulated machine, and those for which another
/// kernel makes no difference.
const KERNEL_BUT_NOT_EMULATED: [Tier; 2] = [Tier::Here, Tier::Simulated];

fn main() {
    let each_backend: &[Test] = &tests![
        tunnels::a_round_trip_leaves_no_trace,
        tunnels::a_dry_run_says_what_a_run_does_and_changes_nothing,
        tunnels::a_step_that_fails_undoes_the_earlier_ones,
        tunnels::another_process_undoes_what_a_crash_left,
        tunnels::what_stands_in_the_way_is_named_and_left_alone,
        tunnels::tunnels_whose_packets_would_be_fragmented_are_refused,
        tunnels::a_device_that_took_the_name_survives_the_undoing,
        tunnels::forwarding_that_is_on_is_left_alone,
        tunnels::router_advertisements_survive_forwarding,
        tunnels::the_bpf_file_system_comes_and_goes,
        tunnels::many_prefixes_fit,
    ];
    let not_emulated: &[Test] = &tests![
        tunnels::an_undo_that_fails_is_tried_again,
        shared::sessions_on_any_port_and_table_are_protected,
        shared::two_sites_share_forwarding,
    ];
    let with_bond: &[Test] = &tests![
        bonded::bond_round_trip_leaves_no_trace,
        bonded::bond_step_that_fails_undoes_the_earlier_ones,
        bonded::bond_of_somebody_else_is_reused_and_stays,
        bonded::bond_that_differs_or_cannot_be_made_is_named,
        bonded::bond_crash_is_undone_by_another_process,
    ];
    let not_emulated_with_bond: &[Test] = &tests![bonded::bond_undo_that_fails_is_tried_again];
    let backends: [(Backend, [&[Tier]; 2], Feature, &str); 2] = [
        (Backend::Kernel, [&KERNEL, &KERNEL_BUT_NOT_EMULATED], Feature::WireGuard, "kernel"),
        (Backend::Userspace, [&USERSPACE; 2], Feature::Tun, "userspace"),
    ];
    let mut trials = Vec::new();
    for (backend, [all, few], feature, suffix) in backends {
        let (alone, bonded) = ([feature], [feature, Feature::Bonding]);
        for (tiers, features, tests) in [
            (all, &alone[..], each_backend),
            (all, &bonded, with_bond),
            (few, &alone, not_emulated),
            (few, &bonded, not_emulated_with_bond),
        ] {
            trials.extend(tests.iter().map(|(name, test)| {
                let test = *test;
                requires(tiers, features, &format!("{name}::{suffix}"), move || test(backend))
            }));
        }
    }
    skip::run(trials);
}
