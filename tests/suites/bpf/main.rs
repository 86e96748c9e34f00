//! Tests the eBPF programs on the running kernel: with handwritten packets, with random packets, and everything about
//! attaching and pins.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod agree;
mod arrivals;
mod build;
mod cases;
mod explain;
mod lifecycle;
mod model;
mod mss;
mod order;
mod rig;

use lab::skip::{self, Feature, Tier, requires};
use lab::tests;

/// The verifier and the JIT of distributions' kernels, and clsact. The simulation has no JIT.
const TIERS: [Tier; 2] = [Tier::Here, Tier::Emulated];

type Test = (&'static str, fn() -> anyhow::Result<()>);

fn main() {
    let tests: [(&[Feature], &[Test]); 3] = [
        (
            &[],
            &tests![
                cases::cases_by_hand,
                cases::ingress_counts_what_arrived,
                agree::bpf_and_host_agree,
                explain::explained_is_where_it_goes,
                explain::a_made_up_quote_passes_no_rule,
                mss::connections_begin_with_segments_that_fit,
                order::sprayed_packets_are_stamped,
                order::made_up_marks_are_removed,
                order::stamped_packets_are_held_as_calculated,
                lifecycle::the_largest_table_fits,
                lifecycle::masked_logging_is_pruned,
            ],
        ),
        (&[Feature::Tun, Feature::Tcx], &tests![lifecycle::steers_by_tcx, arrivals::counts_arrivals_by_tcx]),
        (
            &[Feature::Tun],
            &tests![
                lifecycle::steers_by_clsact,
                lifecycle::a_failed_start_leaves_nothing,
                lifecycle::headers_in_pages_are_read,
                arrivals::counts_arrivals_by_clsact,
                arrivals::arrivals_agree_and_pass,
                lifecycle::bad_tables_are_refused,
            ],
        ),
    ];
    let mut trials = Vec::new();
    for (features, tests) in tests {
        trials.extend(tests.iter().map(|(name, test)| requires(&TIERS, features, name, *test)));
    }
    skip::run(trials);
}
