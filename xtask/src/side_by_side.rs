//! Test programs side by side: each keeps its output, which is passed on when it ends.

use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::count::{Counts, Watcher};
use crate::suites::Stage;
use crate::vm::run::{Sink, to_stdout};

/// A test program that ran.
pub struct Ran {
    pub name: String,
    pub counts: Result<Counts>,
    pub took: Duration,
    pub output: Vec<u8>,
}

impl Ran {
    /// Runs `program`, which hands over its output and returns its exit status, and counts its tests.
    pub fn of(name: String, program: impl FnOnce(&mut Sink<'_>) -> Result<i32>) -> Self {
        eprintln!("==> {name}");
        let since = Instant::now();
        let mut output = Vec::new();
        let mut watcher = Watcher::default();
        let status = program(&mut |bytes| {
            watcher.feed(bytes);
            output.extend_from_slice(bytes);
            Ok(())
        });
        Self { name, counts: status.map(|status| watcher.finish(status == 0)), took: since.elapsed(), output }
    }
}

/// Does `jobs` in their order, `workers` at a time, and hands the result of each to `stage`, in the order in which they end.
pub fn run<J: Send>(jobs: Vec<J>, workers: usize, work: impl Fn(J) -> Ran + Sync, stage: &mut dyn FnMut(Stage)) {
    let jobs = Mutex::new(jobs.into_iter());
    let (sender, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..workers {
            let (sender, jobs, work) = (sender.clone(), &jobs, &work);
            scope.spawn(move || {
                while let Some(job) = jobs.lock().ok().and_then(|mut jobs| jobs.next()) {
                    // The receiver stays until all senders are gone.
                    let _ = sender.send(work(job));
                }
            });
        }
        drop(sender);
        for ran in results {
            eprintln!("==> {}: its output", ran.name);
            // A closed stdout ends the whole test soon enough.
            let _ = to_stdout(&ran.output);
            stage((ran.name, ran.counts, ran.took));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_job_is_done_once_and_its_tests_are_counted() {
        let mut names = Vec::new();
        let job = |name: &str| {
            Ran::of(name.to_owned(), |sink| {
                sink(b"test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured\n")?;
                Ok(0)
            })
        };
        run(vec!["a", "b", "c"], 2, job, &mut |(name, counts, _)| {
            assert_eq!(counts.unwrap(), Counts { passed: 2, failed: 0, skipped: 1 });
            names.push(name);
        });
        names.sort();
        assert_eq!(names, ["a", "b", "c"]);
    }

    #[test]
    fn a_program_that_cannot_be_started_is_told() {
        let ran = Ran::of("broken".to_owned(), |_| anyhow::bail!("no such file"));
        assert!(ran.counts.is_err());
        let ran = Ran::of("silent".to_owned(), |_| Ok(0));
        assert!(ran.counts.unwrap().failed > 0, "it has not said that anything passed");
    }
}
