//! The program is killed at each of its fault points (`ecmpvpn/src/fault.rs`): before and after every change of the
//! host, of the maps and of a file. Then `down` must give the host as it was before, and `run` must give the site of the
//! configuration. Also: what happens when files cannot be written. `lab::sites` has the picture of the lab.
//!
//! An ordinary run tries some of the points, from a seed that it prints. `ECMPVPN_CRASH=all` tries all of them, and
//! `ECMPVPN_CRASH=17,18` those that are named. `ECMPVPN_CRASH_SEED` repeats a choice.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod choice;
mod commands;
mod full;
mod operations;
mod rig;
mod rotate;

use anyhow::Result;
use lab::kind::Kind;
use lab::skip::{self, Tier};
use lab::tests;

const TIERS: [Tier; 2] = [Tier::Here, Tier::Simulated];
/// For what is attached to bond members in another way where the kernel has no tcx.
const TIERS_WITH_CLSACT: [Tier; 3] = [Tier::Here, Tier::Simulated, Tier::Clsact];

type Test = (&'static str, fn(Kind) -> Result<()>);
type Alone = (&'static str, fn() -> Result<()>);

fn main() {
    let attaching: &[Test] = &tests![operations::killed_while_it_comes_up];
    let each: &[Test] = &tests![
        operations::killed_while_it_adopts,
        operations::killed_while_it_reloads,
        operations::killed_while_it_stops,
        operations::killed_while_down_undoes,
        rotate::killed_while_keys_are_renewed,
        full::a_full_disk_leaves_the_site_as_it_is,
    ];
    let mut trials = Vec::new();
    for kind in Kind::ALL {
        trials.extend(attaching.iter().map(|(name, test)| kind.trial(&TIERS_WITH_CLSACT, name, *test)));
        trials.extend(each.iter().map(|(name, test)| kind.trial(&TIERS, name, *test)));
    }
    let alone: [Alone; 2] =
        tests![commands::killed_commands_leave_no_half_files, commands::a_full_disk_leaves_no_half_files];
    trials.extend(alone.into_iter().map(|(name, test)| skip::requires(&[Tier::Here], &[], name, test)));
    skip::run(trials);
}
