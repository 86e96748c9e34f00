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
mod rig;

use lab::skip::{self, Feature, requires};

type Test = fn() -> anyhow::Result<()>;

fn main() {
    let tests: [(&[Feature], &str, Test); 14] = [
        (&[], "cases_by_hand", cases::cases_by_hand),
        (&[], "ingress_counts_what_arrived", cases::ingress_counts_what_arrived),
        (&[], "bpf_and_host_agree", agree::bpf_and_host_agree),
        (&[], "explained_is_where_it_goes", explain::explained_is_where_it_goes),
        (&[], "the_largest_table_fits", lifecycle::the_largest_table_fits),
        (&[Feature::Tun, Feature::Tcx], "steers_by_tcx", lifecycle::steers_by_tcx),
        (&[Feature::Tun], "steers_by_clsact", lifecycle::steers_by_clsact),
        (&[Feature::Tun], "a_failed_start_leaves_nothing", lifecycle::a_failed_start_leaves_nothing),
        (&[Feature::Tun], "headers_in_pages_are_read", lifecycle::headers_in_pages_are_read),
        (&[Feature::Tun, Feature::Tcx], "counts_arrivals_by_tcx", arrivals::counts_arrivals_by_tcx),
        (&[Feature::Tun], "counts_arrivals_by_clsact", arrivals::counts_arrivals_by_clsact),
        (&[Feature::Tun], "arrivals_agree_and_pass", arrivals::arrivals_agree_and_pass),
        (&[], "masked_logging_is_pruned", lifecycle::masked_logging_is_pruned),
        (&[Feature::Tun], "bad_tables_are_refused", lifecycle::bad_tables_are_refused),
    ];
    skip::run(tests.into_iter().map(|(features, name, test)| requires(features, name, test)).collect());
}
