//! The probing thread: sockets, clocks and maps around [`super::detector::Tunnel`].

use std::fs::File;
use std::io::{self, Read as _};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc::UnboundedSender;

use super::detector::{Fault, Others, Settings, Signs, Step, Tunnel, Turn};
use super::estimate::RoundTrip;
use super::handover::Handover;
use super::nanos::Nanos;
use super::neighbour::NextHop;
use super::socket::{Clocks, Socket};
use super::watchdog::{Remedy, Request, Watchdog};
use super::wire::{self, Message};
use crate::config::{Config, InterfaceName};
use crate::dataplane::{View, boot_time_ns};
use crate::host::wireguard::kernel;
use crate::plan::{Backend, Plan, far_address};

const MICROSECOND: Nanos = 1_000;
const MILLISECOND: Nanos = 1_000_000;
const SECOND: Nanos = 1_000_000_000;
/// A socket that could not be opened, for its device is gone, is tried again after this.
const REOPEN: Nanos = 1_000 * MILLISECOND;
/// A warning comes after this, if no tunnel of a site has ever answered.
const NO_ANSWER_AT_ALL: Nanos = 10_000 * MILLISECOND;
/// Between looks at the handshakes of tunnels that answer no probe.
const HANDSHAKES: Nanos = 5_000 * MILLISECOND;
/// Packets taken from one socket before the others get a turn.
const BATCH: usize = 64;
/// Where there is no session yet, the end that does not lead sends its first probe so much later, and by a random time
/// below the second; a handshake takes a round trip.
const FOLLOWS: Nanos = 400 * MILLISECOND;
const FOLLOWS_SCATTER: Nanos = 200 * MILLISECOND;
/// Without any handshake after this and a random time below the second, the leading end begins one anew, each time after
/// twice as long up to the third: WireGuard's own retry after 5 s may cross the other end's each time.
const LEAD: Nanos = 1_500 * MILLISECOND;
const LEAD_SCATTER: Nanos = 1_000 * MILLISECOND;
const LEAD_AT_MOST: Nanos = 60_000 * MILLISECOND;
/// The probing thread runs ahead of ordinary programs: a probe that is sent or read late looks like a lost one, and probes
/// are few.
const NICE: i32 = -15;

struct Probed {
    name: InterfaceName,
    peer: u32,
    slot: u32,
    near: Ipv4Addr,
    far: Ipv4Addr,
    next_hop: NextHop,
    socket: Option<Socket>,
    reopen_at: Nanos,
    /// Why no probe can be sent for a reason that is not the tunnel's: then nothing is judged.
    blind: Option<io::ErrorKind>,
    /// When there is something to do even if nothing arrives.
    wake: Nanos,
    identifier: u16,
    secret: u64,
    tunnel: Tunnel,
    watchdog: Watchdog,
    handover: Handover,
    handshake_at: Nanos,
    /// When this end begins a handshake anew because there has been none yet; `None`: that is the other end's.
    lead_at: Option<Nanos>,
    /// How long after that the next time.
    lead_after: Nanos,
}

