//! One probed tunnel: sends its probes, reads the answers, and applies what the detector decides.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::Ipv4Addr;
use std::time::UNIX_EPOCH;

use ecmpvpn_common::layout::TunnelId;

use super::detector::{Fault, Others, Settings, Signs, Step, Transition, Tunnel};
use super::dialogue::{Dialogue, Heard};
use super::estimate::RoundTrip;
use super::handover::Handover;
use super::nanos::{MICROSECOND, MILLISECOND, Nanos};
use super::neighbour::NextHop;
use super::ordering::Ordering;
use super::path_loss::{self, PathLoss};
use super::seal::Keys;
use super::socket::{Clocks, Socket};
use super::stamp::Stamp;
use super::watchdog::Watchdog;
use super::wire::Received;
use crate::config::InterfaceName;
use crate::dataplane::{View, boot_time_ns};
use crate::host::packets;
use crate::host::wireguard::kernel;
use crate::plan::{self, far_address};

/// When to try again to open a socket whose device is gone.
const REOPEN: Nanos = 1_000 * MILLISECOND;
/// How often to read the handshake time of tunnels that answer no probe.
const HANDSHAKES: Nanos = 5_000 * MILLISECOND;
/// The most packets to read from one socket before the others get a turn.
const BATCH: usize = 64;
/// How much later the end that does not lead sends its first probe if there is no session yet; plus a random time below
/// `FOLLOWS_SCATTER`. A handshake takes a round trip.
const FOLLOWS: Nanos = 400 * MILLISECOND;
const FOLLOWS_SCATTER: Nanos = 200 * MILLISECOND;
/// How long the leading end waits for the first handshake before it starts another one; plus a random time below
/// `LEAD_SCATTER`. The wait doubles each time, up to `LEAD_AT_MOST`. Needed because WireGuard's own retry after 5 s may
/// cross that of the other end every time.
const LEAD: Nanos = 1_500 * MILLISECOND;
const LEAD_SCATTER: Nanos = 1_000 * MILLISECOND;
const LEAD_AT_MOST: Nanos = 60_000 * MILLISECOND;
/// This many refused reports are logged, then ten times as many, and so on. A few are normal when an end starts, or when
/// keys are renewed.
const REFUSED: u64 = 100;

/// A tunnel that is probed.
pub(super) struct Probed {
    pub(super) name: InterfaceName,
    pub(super) id: TunnelId,
    near: Ipv4Addr,
    far: Ipv4Addr,
    next_hop: NextHop,
    pub(super) socket: Option<Socket>,
    reopen_at: Nanos,
    /// Set while this host itself prevents probes. The tunnel is not judged meanwhile.
    pub(super) blind: Option<io::ErrorKind>,
    /// The next time that the tunnel needs work even if nothing arrives.
    pub(super) wake: Nanos,
    dialogue: Dialogue,
    /// It was up, and showed that by an answer.
    proved: bool,
    /// The log has said that it answers, or need not.
    announced: bool,
    /// At this number of refused reports the log says so.
    complain_at: u64,
    pub(super) tunnel: Tunnel,
    pub(super) watchdog: Watchdog,
    handover: Handover,
    /// What this end tells the far end about the order of packets.
    pub(super) says: Ordering,
    /// What the far end has said about it since the prober last looked.
    pub(super) heard: Option<Ordering>,
    handshake_at: Nanos,
    stamp: Stamp,
    /// Which share of the packets that it carries to the far end is lost. Not measured with the userspace backend.
    loss: PathLoss,
    /// The far end's probe that this end's next one counts at: lower 8 bits of its sequence number, and the packets
    /// received.
    at_probe: Option<(u8, u64)>,
    in_kernel: bool,
    /// When this end starts another handshake because there has been none yet. `None`: this end does not do that, or
    /// needs it no more.
    lead_at: Option<Nanos>,
    /// The time from then until the next attempt.
    lead_after: Nanos,
}

