//! Reports the state to systemd, if systemd started this process with `Type=notify`. Otherwise does nothing.

use std::convert::Infallible;

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

/// Feeds systemd's watchdog three times in each period that systemd sets. Never returns.
pub async fn watchdog() -> Infallible {
    let Some(period) = sd_notify::watchdog_enabled().filter(|period| !period.is_zero()) else {
        return std::future::pending().await;
    };
    let mut every = tokio::time::interval(period / 3);
    loop {
        every.tick().await;
        send(&[NotifyState::Watchdog]);
    }
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("systemd cannot be notified: {error}");
    }
}
