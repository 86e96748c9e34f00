//! The probing thread: connects [`super::detector::Tunnel`] with sockets, clocks and maps.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc::UnboundedSender;

use super::detector::{Others, Settings, Tunnel};
use super::handover::Handover;
use super::nanos::{MILLISECOND, Nanos, SECOND};
use super::probed::Probed;
use super::socket::Clocks;
use super::watchdog::{Remedy, Request};
use crate::config::Config;
use crate::dataplane::View;
use crate::plan::{Backend, Plan};

/// When to warn that no tunnel of a site has ever answered.
const NO_ANSWER_AT_ALL: Nanos = 10_000 * MILLISECOND;
/// Nice value of the probing thread, ahead of ordinary programs: a probe that is sent or read late looks like a lost
/// one. Probes are few, so this costs others little.
const NICE: i32 = -15;

/// Probes all tunnels of a plan.
pub(super) struct Prober {
    view: View,
    /// Names of the remote sites.
    peers: Vec<String>,
    tunnels: Vec<Probed>,
    requests: UnboundedSender<Request>,
    began: Nanos,
    silence_reported: bool,
    /// Whether this thread runs ahead of others: with the kernel backend. In userspace the tunnels are threads of this
    /// process too.
    ahead: bool,
}

impl Prober {
    pub(super) fn new(
        config: &Config,
        plan: &Plan,
        view: View,
        requests: UnboundedSender<Request>,
        handover: &Handover,
    ) -> Self {
        let settings = Settings {
            interval: Nanos::from(config.health.interval_ms) * MILLISECOND,
            down_after: config.health.down_after,
            up_after: config.health.up_after,
        };
        let live = view.peers();
        let in_kernel = plan.backend == Backend::Kernel;
        let began = Clocks::read().monotonic;
        let count = plan.tunnels.len().max(1) as u64;
        let probed = |(at, planned): (u64, &crate::plan::Tunnel)| {
            let lives = live.get(planned.peer)?.live >> planned.slot & 1 == 1;
            // Spread over the interval: probes sent in a burst would delay each other.
            let first = began + settings.interval * at / count;
            Probed::new(planned, settings, lives, first, in_kernel, &view, handover)
        };
        let tunnels = (0..).zip(&plan.tunnels).filter_map(probed).collect();
        let peers = plan.table.peers.iter().map(|peer| peer.name.clone()).collect();
        Self { view, peers, tunnels, requests, began, silence_reported: false, ahead: plan.backend == Backend::Kernel }
    }

    /// Probes until `stop` is readable.
    pub(super) fn run(mut self, stop: &OwnedFd) {
        if self.ahead {
            // Applies to this thread only. Without the privilege it keeps the normal priority.
            let _ = rustix::process::setpriority_process(None, NICE);
        }
        let mut ready = vec![true; self.tunnels.len()];
        loop {
            let (next, time) = self.step(&ready);
            let wait = next.saturating_sub(time);
            match self.wait(stop, wait) {
                Ok(Some(which)) => ready = which,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!("tunnels are no longer probed, and stay as they are: waiting for answers: {error}");
                    return;
                }
            }
        }
    }

    /// Waits for answers, at most for `longest`. Returns for each tunnel whether its socket is readable; `None`: time
    /// to stop.
    fn wait(&self, stop: &OwnedFd, longest: Nanos) -> io::Result<Option<Vec<bool>>> {
        let timeout = Timespec {
            tv_sec: i64::try_from(longest / SECOND).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(longest % SECOND).unwrap_or(0),
        };
        let mut sockets = vec![PollFd::new(stop, PollFlags::IN)];
        let open = || self.tunnels.iter().map(|probed| probed.socket.as_ref());
        sockets.extend(open().flatten().map(|socket| PollFd::new(socket, PollFlags::IN)));
        match poll(&mut sockets, Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Some(vec![false; self.tunnels.len()])),
            Err(error) => return Err(error.into()),
        }
        let mut ready = sockets.iter().map(|socket| !socket.revents().is_empty());
        if ready.next() == Some(true) {
            return Ok(None);
        }
        Ok(Some(open().map(|socket| socket.is_some() && ready.next() == Some(true)).collect()))
    }

    /// Does everything that is due. Returns when to call it again, and the current time. Reads the clocks only once for
    /// each tunnel that has work: where reading a clock is a system call, more reads were most of the cost of probing.
    fn step(&mut self, ready: &[bool]) -> (Nanos, Nanos) {
        let mut next = Nanos::MAX;
        let mut clocks = Clocks::read();
        for (at, ready) in ready.iter().enumerate() {
            if *ready || clocks.monotonic >= self.tunnels[at].wake {
                let peer = self.tunnels[at].id.peer();
                let rest = self.tunnels.iter().enumerate().filter(|(other, t)| *other != at && t.id.peer() == peer);
                let rest = rest.map(|(_, other)| &other.tunnel);
                let others = Others {
                    answered: rest.clone().any(Tunnel::ever_answered),
                    evidence: rest.clone().filter_map(Tunnel::last_evidence).max(),
                };
                let alternative = rest.clone().any(Tunnel::live);
                self.tunnels[at].look_at_handshake(&self.view, self.ahead, clocks.monotonic);
                self.tunnels[at].step(&self.view, others, alternative, clocks);
                self.tunnels[at].confirm_next_hop(self.ahead, clocks.monotonic);
                self.apply_remedy(at, alternative, clocks.monotonic);
                clocks = Clocks::read();
            }
            next = next.min(self.tunnels[at].wake);
        }
        self.warn_of_silence(clocks.monotonic);
        (next, clocks.monotonic)
    }

    fn apply_remedy(&mut self, at: usize, others: bool, time: Nanos) {
        let probed = &mut self.tunnels[at];
        let dead = (!probed.tunnel.live()).then(|| probed.tunnel.since());
        let Some(remedy) = probed.watchdog.poll(time, dead, others) else {
            if probed.leads_now(time) {
                let request = Request { tunnel: probed.name.clone(), remedy: Remedy::Handshake, first: true };
                // The receiver may have ended already.
                let _ = self.requests.send(request);
            }
            return;
        };
        // The receiver may have ended already.
        if self.requests.send(Request { tunnel: probed.name.clone(), remedy, first: false }).is_ok()
            && let Some(health) = self.view.health(probed.id)
        {
            health.restarts.set(health.restarts.get().wrapping_add(1));
        }
    }

    /// Warns once about each site of which no tunnel has ever answered.
    fn warn_of_silence(&mut self, time: Nanos) {
        if self.silence_reported || time - self.began < NO_ANSWER_AT_ALL {
            return;
        }
        self.silence_reported = true;
        for (number, name) in (0..).zip(&self.peers) {
            let mut of_peer = self.tunnels.iter().filter(|probed| probed.id.peer() == number && probed.blind.is_none());
            if of_peer.clone().next().is_some() && !of_peer.any(|probed| probed.tunnel.ever_answered()) {
                tracing::warn!(
                    "no tunnel to {name} has answered a probe yet: that site is not up, or drops ICMP echo; its \
                     tunnels stay in use"
                );
            }
        }
    }
}