impl Probed {
    /// A tunnel of which `lives` says whether it carries traffic now. Its first probe is due at `first`, or later if the
    /// other end starts the handshake. `None` if its address has no far end.
    pub(super) fn new(
        planned: &plan::Tunnel,
        settings: Settings,
        lives: bool,
        mut first: Nanos,
        in_kernel: bool,
        view: &View,
        handover: &Handover,
    ) -> Option<Self> {
        let id = planned.id();
        // The plan has the newest keys.
        handover.take_keys(&planned.name);
        let round_trip = view
            .health(id)
            .map(|health| RoundTrip::restored(from_us(health.rtt_us.get()), from_us(health.rtt_jitter_us.get())));
        let tunnel = |first| {
            let mut tunnel = Tunnel::new(settings, lives, round_trip.unwrap_or_default(), first);
            if round_trip.is_some_and(|time| time.smoothed().is_some()) {
                tunnel.remember_answers();
            }
            tunnel
        };
        let leads = planned.private_key.public_key().as_bytes() < planned.public_key.as_bytes();
        let has_session = if in_kernel {
            kernel::last_handshake_at(planned.name.as_str()).is_some()
        } else {
            userspace_handshake_age(view, id).is_some()
        };
        if !leads && !has_session {
            // The first packet starts a handshake. If both ends start one at the same time, both fail.
            first += FOLLOWS + random() % FOLLOWS_SCATTER;
        }
        let tunnel = tunnel(first);
        Some(Self {
            name: planned.name.clone(),
            id,
            near: planned.address.addr(),
            far: far_address(planned.address)?,
            next_hop: NextHop::new(planned),
            socket: None,
            reopen_at: 0,
            blind: None,
            wake: 0,
            dialogue: Dialogue::new(Keys::of(planned)?, [random(), random()], first, settings.interval),
            proved: tunnel.is_known_to_answer(),
            announced: tunnel.is_known_to_answer(),
            complain_at: REFUSED,
            tunnel,
            watchdog: Watchdog::new(leads, random()),
            lead_at: (leads && in_kernel).then(|| first + LEAD + random() % LEAD_SCATTER),
            lead_after: LEAD,
            handover: handover.clone(),
            says: Ordering::default(),
            heard: None,
            handshake_at: first + HANDSHAKES,
            stamp: Stamp::default(),
            loss: PathLoss::default(),
            at_probe: None,
            in_kernel,
        })
    }

    /// Takes over a changed plan without a break. Returns `false` if the tunnel must be probed anew: it has another slot
    /// or other addresses.
    pub(super) fn follow(&mut self, planned: &plan::Tunnel, settings: Settings) -> bool {
        if self.id != planned.id() || self.near != planned.address.addr() {
            return false;
        }
        self.tunnel.set_settings(settings);
        self.next_hop = NextHop::new(planned);
        far_address(planned.address) == Some(self.far)
    }

    pub(super) fn step(&mut self, view: &View, others: Others, alternative: bool, clocks: Clocks) {
        let time = clocks.monotonic;
        if let Some(keys) = self.handover.take_keys(&self.name) {
            self.dialogue.set_keys(keys);
        }
        self.reopen(time);
        // First of all: an answer that has arrived counts, however late this thread runs.
        self.take_answers(clocks);
        self.announce();
        if self.blind.is_some() {
            self.wake = self.reopen_at;
            return;
        }
        if time >= self.wake
            && let Ok(counters) = view.tunnel_counters(self.id)
        {
            self.tunnel.received(counters.rx_packets, time);
        }
        // Never stop using the last tunnel that is up.
        let leave = self.handover.is_to_be_left(&self.name) && (alternative || !self.tunnel.live());
        self.tunnel.set_withheld(leave);
        self.tunnel.compare_with(others, time);
        // Read before `poll`, which resets the figures of a dead tunnel.
        let signs = self.tunnel.signs(time);
        let Step { send, transition } = self.tunnel.poll(time);
        if let Some(transition) = transition {
            self.apply_transition(transition, signs, view);
        }
        if let Some(sequence) = send {
            self.send(sequence, time, leave && !self.tunnel.live());
        }
        self.publish(view);
        self.wake = self.tunnel.next_poll(time);
    }

    /// Whether this end must start another handshake now because there has been none yet.
    pub(super) fn leads_now(&mut self, time: Nanos) -> bool {
        let Some(at) = self.lead_at else { return false };
        let has_answered = self.tunnel.ever_answered();
        if !has_answered && time < at {
            return false;
        }
        if has_answered || kernel::last_handshake_at(self.name.as_str()).is_some() {
            self.lead_at = None;
            return false;
        }
        self.lead_after = (2 * self.lead_after).min(LEAD_AT_MOST);
        self.lead_at = Some(time + self.lead_after + random() % LEAD_SCATTER);
        true
    }