/// All tunnels of a plan.
pub(super) struct Prober {
    view: View,
    /// Names of the remote sites.
    peers: Vec<String>,
    tunnels: Vec<Probed>,
    requests: UnboundedSender<Request>,
    began: Nanos,
    silence_told: bool,
    /// Whether this thread goes before others; not where the tunnels themselves are threads of this process.
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
            let (peer, slot) = (u32::try_from(planned.peer).ok()?, u32::try_from(planned.slot).ok()?);
            let lives = live.get(planned.peer)?.live >> slot & 1 == 1;
            let round_trip = view
                .health(peer, slot)
                .map(|health| RoundTrip::restored(from_us(health.rtt_us.get()), from_us(health.rtt_jitter_us.get())));
            let leads = planned.private_key.public_key().as_bytes() < planned.public_key.as_bytes();
            // Spread over the interval: a burst would measure itself.
            let mut first = began + settings.interval * at / count;
            if !leads && handshake_age(&view, &planned.name, peer, slot, in_kernel).is_none() {
                // The first packet begins a handshake. Two that are begun at once would come to nothing.
                first += FOLLOWS + random() % FOLLOWS_SCATTER;
            }
            Some(Probed {
                name: planned.name.clone(),
                peer,
                slot,
                near: planned.address.addr(),
                far: far_address(planned.address)?,
                next_hop: NextHop::new(planned),
                socket: None,
                reopen_at: 0,
                blind: None,
                wake: 0,
                identifier: u16::try_from(random() & 0xffff).unwrap_or_default(),
                secret: random(),
                tunnel: Tunnel::new(settings, lives, round_trip.unwrap_or_default(), first),
                watchdog: Watchdog::new(leads, random()),
                lead_at: (leads && in_kernel).then(|| first + LEAD + random() % LEAD_SCATTER),
                lead_after: LEAD,
                handover: handover.clone(),
                handshake_at: first + HANDSHAKES,
            })
        };
        let tunnels = (0..).zip(&plan.tunnels).filter_map(probed).collect();
        let peers = plan.table.peers.iter().map(|peer| peer.name.clone()).collect();
        Self { view, peers, tunnels, requests, began, silence_told: false, ahead: plan.backend == Backend::Kernel }
    }

    /// Probes until `stop` can be read.
    pub(super) fn run(mut self, stop: &OwnedFd) {
        if self.ahead {
            // Of this thread alone; without the privilege it does without.
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

    /// Waits for answers, at most so long. Which tunnels' sockets have some; `None`: it is time to stop.
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

    /// Everything that is due. When to be called again, and the time at the end. Clocks are read once for each tunnel that
    /// has something to do, and no more often: where reading them is a system call, that was most of what probing cost.
    fn step(&mut self, ready: &[bool]) -> (Nanos, Nanos) {
        let mut next = Nanos::MAX;
        let mut clocks = Clocks::read();
        for (at, ready) in ready.iter().enumerate() {
            if *ready || clocks.monotonic >= self.tunnels[at].wake {
                let peer = self.tunnels[at].peer;
                let rest = self.tunnels.iter().enumerate().filter(|(other, t)| *other != at && t.peer == peer);
                let rest = rest.map(|(_, other)| &other.tunnel);
                let others = Others {
                    answered: rest.clone().any(Tunnel::ever_answered),
                    evidence: rest.clone().filter_map(Tunnel::evidence).max(),
                };
                let alternative = rest.clone().any(Tunnel::live);
                self.tunnels[at].look_at_handshake(&self.view, self.ahead, clocks.monotonic);
                self.tunnels[at].step(&self.view, others, alternative, clocks);
                self.tunnels[at].confirm_next_hop(self.ahead, clocks.monotonic);
                self.start_anew(at, alternative, clocks.monotonic);
                clocks = Clocks::read();
            }
            next = next.min(self.tunnels[at].wake);
        }
        self.tell_of_silence(clocks.monotonic);
        (next, clocks.monotonic)
    }

    fn start_anew(&mut self, at: usize, others: bool, time: Nanos) {
        let probed = &mut self.tunnels[at];
        let dead = (!probed.tunnel.live()).then(|| probed.tunnel.since());
        let Some(remedy) = probed.watchdog.poll(time, dead, others) else {
            if probed.leads_now(time) {
                let request = Request { tunnel: probed.name.clone(), remedy: Remedy::Handshake, first: true };
                // Nobody may be there to do it any more.
                let _ = self.requests.send(request);
            }
            return;
        };
        // Nobody may be there to do it any more.
        if self.requests.send(Request { tunnel: probed.name.clone(), remedy, first: false }).is_ok()
            && let Some(health) = self.view.health(probed.peer, probed.slot)
        {
            health.restarts.set(health.restarts.get().wrapping_add(1));
        }
    }

    /// Says once of a site that none of its tunnels ever answered.
    fn tell_of_silence(&mut self, time: Nanos) {
        if self.silence_told || time - self.began < NO_ANSWER_AT_ALL {
            return;
        }
        self.silence_told = true;
        for (number, name) in (0..).zip(&self.peers) {
            let mut of_peer = self.tunnels.iter().filter(|probed| probed.peer == number && probed.blind.is_none());
            if of_peer.clone().next().is_some() && !of_peer.any(|probed| probed.tunnel.ever_answered()) {
                tracing::warn!(
                    "no tunnel to {name} has answered a probe yet: that site is not up, or drops ICMP echo; its \
                     tunnels stay in use"
                );
            }
        }
    }
}

impl Probed {
    fn step(&mut self, view: &View, others: Others, alternative: bool, clocks: Clocks) {
        let time = clocks.monotonic;
        self.reopen(time);
        // Before anything is judged: an answer that has come counts, however late this thread is.
        self.take_answers(clocks);
        if self.blind.is_some() {
            self.wake = self.reopen_at;
            return;
        }
        if time >= self.wake
            && let Ok(counters) = view.tunnel_counters(self.peer, self.slot)
        {
            self.tunnel.received(counters.rx_packets, time);
        }
        // The last one that lives is not left.
        let leave = self.handover.is_to_be_left(&self.name) && (alternative || !self.tunnel.live());
        self.tunnel.withhold(leave);
        self.tunnel.compare_with(others, time);
        // Before the verdict: with it a dead tunnel's begin anew.
        let signs = self.tunnel.signs(time);
        let Step { send, turn } = self.tunnel.poll(time);
        if let Some(turn) = turn {
            self.apply_transition(turn, signs, view);
        }
        if let Some(sequence) = send {
            self.send(sequence, time, leave && !self.tunnel.live());
        }
        self.publish(view);
        self.wake = self.tunnel.next_poll(time);
    }

    /// Whether this end is to begin a handshake anew now, since there has been none at all yet.
    fn leads_now(&mut self, time: Nanos) -> bool {
        let Some(at) = self.lead_at else { return false };
        let has_answered = self.tunnel.ever_answered();
        if !has_answered && time < at {
            return false;
        }
        if has_answered || kernel::last_handshake(self.name.as_str()).is_some() {
            self.lead_at = None;
            return false;
        }
        self.lead_after = (2 * self.lead_after).min(LEAD_AT_MOST);
        self.lead_at = Some(time + self.lead_after + random() % LEAD_SCATTER);
        true
    }

    /// The only sign of life where nothing answers probes.
    fn look_at_handshake(&mut self, view: &View, in_kernel: bool, time: Nanos) {
        if self.tunnel.ever_answered() || time < self.handshake_at {
            return;
        }
        self.handshake_at = time + HANDSHAKES;
        let age = handshake_age(view, &self.name, self.peer, self.slot, in_kernel);
        self.tunnel.on_handshake(age.map_or(0, |age| time.saturating_sub(age)));
    }

    fn confirm_next_hop(&mut self, in_kernel: bool, time: Nanos) {
        if self.next_hop.is_due(time, self.tunnel.last_answer()) {
            self.next_hop.confirm(&self.name, in_kernel, time);
        }
    }

    fn reopen(&mut self, time: Nanos) {
        if self.socket.is_some() || time < self.reopen_at {
            return;
        }
        match Socket::open(&self.name, self.near, self.far) {
            Ok(socket) => (self.socket, self.blind) = (Some(socket), None),
            // The device is gone, or is not what it was: that is the tunnel's fault.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO | libc::EADDRNOTAVAIL)) => {
                self.reopen_at = time + REOPEN;
            }
            Err(error) => self.cannot_probe(&error, time),
        }
    }

    fn cannot_probe(&mut self, error: &io::Error, time: Nanos) {
        self.reopen_at = time + REOPEN;
        if self.blind.replace(error.kind()) != Some(error.kind()) {
            tracing::error!("{} is not probed, and stays as it is: {error}", self.name);
        }
    }

    fn take_answers(&mut self, clocks: Clocks) {
        let Some(socket) = &self.socket else { return };
        let mut buffer = [0; 128];
        for _ in 0..BATCH {
            let Ok((length, arrival)) = socket.receive(&mut buffer, clocks) else { return };
            match wire::parse(&buffer[..length], self.identifier, self.secret) {
                Some(Message::Answer(sequence)) => {
                    self.tunnel.answered(sequence, arrival);
                    self.handover.hear(&self.name, None);
                }
                Some(Message::Report(received, word)) => {
                    self.tunnel.reported(received, arrival);
                    self.handover.hear(&self.name, Some(word));
                }
                None => {}
            }
        }
    }

    fn send(&mut self, sequence: u16, time: Nanos, has_left: bool) {
        // What cannot be sent because of the tunnel counts as sent, and lost.
        let Some(socket) = &self.socket else { return };
        let word = self.handover.ours(&self.name, has_left);
        let message = wire::request(self.identifier, sequence, self.secret, self.tunnel.report(time), word);
        // An error may be that of an earlier probe, told only now.
        let Err(error) = socket.send(&message).or_else(|_| socket.send(&message)) else { return };
        match error.raw_os_error() {
            Some(libc::ENODEV | libc::ENXIO) => self.socket = None,
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => self.tunnel.not_sent(sequence),
            // A packet filter of this host's own.
            Some(libc::EPERM | libc::EACCES) => {
                self.tunnel.not_sent(sequence);
                self.socket = None;
                self.cannot_probe(&error, time);
            }
            _ => tracing::trace!("probing {}: {error}", self.name),
        }
    }

    fn apply_transition(&mut self, turn: Turn, signs: Signs, view: &View) {
        let was = view.set_live(self.peer, self.slot, turn == Turn::Up);
        if let Some(health) = view.health(self.peer, self.slot) {
            health.changed_ns.set(boot_time_ns().max(1));
            if matches!(turn, Turn::Down(_)) {
                health.deaths.set(health.deaths.get().wrapping_add(1));
            }
        }
        // Logged after the write: that is what the packets wait for.
        match turn {
            Turn::Up => tracing::info!("{} is up again", self.name),
            Turn::Left => tracing::info!("{} carries nothing while it is changed", self.name),
            Turn::Down(fault) => tracing::warn!("{} is down: {} ({})", self.name, describe(fault), shown(signs)),
        }
        if was == Some(turn == Turn::Up) {
            tracing::debug!("{} was in that state already", self.name);
        }
    }

    fn publish(&self, view: &View) {
        let Some(health) = view.health(self.peer, self.slot) else { return };
        let round_trip = self.tunnel.round_trip();
        // Set one by one: who reads may see the newest of one and the one before of another.
        health.rtt_min_us.set(in_us(round_trip.minimum()));
        health.rtt_us.set(in_us(round_trip.smoothed()));
        health.rtt_jitter_us.set(in_us(round_trip.smoothed().map(|_| round_trip.deviation())));
        health.loss_ppm.set(self.tunnel.loss().ppm());
    }
}

