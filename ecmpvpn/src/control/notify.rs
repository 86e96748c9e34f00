//! Reports the state to systemd, if systemd started this process with `Type=notify`. Otherwise does nothing.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// Reports that everything is up.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reports that the configuration is being read again. [`ready`] must follow.
pub fn reloading() {
    let now = NotifyState::monotonic_usec_now();
    let states: Vec<NotifyState<'_>> = [Some(NotifyState::Reloading), now.ok()].into_iter().flatten().collect();
    send(&states);
}

/// Reports that this process is about to end.
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// When this process last showed that it gets on, milliseconds since [`BEGAN`].
static PROGRESS: AtomicU64 = AtomicU64::new(0);
static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn now_ms() -> u64 {
    u64::try_from(BEGAN.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Says that the session gets on: a step of its work is done, or it waits for something with a deadline. Long work calls
/// this several times a second; otherwise systemd takes the process for hung.
pub fn progress() {
    PROGRESS.store(now_ms(), Ordering::Relaxed);
}

/// Calls [`progress`] while `work` is awaited, but not for longer than `at_most`: work that never ends is no progress.
pub async fn progress_during<T>(work: impl Future<Output = T>, at_most: Duration) -> T {
    let mut work = pin!(work);
    let since = Instant::now();
    while since.elapsed() < at_most {
        progress();
        if let Ok(done) = tokio::time::timeout(STAMP, work.as_mut()).await {
            return done;
        }
    }
    work.await
}

/// Calls [`progress`] while the session has nothing to do but to wait for events. Never returns.
pub async fn idle() -> Infallible {
    loop {
        progress();
        tokio::time::sleep(STAMP).await;
    }
}

/// Interval between calls of [`progress`] while something is awaited.
const STAMP: Duration = Duration::from_millis(50);

/// Feeds systemd's watchdog three times in each period that systemd sets, as long as the session gets on. Has its own
/// thread, because the session may be busy for longer than a period, for example with a reload. Ends when dropped.
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub fn start() -> Self {
        let (stop, stopped) = channel();
        progress();
        let period = sd_notify::watchdog_enabled().filter(|period| !period.is_zero());
        let feed = |period: Duration| {
            let feeding = move || {
                loop {
                    if gets_on(now_ms(), PROGRESS.load(Ordering::Relaxed), period) {
                        send(&[NotifyState::Watchdog]);
                    }
                    if stopped.recv_timeout(period / 3) != Err(RecvTimeoutError::Timeout) {
                        return;
                    }
                }
            };
            let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(feeding);
            thread.inspect_err(|error| tracing::warn!("systemd's watchdog is not fed: {error}")).ok()
        };
        Self { stop: Some(stop), thread: period.and_then(feed) }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It only sends messages, which cannot panic.
            let _ = thread.join();
        }
    }
}

/// Whether the last progress, at `last`, is recent enough at `now`, both in milliseconds: less than half a period ago.
fn gets_on(now: u64, last: u64, period: Duration) -> bool {
    u128::from(now.saturating_sub(last)) < period.as_millis() / 2
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("systemd cannot be notified: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_hangs_is_not_reported_as_alive() {
        let period = Duration::from_secs(30);
        assert!(gets_on(10_000, 10_000, period) && gets_on(24_999, 10_000, period) && gets_on(9_000, 10_000, period));
        assert!(!gets_on(25_000, 10_000, period) && !gets_on(1_000_000, 10_000, period));
    }

    #[tokio::test]
    async fn work_that_never_ends_is_no_progress() {
        assert_eq!(progress_during(async { 7 }, Duration::from_secs(1)).await, 7);
        let never = progress_during(std::future::pending::<()>(), Duration::from_millis(120));
        assert!(tokio::time::timeout(Duration::from_millis(400), never).await.is_err());
    }
}