    /// Reads the last handshake: the only sign of life of a tunnel that answers no probe.
    pub(super) fn look_at_handshake(&mut self, view: &View, in_kernel: bool, clocks: Clocks) {
        let time = clocks.monotonic;
        if self.tunnel.ever_answered() || time < self.handshake_at {
            return;
        }
        self.handshake_at = time + HANDSHAKES;
        self.tunnel.on_handshake(if in_kernel {
            let at = kernel::last_handshake_at(self.name.as_str()).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            self.stamp.at(at.and_then(|at| Nanos::try_from(at.as_nanos()).ok()), clocks.wall, time)
        } else {
            userspace_handshake_age(view, self.id).map_or(0, |age| time.saturating_sub(age))
        });
    }

    pub(super) fn confirm_next_hop(&mut self, in_kernel: bool, time: Nanos) {
        if self.next_hop.is_due(time, self.tunnel.last_answer()) {
            self.next_hop.confirm(&self.name, in_kernel, time);
        }
    }

    fn reopen(&mut self, time: Nanos) {
        if self.socket.is_some() || time < self.reopen_at {
            return;
        }
        match Socket::open(&self.name, self.near, self.far, self.dialogue.identifier()) {
            Ok(socket) => (self.socket, self.blind) = (Some(socket), None),
            // The device is gone or has changed: then the tunnel counts as failing.
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
            let Ok((length, arrival)) = socket.receive(&mut buffer, clocks) else { break };
            match self.dialogue.take(&buffer[..length]) {
                Some(Heard::Answer(sequence)) => {
                    self.tunnel.answered(sequence, arrival);
                    self.handover.on_message(&self.name, None);
                }
                Some(Heard::Report(sequence, received, message)) => {
                    let at_once = clocks.monotonic.saturating_sub(arrival) < path_loss::AT_ONCE;
                    if self.in_kernel && at_once && sequence.is_multiple_of(path_loss::EVERY) {
                        let [lower, _] = sequence.to_le_bytes();
                        self.at_probe = packets::counted(&self.name).map(|counted| (lower, counted.received));
                    }
                    if let Some(of) = received.at_probe {
                        self.loss.received(of, received.count);
                        self.handover.set_loss_ppm(&self.name, self.loss.ppm());
                    }
                    self.tunnel.reported(received, arrival);
                    self.heard = Some(message.ordering);
                    self.handover.on_message(&self.name, Some(message));
                }
                None => {}
            }
        }
        self.complain();
    }

    /// Logs the first answer.
    fn announce(&mut self) {
        if !self.tunnel.ever_answered() {
            return;
        }
        if !std::mem::replace(&mut self.announced, true) {
            tracing::info!("{} answers", self.name);
        }
        self.proved |= self.tunnel.live();
    }

    /// Logs that somebody at the far site forges reports.
    fn complain(&mut self) {
        let refused = self.dialogue.refused();
        if refused < self.complain_at {
            return;
        }
        self.complain_at = self.complain_at.saturating_mul(10);
        tracing::warn!(
            "{}: ignored {refused} probes that the other site's ecmpvpn did not send for this tunnel: find the program \
             at the other site that sends echo requests to {}",
            self.name,
            self.near
        );
    }

    fn send(&mut self, sequence: u16, time: Nanos, has_left: bool) {
        // A probe that the tunnel itself prevents counts as sent and lost.
        let Some(socket) = &self.socket else { return };
        let message = self.handover.own_message(&self.name, has_left, self.says);
        let mut report = self.tunnel.report(time);
        if let Some((of, count)) = self.at_probe.take() {
            report = Received { count, at_probe: Some(of), ..report };
        }
        if self.in_kernel
            && sequence.is_multiple_of(path_loss::EVERY)
            && let Some(counted) = packets::counted(&self.name)
        {
            self.loss.sent(sequence, counted, self.handover.queue(&self.name));
        }
        let message = self.dialogue.request(sequence, report, message, time, random);
        // The error may belong to an earlier probe, and be reported only now: try once more.
        let Err(error) = socket.send(&message).or_else(|_| socket.send(&message)) else { return };
        match error.raw_os_error() {
            Some(libc::ENODEV | libc::ENXIO) => self.socket = None,
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => self.tunnel.not_sent(sequence),
            // A packet filter on this host.
            Some(libc::EPERM | libc::EACCES) => {
                self.tunnel.not_sent(sequence);
                self.socket = None;
                self.cannot_probe(&error, time);
            }
            _ => tracing::trace!("probing {}: {error}", self.name),
        }
    }

