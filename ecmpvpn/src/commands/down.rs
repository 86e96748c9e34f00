//! `down`: removes everything that `run` made.

use crate::commands::{Failure, Invocation, count_of, print};
use crate::control::down::{self, TakenDown};
use crate::control::site::Paths;

/// Takes down the site.
pub async fn run(invocation: Invocation<'_>) -> Result<(), Failure> {
    let site = invocation.find()?.name;
    print(match down::down(&site, &Paths::of(&site)).await? {
        TakenDown { stopped: None, undone: 0 } => format!("nothing of {site} is up"),
        TakenDown { stopped: Some(pid), undone: 0 } => format!("{site} is down: ecmpvpn (pid {pid}) was stopped"),
        TakenDown { undone, .. } => {
            format!("{site} is down: {}", count_of(undone, "change was undone", "changes were undone"))
        }
    })
}
