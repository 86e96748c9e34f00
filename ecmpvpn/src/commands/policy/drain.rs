//! `policy drain`: waits until a tunnel is empty.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::change::Change;
use crate::cli::policy::DrainArgs;
use crate::commands::{Failure, Invocation, count_of, warn};
use crate::dataplane::Pins;
use crate::live::policy::drain::Draining;

/// Time between two checks of the buckets.
const LOOK: Duration = Duration::from_millis(50);
/// Time between lines of progress.
const PROGRESS: Duration = Duration::from_secs(1);

pub async fn run(invocation: Invocation<'_>, args: &DrainArgs) -> Result<(), Failure> {
    let name = &args.tunnel;
    let draining = {
        let change = Change::open(invocation, false, std::slice::from_ref(name))?;
        change.live.set_open(name, false)?;
        for rule in change.live.bound_to(name)? {
            warn(format_args!("rule {rule} allows no other tunnel that is up and open: its flows stay on {name}"));
        }
        // Dropping `change` releases the lock: other commands can run while this one waits.
        Draining::new(&change.live, &Pins::of(&change.site.name), name)?
    };
    let start = Instant::now();
    let deadline = Duration::from_secs(u64::from(args.deadline));
    let mut last = None;
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    loop {
        let left = draining.move_idle()?;
        if left == 0 {
            return invocation.say(format_args!("{name} is drained: it carries no flow and takes no new ones"));
        }
        if draining.is_called_off() {
            return Err(anyhow::anyhow!("{name} takes new flows again: somebody ended the draining").into());
        }
        if start.elapsed() >= deadline {
            let stayed = draining.move_all()?;
            if stayed > 0 {
                let error = anyhow::anyhow!("no other tunnel is up and open: {stayed} buckets stay on {name}");
                return Err(error.into());
            }
            let moved =
                count_of(left, "bucket that had not paused was moved", "buckets that had not paused were moved");
            return invocation.say(format_args!("{name} is drained: at the deadline {moved}"));
        }
        if last.is_none_or(|last: Instant| last.elapsed() >= PROGRESS) {
            last = Some(Instant::now());
            progress(&format!("{name}: {} still busy", count_of(left, "bucket", "buckets")));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            interrupted = &mut interrupt => {
                interrupted.context("waiting for Ctrl-C")?;
                progress(&format!(
                    "{name} takes no new flows, {} still busy; `ecmpvpn policy undrain {name}` opens it again",
                    count_of(left, "bucket is", "buckets are")
                ));
                return Ok(());
            }
        }
    }
}

/// Reports progress.
fn progress(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