    fn apply_transition(&mut self, transition: Transition, signs: Signs, view: &View) {
        let was = view.set_live(self.id, transition == Transition::Up);
        if let Some(health) = view.health(self.id) {
            health.changed_ns.set(boot_time_ns().max(1));
            if matches!(transition, Transition::Down(_)) {
                health.deaths.set(health.deaths.get().wrapping_add(1));
            }
        }
        // Log after the write: the packets wait for the write.
        match transition {
            Transition::Up if std::mem::replace(&mut self.proved, true) => tracing::info!("{} is up again", self.name),
            Transition::Up => tracing::info!("{} is up", self.name),
            Transition::Withheld => tracing::info!("{} carries nothing while it is changed", self.name),
            Transition::Down(Fault::Silent) if !self.tunnel.is_known_to_answer() => {
                tracing::info!("{} is not used until it answers: another tunnel to that site does", self.name);
            }
            Transition::Down(fault) => {
                tracing::warn!("{} is down: {} ({})", self.name, describe(fault), describe_signs(signs));
            }
        }
        if was == Some(transition == Transition::Up) {
            tracing::debug!("{} was in that state already", self.name);
        }
    }

    fn publish(&self, view: &View) {
        let Some(health) = view.health(self.id) else { return };
        let round_trip = self.tunnel.round_trip();
        // Written one by one: a reader may see new and old values together.
        health.rtt_min_us.set(in_us(round_trip.minimum()));
        health.rtt_us.set(in_us(round_trip.smoothed()));
        health.rtt_jitter_us.set(in_us(round_trip.smoothed().map(|_| round_trip.deviation())));
        health.loss_ppm.set(self.tunnel.loss().ppm());
    }
}

/// Time since the last handshake of a tunnel of the userspace backend; `None`: no handshake is known.
fn userspace_handshake_age(view: &View, id: TunnelId) -> Option<Nanos> {
    let at = view.health(id).map_or(0, |health| health.last_handshake_ns.get());
    (at != 0).then(|| boot_time_ns().saturating_sub(at))
}

fn describe(fault: Fault) -> &'static str {
    match fault {
        Fault::Sending => "packets still come in, but the other end reports that none arrive there",
        Fault::Unanswered => "packets still come in, but no answer to a probe",
        Fault::Silent => "nothing comes in from it any more",
        Fault::NoHandshake => "no handshake for more than three minutes, and no probe was ever answered",
    }
}

/// Describes for the log what the detector knew about the tunnel.
fn describe_signs(signs: Signs) -> String {
    let ago = |at: Option<Nanos>| at.map_or("never".to_owned(), |ago| format!("{} ms ago", ago / MILLISECOND));
    let round_trip = signs.round_trip.map_or("unknown".to_owned(), |time| format!("{} ms", time / MILLISECOND));
    format!(
        "probes missed: {}; latest packet known to have arrived was sent: {}, on the best other tunnel: {}; \
         last answer: {}; last report from the other end: {}; round-trip time: {round_trip}",
        signs.missed,
        ago(Some(signs.evidence)),
        ago(signs.others),
        ago(signs.answer),
        ago(signs.report),
    )
}

fn in_us(time: Option<Nanos>) -> u32 {
    // At least 1: 0 means not known.
    time.map_or(0, |time| u32::try_from(time / MICROSECOND).unwrap_or(u32::MAX).max(1))
}

fn from_us(us: u32) -> Nanos {
    Nanos::from(us) * MICROSECOND
}

/// A number that nobody outside can guess, from `/dev/urandom`.
fn random() -> u64 {
    let mut bytes = [0; 8];
    if File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).is_err() {
        return Clocks::read().monotonic;
    }
    u64::from_ne_bytes(bytes)
}
