//! Tunnels that go down and come up again, with both backends. Environment variables set the number of trials and the
//! length of a soak, so that `cargo xtask bench failover` and `soak` run the same tests in full.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod blackhole;
mod flood;
mod forged;
mod order;
mod replayed;
mod soak;
mod spoofed;
mod stage;
mod together;
mod watch;

use anyhow::Result;
use lab::kind::Kind;
use lab::skip::{self, Tier};
use lab::tests;

/// The tests assert times, which noise would hide: the emulated machines do not run them.
const TIERS: [Tier; 3] = [Tier::Here, Tier::Simulated, Tier::Clsact];

type Test = (&'static str, fn(Kind) -> Result<()>);

fn main() {
    let each: &[Test] = &tests![
        blackhole::a_blackholed_tunnel_is_left_and_taken_again,
        blackhole::a_standstill_of_all_tunnels_kills_none,
        blackhole::tcp_survives_and_full_tunnels_do_not_die,
        blackhole::without_any_tunnel_traffic_is_refused,
        watch::a_restarted_tunnel_leaves_the_others_alone,
    ];
    // What they show does not depend on how programs are attached, nor on the kernel's age.
    let anywhere: &[Test] = &tests![
        forged::forged_reports_take_no_tunnel_out_of_use,
        flood::floods_take_no_tunnel_out_of_use,
        replayed::recorded_messages_keep_no_dead_tunnel_in_use,
        spoofed::spoofed_sources_do_not_arrive,
    ];
    // Userspace tunnels stand still when this machine is busy, and are then rightly declared down.
    let kernel: &[Test] = &tests![soak::full_and_lossy_links_are_no_false_alarm];
    // Elsewhere, two processes do not begin at the same instant.
    let together: &[Test] = &tests![together::ends_that_start_together_connect_at_once];
    let simulated = [Tier::Simulated, Tier::Clsact];
    let ordered: &[Test] = &tests![
        order::a_sprayed_udp_flow_arrives_in_order,
        order::a_path_that_loses_packets_carries_less,
        order::the_device_that_holds_packets_follows_the_configuration,
    ];
    let mut trials = Vec::new();
    for (kind, tests) in [(Kind::Userspace, each), (Kind::Kernel, each), (Kind::Kernel, kernel)] {
        trials.extend(tests.iter().map(|(name, test)| kind.trial(&TIERS, name, *test)));
    }
    for kind in Kind::ALL {
        trials.extend(anywhere.iter().map(|(name, test)| kind.trial(&[Tier::Here, Tier::Simulated], name, *test)));
    }
    trials.extend(together.iter().map(|(name, test)| Kind::Kernel.trial(&simulated, name, *test)));
    trials.extend(ordered.iter().map(|(name, test)| Kind::Kernel.trial(&[Tier::Simulated], name, *test)));
    skip::run(trials);
}
