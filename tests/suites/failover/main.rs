//! Tunnels that go down and come up again, with both backends. Environment variables set the number of trials and the
//! length of a soak, so that `cargo xtask bench failover` and `soak` run the same tests in full.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod blackhole;
mod soak;
mod stage;
mod watch;

use anyhow::Result;
use lab::skip::requires;
use libtest_mimic::{Arguments, Failed, Trial};
use stage::Kind;

/// Number of tunnels between the sites.
type Test = fn(Kind) -> Result<()>;

fn main() {
    let tests: [(&str, Test); 5] = [
        ("a_blackholed_tunnel_is_left_and_taken_again", blackhole::a_blackholed_tunnel_is_left_and_taken_again),
        ("a_standstill_of_all_tunnels_kills_none", blackhole::a_standstill_of_all_tunnels_kills_none),
        ("tcp_survives_and_full_tunnels_do_not_die", blackhole::tcp_survives_and_full_tunnels_do_not_die),
        ("without_any_tunnel_traffic_is_refused", blackhole::without_any_tunnel_traffic_is_refused),
        ("a_restarted_tunnel_leaves_the_others_alone", watch::a_restarted_tunnel_leaves_the_others_alone),
    ];
    let mut trials = Vec::new();
    for kind in [Kind::Userspace, Kind::Kernel] {
        trials.extend(tests.map(|(name, test)| trial(name, kind, test)));
    }
    // Userspace tunnels stand still when this machine is busy, and are then rightly declared down.
    let soak = "full_and_lossy_links_are_no_false_alarm";
    trials.push(trial(soak, Kind::Kernel, soak::full_and_lossy_links_are_no_false_alarm));
    let mut arguments = Arguments::from_args();
    // The tests measure times, so they must not disturb each other.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: &str, kind: Kind, test: Test) -> Trial {
    requires(kind.needs(), &format!("{}::{name}", kind.name()), move || {
        test(kind).map_err(|error| {
            for line in lab::log::lines(&[]).iter().rev().take(40).rev() {
                eprintln!("  {line}");
            }
            Failed::from(format!("{error:#}"))
        })
    })
}