/// Time since a tunnel's last handshake; `None`: there was none that is known of.
fn handshake_age(view: &View, name: &InterfaceName, peer: u32, slot: u32, in_kernel: bool) -> Option<Nanos> {
    if in_kernel {
        return kernel::last_handshake(name.as_str()).map(|age| Nanos::try_from(age.as_nanos()).unwrap_or(Nanos::MAX));
    }
    let at = view.health(peer, slot).map_or(0, |health| health.last_handshake_ns.get());
    (at != 0).then(|| boot_time_ns().saturating_sub(at))
}

fn describe(fault: Fault) -> &'static str {
    match fault {
        Fault::Sending => "its packets still come in, but ours do not arrive at the other end",
        Fault::Unanswered => "packets still come in, but no answer to a probe",
        Fault::Silent => "nothing comes in from it any more",
        Fault::NoHandshake => "no handshake for more than three minutes, and no probe was ever answered",
    }
}

/// What a tunnel was judged by, in words.
fn shown(signs: Signs) -> String {
    let ago = |at: Option<Nanos>| at.map_or("never".to_owned(), |ago| format!("{} ms ago", ago / MILLISECOND));
    let round_trip = signs.round_trip.map_or("unknown".to_owned(), |time| format!("{} ms", time / MILLISECOND));
    format!(
        "probes missed: {}; last sent of what has come through: {}, through the best other tunnel: {}; last answer: {}; \
         last word of the other end: {}; round trips: {round_trip}",
        signs.missed,
        ago(Some(signs.evidence)),
        ago(signs.others),
        ago(signs.answer),
        ago(signs.report),
    )
}

fn in_us(time: Option<Nanos>) -> u32 {
    // At least 1: 0 stands for not known.
    time.map_or(0, |time| u32::try_from(time / MICROSECOND).unwrap_or(u32::MAX).max(1))
}

fn from_us(us: u32) -> Nanos {
    Nanos::from(us) * MICROSECOND
}

/// What nobody outside can guess.
fn random() -> u64 {
    let mut bytes = [0; 8];
    if File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).is_err() {
        return Clocks::read().monotonic;
    }
    u64::from_ne_bytes(bytes)
}
