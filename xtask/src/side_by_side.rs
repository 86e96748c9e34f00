//! A pool of threads for jobs that run side by side.

use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::Result;

/// Calls `work` for each of `jobs`, in their order, `workers` at a time. Passes each result to `take`, in the order in
/// which the jobs end.
///
/// # Errors
/// If `take` returns an error, no further job starts, and this returns that error.
pub fn run<J: Send, R: Send>(
    jobs: Vec<J>,
    workers: usize,
    work: impl Fn(J) -> R + Sync,
    take: &mut dyn FnMut(R) -> Result<()>,
) -> Result<()> {
    run_with_progress(jobs, workers, work, Duration::MAX, &mut || {}, take)
}

/// Like [`run`]. Also calls `progress` whenever no job has ended for `every`.
pub fn run_with_progress<J: Send, R: Send>(
    jobs: Vec<J>,
    workers: usize,
    work: impl Fn(J) -> R + Sync,
    every: Duration,
    progress: &mut dyn FnMut(),
    take: &mut dyn FnMut(R) -> Result<()>,
) -> Result<()> {
    let jobs = Mutex::new(jobs.into_iter());
    thread::scope(|scope| {
        // Created inside the scope, so that an error below closes the channel and the workers stop.
        let (sender, results) = mpsc::channel();
        for _ in 0..workers {
            let (sender, jobs, work) = (sender.clone(), &jobs, &work);
            scope.spawn(move || {
                while let Some(job) = jobs.lock().ok().and_then(|mut jobs| jobs.next()) {
                    if sender.send(work(job)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        loop {
            match results.recv_timeout(every) {
                Ok(result) => take(result)?,
                Err(RecvTimeoutError::Timeout) => progress(),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn every_job_is_done_once() {
        let mut done = Vec::new();
        run((0..20).collect(), 3, |job: u32| job, &mut |job| {
            done.push(job);
            Ok(())
        })
        .unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..20).collect::<Vec<u32>>());
    }

    #[test]
    fn an_error_ends_it() {
        let mut taken = 0;
        let result = run((0..1000).collect(), 3, |job: u32| job, &mut |_| {
            taken += 1;
            bail!("full")
        });
        assert!(result.is_err() && taken == 1);
    }

    #[test]
    fn progress_is_asked_for_while_jobs_run() {
        let mut asked = 0;
        let work = |()| thread::sleep(Duration::from_millis(50));
        run_with_progress(vec![()], 1, work, Duration::from_millis(5), &mut || asked += 1, &mut |()| Ok(())).unwrap();
        assert!(asked > 0);
    }
}
