//! Tells systemd what goes on, where it started us with `Type=notify`. Anywhere else nothing is told.

use std::convert::Infallible;

use sd_notify::NotifyState;

/// Everything is in place.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being read again; [`ready`] is to follow.
pub fn reloading() {
    let now = NotifyState::monotonic_usec_now();
    let states: Vec<NotifyState<'_>> = [Some(NotifyState::Reloading), now.ok()].into_iter().flatten().collect();
    send(&states);
}

/// It is ending.
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Says that this process is not stuck, as often as systemd asks for, for ever.
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
        tracing::debug!("systemd cannot be told: {error}");
    }
}
