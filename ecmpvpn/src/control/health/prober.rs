//! The probing thread: connects [`super::detector::Tunnel`] with sockets, clocks and maps.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, TryRecvError};

use ecmpvpn_common::layout::peer_flags;
use ecmpvpn_common::order::{MAX_BOUND_NS, UNIT_BITS};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::detector::{Others, Settings, Tunnel};
use super::handover::Handover;
use super::nanos::{MILLISECOND, Nanos, SECOND};
use super::ordering::{Agreed, Agreement};
use super::probed::Probed;
use super::socket::Clocks;
use super::watchdog::{Remedy, Request};
use crate::config::{Config, InterfaceName};
use crate::dataplane::{View, device_exists};
use crate::plan::{self, Backend, Plan};

/// When to warn that no tunnel of a site has ever answered.
const NO_ANSWER_AT_ALL: Nanos = 10_000 * MILLISECOND;
/// Nice value of the probing thread, ahead of ordinary programs: a probe that is sent or read late looks like a lost
/// one. Probes are few, so this costs others little.
pub const NICE: i32 = -15;

/// What is to be probed.
pub(super) struct Aim {
    settings: Settings,
    /// Names of the remote sites.
    peers: Vec<String>,
    tunnels: Vec<plan::Tunnel>,
    backend: Backend,
    /// Longest time that a packet is held for its order, nanoseconds; 0: order is not restored.
    hold: Nanos,
}

impl Aim {
    pub(super) fn new(config: &Config, plan: &Plan) -> Self {
        Self {
            settings: Settings {
                interval: Nanos::from(config.health.interval_ms) * MILLISECOND,
                down_after: config.health.down_after,
                up_after: config.health.up_after,
            },
            peers: plan.table.peers.iter().map(|peer| peer.name.clone()).collect(),
            tunnels: plan.tunnels.clone(),
            backend: plan.backend,
            hold: if config.steering.restore_order { Nanos::from(config.steering.restore_ms) * MILLISECOND } else { 0 },
        }
    }
}

/// What the thread asks of the session.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    /// Restart a tunnel.
    Restart(Request),
    /// Say that none of the tunnels to these sites has ever answered.
    Explain(Vec<String>),
}

/// What the session asks of the probing thread. The thread answers when it is done.
pub(super) enum Order {
    /// Probe and judge these tunnels no more.
    LeaveOut(Vec<InterfaceName>, oneshot::Sender<()>),
    /// Probe these tunnels. Those that are probed already go on without a break.
    Follow(Box<Aim>, oneshot::Sender<()>),
}

/// Probes all tunnels of a plan.
pub(super) struct Prober {
    view: View,
    /// Names of the remote sites.
    peers: Vec<String>,
    tunnels: Vec<Probed>,
    /// By peer.
    agreements: Vec<Agreement>,
    /// What is in force, by peer.
    agreed: Vec<Agreed>,
    hold: Nanos,
    interval: Nanos,
    /// The device that holds packets, and when it was last seen.
    holding: (u32, Nanos),
    asks: UnboundedSender<Ask>,
    orders: Receiver<Order>,
    handover: Handover,
    began: Nanos,
    silence_reported: bool,
    /// Whether this thread runs ahead of others: with the kernel backend. In userspace the tunnels are threads of this
    /// process too.
    ahead: bool,
}

impl Prober {
    pub(super) fn new(
        aim: Aim,
        view: View,
        asks: UnboundedSender<Ask>,
        orders: Receiver<Order>,
        handover: &Handover,
    ) -> Self {
        let mut prober = Self {
            view,
            peers: Vec::new(),
            tunnels: Vec::new(),
            agreements: Vec::new(),
            agreed: Vec::new(),
            hold: 0,
            interval: 0,
            holding: (0, 0),
            asks,
            orders,
            handover: handover.clone(),
            began: Clocks::read().monotonic,
            silence_reported: false,
            ahead: aim.backend == Backend::Kernel,
        };
        prober.follow(aim);
        prober
    }

