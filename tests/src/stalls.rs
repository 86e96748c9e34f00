//! Detects when a CPU of this machine does not run. An emulated CPU stops whenever its host runs something else, and
//! whatever the CPU was decrypting stops with it.

use std::fmt;
use std::io;
use std::mem::zeroed;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Time between two looks at the clock.
const LOOK: Duration = Duration::from_millis(5);
/// A shorter stop is ignored.
const LEAST: Duration = Duration::from_millis(30);

/// One stop of one CPU.
#[derive(Clone, Copy, Debug)]
pub struct Stall {
    pub cpu: usize,
    /// When the CPU ran again.
    pub until: SystemTime,
    pub lasted: Duration,
}

impl fmt::Display for Stall {
    /// Shows the begin as time of day in UTC, as log lines do.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let begin = (self.until - self.lasted).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (seconds, milliseconds) = (begin.as_secs(), begin.subsec_millis());
        let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let lasted = self.lasted.as_millis();
        write!(f, "{hours:02}:{minutes:02}:{seconds:02}.{milliseconds:03} CPU {} for {lasted} ms", self.cpu)
    }
}

/// Watches every CPU until [`Watch::end`].
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Stall>>>,
}

impl Watch {
    /// Starts a thread on each CPU. It runs before all threads of ordinary priority there.
    pub fn begin() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let all = sched_getaffinity(None).context("asking for the CPUs")?;
        let begin = |cpu| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || watch(cpu, &stop))
        };
        let threads = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).map(begin).collect();
        Ok(Self { stop, threads })
    }

    /// All stalls, ordered by their end.
    pub fn end(self) -> Vec<Stall> {
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.threads.into_iter().map(|thread| thread.join().expect("a watch does not panic"));
        let mut stalls: Vec<Stall> = seen.flatten().collect();
        stalls.sort_by_key(|stall| stall.until);
        stalls
    }
}

fn watch(cpu: usize, stop: &AtomicBool) -> Vec<Stall> {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).expect("one of the CPUs that it may run on");
    go_first().expect("root may");
    let mut stalls = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let before = Instant::now();
        thread::sleep(LOOK);
        let lasted = before.elapsed().saturating_sub(LOOK);
        if lasted >= LEAST {
            stalls.push(Stall { cpu, until: SystemTime::now(), lasted });
        }
    }
    stalls
}

/// Gives this thread real-time priority: it runs before all threads of ordinary priority, sched(7).
fn go_first() -> io::Result<()> {
    // SAFETY: a sched_param consists of integers, for which zero is a valid value.
    let mut parameters: libc::sched_param = unsafe { zeroed() };
    parameters.sched_priority = 1;
    // SAFETY: the parameters live until the call returns. 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
