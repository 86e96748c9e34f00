//! The data plane outlives the daemon. The daemon is killed, restarted, upgraded and reloaded under a stream of
//! numbered packets. `lab::sites` has the picture of the lab.
//!
//! With the userspace backend, the tunnels are in the process, so a stream cannot continue without it. There the tests
//! show that counters, addresses and the record of the host's former state outlive the process. With the kernel
//! backend, in the virtual machines, no packet is lost.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod change;
mod cycles;
mod deleted;
mod live;
mod named;
mod outlive;
mod rotate;
mod stage;

use anyhow::Result;
use lab::skip::{Feature, requires};
use libtest_mimic::{Arguments, Failed, Trial};

use stage::Kind;

type Test = fn(Kind) -> Result<()>;

fn main() {
    let each: [(&str, Test); 14] = [
        ("killed_and_started_again_nothing_is_forgotten", outlive::killed_and_started_again_nothing_is_forgotten),
        ("a_reload_adds_and_removes_tunnels", change::a_reload_adds_and_removes_tunnels),
        ("a_reload_that_cannot_be_changes_nothing", change::a_reload_that_cannot_be_changes_nothing),
        ("another_layout_is_left_running", outlive::another_layout_is_left_running),
        ("systemd_is_notified", outlive::systemd_is_notified),
        ("cycles_leave_nothing_behind", cycles::a_few_leave_nothing_behind),
        ("unconfirmed_everything_is_undone", outlive::unconfirmed_everything_is_undone),
        ("unconfirmed_and_killed_everything_is_undone", outlive::unconfirmed_and_killed_everything_is_undone),
        ("keys_are_renewed_without_a_lost_packet", rotate::keys_are_renewed_without_a_lost_packet),
        ("renewing_that_does_not_work_is_undone", rotate::what_does_not_work_is_undone),
        ("renewing_that_is_cut_off_goes_on", rotate::cut_off_it_goes_on),
        ("what_is_deleted_is_made_again", deleted::what_is_deleted_is_made_again),
        ("live_changes_stay_and_changed_values_are_taken", live::live_changes_stay_and_changed_values_are_taken),
        ("a_name_is_followed_to_where_the_site_is", named::a_name_is_followed_to_where_the_site_is),
    ];
    let kernel: [(&str, Test); 3] = [
        ("the_management_port_is_not_taken", change::the_management_port_is_not_taken),
        ("no_packet_is_lost_whatever_ends", outlive::no_packet_is_lost_whatever_ends),
        ("a_changed_configuration_is_taken_at_the_next_run", change::a_changed_configuration_is_taken_at_the_next_run),
    ];
    let mut trials = Vec::new();
    for kind in [Kind::Userspace, Kind::Kernel] {
        trials.extend(each.map(|(name, test)| trial(name, kind, test)));
    }
    trials.extend(kernel.map(|(name, test)| trial(name, Kind::Kernel, test)));
    for kind in [Kind::Userspace, Kind::Kernel] {
        // These run only if they are named, because they take long.
        let long: [(&str, Test); 2] = [
            ("cycles_five_hundred", cycles::many_leave_nothing_behind),
            ("unconfirmed_and_hung_everything_is_undone", outlive::unconfirmed_and_hung_everything_is_undone),
        ];
        trials.extend(long.map(|(name, test)| trial(name, kind, test).with_ignored_flag(true)));
    }
    let mut arguments = Arguments::from_args();
    // A stream may lose packets if it competes with another test for the processor.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: &str, kind: Kind, test: Test) -> Trial {
    let needs: &[Feature] = match kind {
        Kind::Userspace => &[Feature::Tun],
        Kind::Kernel => &[Feature::WireGuard, Feature::Bonding],
    };
    requires(needs, &format!("{}::{name}", kind.name()), move || {
        test(kind).map_err(|error| {
            for line in lab::log::lines(&[]).iter().rev().take(80).rev() {
                eprintln!("  {line}");
            }
            Failed::from(format!("{error:#}"))
        })
    })
}
