//! Moments in which a CPU of this machine was not to be had: an emulated one stands still whenever the host has something
//! better to do, and what it was decrypting then stands still with it.

use std::fmt;
use std::io;
use std::mem::zeroed;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Between looks at the clock.
const LOOK: Duration = Duration::from_millis(5);
/// A shorter one is none.
const LEAST: Duration = Duration::from_millis(30);

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Stall {
    /// Which CPU.
    pub cpu: usize,
    /// When it was to be had again.
    pub until: SystemTime,
    /// How long it was not.
    pub lasted: Duration,
}

impl fmt::Display for Stall {
    /// With the time of day, UTC, as log lines have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let begin = (self.until - self.lasted).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (seconds, milliseconds) = (begin.as_secs(), begin.subsec_millis());
        let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let lasted = self.lasted.as_millis();
        write!(f, "{hours:02}:{minutes:02}:{seconds:02}.{milliseconds:03} CPU {} for {lasted} ms", self.cpu)
    }
}

/// Watches every CPU until it is asked what it saw.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Stall>>>,
}

impl Watch {
    /// A thread on each CPU that goes before all others there.
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

    /// What was seen, in order.
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

/// Has this thread run before all of ordinary priority, sched(7).
fn go_first() -> io::Result<()> {
    // SAFETY: a sched_param is integers, of which zero is a valid value.
    let mut parameters: libc::sched_param = unsafe { zeroed() };
    parameters.sched_priority = 1;
    // SAFETY: the parameters live until the call returns; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
