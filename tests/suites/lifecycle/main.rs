//! The data plane outlives the daemon. The daemon is killed, restarted, upgraded and reloaded under a stream of
//! numbered packets. `lab::sites` has the picture of the lab.
//!
//! With the userspace backend, the tunnels are in the process, so a stream cannot continue without it. There the tests
//! show that counters, addresses and the record of the host's former state outlive the process. With the kernel
//! backend, as in the simulation, no packet is lost.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod change;
mod clear;
mod confined;
mod cycles;
mod deleted;
mod firewall;
mod hidden;
mod hostile_names;
mod live;
mod named;
mod nobody;
mod outlive;
mod rotate;
mod stage;
mod wrong;

use anyhow::Result;
use lab::kind::Kind;
use lab::skip::{self, Tier};
use lab::tests;

/// Programs are replaced while packets pass, under tcx and under clsact.
const TIERS: [Tier; 3] = [Tier::Here, Tier::Simulated, Tier::Clsact];

type Test = (&'static str, fn(Kind) -> Result<()>);

fn main() {
    let each: &[Test] = &tests![
        outlive::killed_and_started_again_nothing_is_forgotten,
        change::a_reload_adds_and_removes_tunnels,
        change::a_reload_that_cannot_be_changes_nothing,
        change::a_reload_is_shown_and_tried,
        change::a_tried_reload_that_is_cut_off_is_taken_back,
        outlive::another_layout_is_left_running,
        cycles::cycles_leave_nothing_behind,
        outlive::unconfirmed_everything_is_undone,
        outlive::unconfirmed_and_killed_everything_is_undone,
        rotate::keys_are_renewed_without_a_lost_packet,
        rotate::renewing_that_does_not_work_is_undone,
        rotate::renewing_that_is_given_up_in_the_midst_leaves_both_ends_alike,
        rotate::renewing_that_is_cut_off_goes_on,
        deleted::what_is_deleted_is_made_again,
        clear::nothing_leaves_in_the_clear_when_routes_go,
        confined::run_keeps_few_privileges,
        live::a_reload_waits_for_the_lock_of_the_maps,
        live::live_changes_stay_and_changed_values_are_taken,
    ];
    let kernel: &[Test] = &tests![
        change::the_management_port_is_not_taken,
        outlive::no_packet_is_lost_whatever_ends,
        change::a_changed_configuration_is_taken_at_the_next_run,
    ];
    // What they show does not depend on how programs are attached, nor on the kernel's age.
    let anywhere: &[Test] = &tests![
        outlive::systemd_is_notified,
        outlive::systemd_hears_of_a_long_reload,
        confined::run_keeps_what_files_of_others_need,
        confined::run_keeps_what_a_mount_needs,
        nobody::another_user_stops_nothing,
        named::a_name_is_followed_to_where_the_site_is,
        hostile_names::hostile_answers_move_no_tunnel,
        hostile_names::a_silent_name_server_delays_no_failover,
        wrong::a_wrong_key_is_taken_back_at_the_first_tunnel,
        wrong::a_wrong_port_is_answered_or_taken_back,
        wrong::a_wrong_endpoint_is_answered_or_taken_back,
        wrong::two_reloads_at_once_change_the_keys_of_both,
        wrong::a_reload_reports_its_own_result,
        wrong::a_site_that_dies_before_a_reload_counts_as_dead,
        rotate::renewing_does_not_wait_for_a_run_that_has_ended,
        firewall::a_closed_firewall_is_named_until_it_lets_the_tunnels_pass,
    ];
    let userspace: &[Test] = &tests![hidden::a_site_whose_maps_are_hidden_is_not_called_unsteered];
    // On another kernel, the directory of all pins would be that of other tests too.
    let simulated: &[Test] = &tests![nobody::a_directory_in_the_pins_place_stops_nothing];
    // These run only if they are named, because they take long.
    let long: &[Test] = &tests![cycles::cycles_five_hundred, outlive::unconfirmed_and_hung_everything_is_undone];
    let mut trials = Vec::new();
    for (kind, tests) in [(Kind::Userspace, each), (Kind::Kernel, each), (Kind::Kernel, kernel)] {
        trials.extend(tests.iter().map(|(name, test)| kind.trial(&TIERS, name, *test)));
    }
    let more = [(Kind::Userspace, anywhere), (Kind::Kernel, anywhere), (Kind::Userspace, userspace)];
    for (kind, tests) in more {
        trials.extend(tests.iter().map(|(name, test)| kind.trial(&[Tier::Here, Tier::Simulated], name, *test)));
    }
    let alone = [Tier::Simulated, Tier::Clsact];
    trials.extend(simulated.iter().map(|(name, test)| Kind::Kernel.trial(&alone, name, *test)));
    for kind in Kind::ALL {
        let made = long.iter().filter_map(|(name, test)| kind.trial(&TIERS, name, *test));
        trials.extend(made.map(|trial| Some(trial.with_ignored_flag(true))));
    }
    skip::run(trials);
}
