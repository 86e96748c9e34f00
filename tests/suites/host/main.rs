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
mod tunnels;

use ecmpvpn::plan::Backend;
use lab::skip::{self, Feature, requires};
use libtest_mimic::Trial;

type Test = fn(Backend) -> anyhow::Result<()>;

fn main() {
    let each_backend: [(&str, Test); 10] = [
        ("a_round_trip_leaves_no_trace", tunnels::a_round_trip_leaves_no_trace),
        ("a_dry_run_says_what_a_run_does_and_changes_nothing", tunnels::a_dry_run_changes_nothing),
        ("a_step_that_fails_undoes_the_earlier_ones", tunnels::a_step_that_fails_undoes_the_earlier_ones),
        ("another_process_undoes_what_a_crash_left", tunnels::another_process_undoes_what_a_crash_left),
        ("what_stands_in_the_way_is_named_and_left_alone", tunnels::what_stands_in_the_way_is_named),
        ("a_device_that_took_the_name_survives_the_undoing", tunnels::a_replaced_device_survives),
        ("forwarding_that_is_on_is_left_alone", tunnels::forwarding_that_is_on_is_left_alone),
        ("router_advertisements_survive_forwarding", tunnels::router_advertisements_survive_forwarding),
        ("the_bpf_file_system_comes_and_goes", tunnels::the_bpf_file_system_comes_and_goes),
        ("many_prefixes_fit", tunnels::many_prefixes_fit),
    ];
    let with_bond: [(&str, Test); 5] = [
        ("bond_round_trip_leaves_no_trace", bonded::a_round_trip_leaves_no_trace),
        ("bond_step_that_fails_undoes_the_earlier_ones", bonded::a_step_that_fails_undoes_the_earlier_ones),
        ("bond_of_somebody_else_is_reused_and_stays", bonded::a_bond_is_reused_and_stays),
        ("bond_that_differs_or_cannot_be_made_is_named", bonded::what_stands_in_the_way_is_named),
        ("bond_crash_is_undone_by_another_process", bonded::another_process_undoes_what_a_crash_left),
    ];
    let mut trials: Vec<Trial> = Vec::new();
    for (backend, feature, suffix) in
        [(Backend::Kernel, Feature::WireGuard, "kernel"), (Backend::Userspace, Feature::Tun, "userspace")]
    {
        let mut add = |features: &[Feature], name: &str, test: Test| {
            trials.push(requires(features, &format!("{name}::{suffix}"), move || test(backend)));
        };
        for (name, test) in each_backend {
            add(&[feature], name, test);
        }
        for (name, test) in with_bond {
            add(&[feature, Feature::Bonding], name, test);
        }
    }
    skip::run(trials);
}
