//! Takes a site down: detaches its programs and undoes every change of the host.

use std::time::Duration;

use super::site::{Paths, SessionError};
use crate::dataplane;
use crate::host::{self, Journal, Netlink, RunDir, Undo};

/// How long `down` waits for a running `ecmpvpn run` to undo its changes.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// What [`down`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TakenDown {
    /// The pid of a running process that was stopped. It undid its own changes.
    pub stopped: Option<i32>,
    /// How many host changes were undone by this process.
    pub undone: usize,
}

/// Removes everything that `run` made for `site`. Works from any process; a running `ecmpvpn run` is stopped first.
pub async fn down(site: &str, paths: &Paths) -> Result<TakenDown, SessionError> {
    let pinned = paths.pins.exist() || !paths.pins.of_other_versions().is_empty();
    if !paths.run_root.join(site).exists() && !pinned {
        return Ok(TakenDown::default());
    }
    host::require_privilege()?;
    paths.pins.claim()?;
    let (root, name) = (paths.run_root.clone(), site.to_owned());
    let locking = tokio::task::spawn_blocking(move || RunDir::lock_stopping(&root, &name, STOP_PATIENCE));
    let (run_dir, stopped) = locking.await.expect("locking does not panic")?;
    let mut journal = Journal::open(&run_dir.journal_path(), site)?;
    let undone = undo(&mut journal, paths).await?;
    run_dir.remove()?;
    Ok(TakenDown { stopped, undone })
}

/// Detaches the programs, then undoes the host's changes: programs must not outlive the devices that they redirect to.
/// Continues after a failure.
///
/// # Errors
/// Undoing failed, or else detaching did.
pub async fn undo(journal: &mut Journal, paths: &Paths) -> Result<usize, SessionError> {
    let detached = dataplane::remove(&paths.pins);
    let netlink = Netlink::open()?;
    let mut on_undo = |undo: &Undo| {
        tracing::info!("{undo}");
        Ok(())
    };
    let undone = journal.undo(&netlink, &mut on_undo).await?;
    detached?;
    Ok(undone)
}