    /// Probes the tunnels of `aim`, and no others. A tunnel that was not probed has the state that the map says.
    fn follow(&mut self, aim: Aim) {
        let Aim { settings, peers, tunnels, backend, hold } = aim;
        (self.hold, self.interval) = (hold, settings.interval);
        self.agreements.resize(peers.len(), Agreement::default());
        let in_kernel = backend == Backend::Kernel;
        let live = self.view.peers();
        let now = Clocks::read().monotonic;
        let count = tunnels.len().max(1) as u64;
        let mut former = std::mem::take(&mut self.tunnels);
        for (at, planned) in (0..).zip(&tunnels) {
            let known = former.iter().position(|probed| probed.name == planned.name).map(|at| former.swap_remove(at));
            if let Some(mut probed) = known
                && probed.follow(planned, settings)
            {
                self.tunnels.push(probed);
                continue;
            }
            let lives = live.get(planned.peer).is_some_and(|peer| peer.live >> planned.slot & 1 == 1);
            // Spread over the interval: probes sent in a burst would delay each other.
            let first = now + settings.interval * at / count;
            self.tunnels.extend(Probed::new(planned, settings, lives, first, in_kernel, &self.view, &self.handover));
        }
        self.peers = peers;
    }

    /// Does what the session asks. Returns `false` when it is time to stop.
    fn obey(&mut self) -> bool {
        loop {
            let done = match self.orders.try_recv() {
                Ok(Order::LeaveOut(names, done)) => {
                    self.tunnels.retain(|probed| !names.contains(&probed.name));
                    done
                }
                Ok(Order::Follow(aim, done)) => {
                    self.follow(*aim);
                    done
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            };
            // The session may have ended meanwhile.
            let _ = done.send(());
        }
    }

    /// Probes until there can be no more orders. `wake` is readable when there may be some, or none any more.
    pub(super) fn run(mut self, wake: &OwnedFd) {
        if self.ahead {
            // Applies to this thread only. Without the privilege it keeps the normal priority.
            let _ = rustix::process::setpriority_process(None, NICE);
        }
        let mut ready = vec![true; self.tunnels.len()];
        loop {
            let (next, time) = self.step(&ready);
            let wait = next.saturating_sub(time);
            match self.wait(wake, wait) {
                Ok(Some(which)) => ready = which,
                Ok(None) => {
                    // Only resets the counter.
                    let _ = rustix::io::read(wake, &mut [0_u8; 8]);
                    if !self.obey() {
                        self.stop_stamping();
                        return;
                    }
                    ready = vec![true; self.tunnels.len()];
                }
                Err(error) => {
                    tracing::error!("tunnels are no longer probed, and stay as they are: waiting for answers: {error}");
                    return;
                }
            }
        }
    }

    /// Waits for answers, at most for `longest`. Returns for each tunnel whether its socket is readable; `None`:
    /// `wake` is readable.
    fn wait(&self, wake: &OwnedFd, longest: Nanos) -> io::Result<Option<Vec<bool>>> {
        let timeout = Timespec {
            tv_sec: i64::try_from(longest / SECOND).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(longest % SECOND).unwrap_or(0),
        };
        let mut sockets = vec![PollFd::new(wake, PollFlags::IN)];
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
        self.agree(clocks.monotonic);
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
                self.tunnels[at].look_at_handshake(&self.view, self.ahead, clocks);
                self.tunnels[at].says = self.agreed.get(peer as usize).map(|agreed| agreed.says).unwrap_or_default();
                self.tunnels[at].step(&self.view, others, alternative, clocks);
                if let (Some(far), Some(agreement)) =
                    (self.tunnels[at].heard.take(), self.agreements.get_mut(peer as usize))
                {
                    agreement.hear(far, clocks.monotonic);
                }
                self.tunnels[at].confirm_next_hop(self.ahead, clocks.monotonic);
                self.apply_remedy(at, alternative, clocks.monotonic);
                clocks = Clocks::read();
            }
            next = next.min(self.tunnels[at].wake);
        }
        self.warn_of_silence(clocks.monotonic);
        (next, clocks.monotonic)
    }

    /// Decides for each peer what this end does for the order of sprayed packets, and writes it to the maps.
    fn agree(&mut self, time: Nanos) {
        let device = self.handover.holding();
        if self.holding.0 != device || time.saturating_sub(self.holding.1) >= SECOND {
            // A program that redirects to a device that is gone loses the packets.
            self.holding = (if device_exists(device) { device } else { 0 }, time);
        }
        let device = self.holding.0;
        let first = self.agreed.len() != self.agreements.len();
        self.agreed.resize(self.agreements.len(), Agreed::default());
        for (number, agreement) in (0..).zip(&mut self.agreements) {
            let (Some(peer), Some(order)) = (self.view.peer(number), self.view.order(number)) else { continue };
            let is_on = self.hold > 0 && peer.flags.get() & peer_flags::UNRESTORED == 0;
            let now = agreement.state(is_on, device != 0, time, self.interval);
            let before = std::mem::replace(&mut self.agreed[number as usize], now);
            if self.hold > 0 {
                let bound = self.hold.min(MAX_BOUND_NS) >> UNIT_BITS;
                order.bound.set(u32::try_from(bound).unwrap_or(u32::MAX));
            }
            // An earlier process may have left the far end stamping: then its first message decides.
            if now.restores || !first && before.restores || device == 0 {
                order.device.set(if now.restores { device } else { 0 });
            }
            peer.flags.set_bits(peer_flags::UNMARK, now.unmarks);
            peer.flags.set_bits(peer_flags::STAMP, now.stamps);
            if now.stamps != before.stamps {
                let name = self.peers.get(number as usize).map_or("", String::as_str);
                if now.stamps {
                    tracing::info!("{name} restores the order of packets: flows of any transport may be sprayed to it");
                } else {
                    tracing::info!("{name} restores the order of packets no more: only TCP is sprayed to it");
                }
            }
        }
    }

    /// Without this process nobody would notice that the far end restores no more.
    fn stop_stamping(&self) {
        for number in (0..).take(self.agreements.len()) {
            if let Some(peer) = self.view.peer(number) {
                peer.flags.set_bits(peer_flags::STAMP, false);
            }
        }
    }

    fn apply_remedy(&mut self, at: usize, others: bool, time: Nanos) {
        let probed = &mut self.tunnels[at];
        // A tunnel that carries nothing on purpose is not restarted: that would disturb what is done with it.
        let Some(remedy) = probed.watchdog.poll(time, probed.tunnel.failing_since(), others) else {
            if probed.leads_now(time) {
                let request = Request { tunnel: probed.name.clone(), remedy: Remedy::Handshake, first: true };
                // The receiver may have ended already.
                let _ = self.asks.send(Ask::Restart(request));
            }
            return;
        };
        // The receiver may have ended already.
        if self.asks.send(Ask::Restart(Request { tunnel: probed.name.clone(), remedy, first: false })).is_ok()
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
        let is_silent = |number: &usize| {
            let mut of_peer =
                self.tunnels.iter().filter(|probed| probed.id.peer() as usize == *number && probed.blind.is_none());
            of_peer.clone().next().is_some() && !of_peer.any(|probed| probed.tunnel.is_known_to_answer())
        };
        let silent = self.peers.iter().enumerate().filter(|(number, _)| is_silent(number));
        let silent: Vec<String> = silent.map(|(_, name)| name.clone()).collect();
        if !silent.is_empty() {
            // The receiver may have ended already.
            let _ = self.asks.send(Ask::Explain(silent));
        }
    }
}
