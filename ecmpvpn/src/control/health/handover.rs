//! The messages that the two ends of a tunnel exchange in their probes, so that both stop using it before it is
//! changed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::ordering::Ordering;
use super::seal::Keys;
use crate::config::InterfaceName;
use crate::plan::Tunnel;

/// How long a message of the far end counts: its process may end without withdrawing it.
const MESSAGE_LIFETIME: Duration = Duration::from_secs(3);

/// What one end says about a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerMessage {
    /// This end asks that both ends send nothing but probes through the tunnel.
    pub asks: bool,
    /// This end sends nothing but probes through the tunnel, because one of the ends asks for it.
    pub has_left: bool,
    /// The id of the key rotation that this end has new keys for; 0: none.
    pub rotation: u32,
    /// What this end does for the order of sprayed packets.
    pub ordering: Ordering,
}

#[derive(Debug, Default)]
struct Exchanged {
    asks: bool,
    rotation: u32,
    far: Option<(PeerMessage, Instant)>,
    heard: Option<Instant>,
    /// The keys of probes since the tunnel's keys were changed, until the probing thread takes them.
    keys: Option<Keys>,
    answered: Option<Instant>,
    /// The share of the packets sent to the tunnel that are lost on the way, millionths.
    loss_ppm: u32,
    queue: OwnQueue,
}

/// What became of packets in the queue of the link that a tunnel uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnQueue {
    /// Packets that it dropped since this process began.
    pub dropped: u64,
    /// Packets that wait in it, and that a probe may overtake.
    pub overtaken: u32,
}

/// The messages of each tunnel, shared between the probing thread and the code that changes tunnels.
#[derive(Clone, Debug, Default)]
pub struct Handover {
    tunnels: Arc<Mutex<BTreeMap<InterfaceName, Exchanged>>>,
    /// Interface index of the device that holds packets until their time; 0: there is none.
    holding: Arc<AtomicU32>,
}

impl Handover {
    /// Sets the device that holds packets until their time, for order to be restored; 0: there is none.
    pub fn set_holding(&self, ifindex: u32) {
        self.holding.store(ifindex, Relaxed);
    }

    pub(super) fn set_loss_ppm(&self, tunnel: &InterfaceName, loss_ppm: u32) {
        self.with_record(tunnel, |exchanged| exchanged.loss_ppm = loss_ppm);
    }

    /// The share of the packets sent to the tunnel that are lost on the way, millionths; 0 if it is not known.
    pub fn loss_ppm(&self, tunnel: &str) -> u32 {
        let tunnels = self.lock();
        tunnels.iter().find(|(name, _)| name.as_str() == tunnel).map_or(0, |(_, exchanged)| exchanged.loss_ppm)
    }

    /// Sets what became of packets in the queue of the link that the tunnel uses.
    pub fn set_queue(&self, tunnel: &str, queue: OwnQueue) {
        let mut tunnels = self.lock();
        if let Some((_, exchanged)) = tunnels.iter_mut().find(|(name, _)| name.as_str() == tunnel) {
            exchanged.queue = queue;
        }
    }

    pub(super) fn queue(&self, tunnel: &InterfaceName) -> OwnQueue {
        self.with_record(tunnel, |exchanged| exchanged.queue)
    }

    pub(super) fn holding(&self) -> u32 {
        self.holding.load(Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<InterfaceName, Exchanged>> {
        // A panic cannot leave a record half changed.
        self.tunnels.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn with_record<T>(&self, tunnel: &InterfaceName, change: impl FnOnce(&mut Exchanged) -> T) -> T {
        change(self.lock().entry(tunnel.clone()).or_default())
    }

    /// Sets whether this end asks both ends to stop using the tunnel.
    pub fn ask(&self, tunnel: &InterfaceName, asks: bool) {
        self.with_record(tunnel, |exchanged| exchanged.asks = asks);
    }

    /// Sets for which key rotation this end has new keys of the tunnel; 0: none.
    pub fn set_rotation(&self, tunnel: &InterfaceName, rotation: u32) {
        self.with_record(tunnel, |exchanged| exchanged.rotation = rotation);
    }

    /// Tells the probing thread the keys that the tunnel has now.
    pub fn set_keys(&self, tunnel: &Tunnel) {
        let keys = Keys::of(tunnel);
        self.with_record(&tunnel.name, |exchanged| exchanged.keys = keys);
    }

    /// The keys that were set since the last call, if any.
    pub(super) fn take_keys(&self, tunnel: &InterfaceName) -> Option<Keys> {
        self.with_record(tunnel, |exchanged| exchanged.keys.take())
    }

    /// Withdraws everything that this end says.
    pub fn forget(&self) {
        for exchanged in self.lock().values_mut() {
            (exchanged.asks, exchanged.rotation) = (false, 0);
        }
    }

    /// The last message of the far end; the default one if it is older than 3 s.
    pub fn peer_message(&self, tunnel: &InterfaceName) -> PeerMessage {
        self.with_record(tunnel, |exchanged| peer_message(exchanged))
    }

    /// Whether the far end has sent messages in the last 3 s: it then does what [`Self::ask`] asks.
    pub fn is_understood(&self, tunnel: &InterfaceName) -> bool {
        self.with_record(tunnel, |exchanged| exchanged.far.is_some_and(|(_, at)| at.elapsed() < MESSAGE_LIFETIME))
    }

    /// When the far end last answered a probe.
    pub fn last_answer(&self, tunnel: &InterfaceName) -> Option<Instant> {
        self.with_record(tunnel, |exchanged| exchanged.answered)
    }

    /// When the last message or answer came from the far end.
    pub fn last_heard(&self, tunnel: &InterfaceName) -> Option<Instant> {
        self.with_record(tunnel, |exchanged| exchanged.heard)
    }

    /// Whether one of the ends asks both to stop using the tunnel.
    pub(super) fn is_to_be_left(&self, tunnel: &InterfaceName) -> bool {
        self.with_record(tunnel, |exchanged| exchanged.asks || peer_message(exchanged).asks)
    }

    /// The message to send with the next probe.
    pub(super) fn own_message(&self, tunnel: &InterfaceName, has_left: bool, ordering: Ordering) -> PeerMessage {
        self.with_record(tunnel, |exchanged| PeerMessage {
            asks: exchanged.asks,
            has_left,
            rotation: exchanged.rotation,
            ordering,
        })
    }

    /// Call it when an answer to a probe arrives (`None`), or a probe of the far end with its message.
    pub(super) fn on_message(&self, tunnel: &InterfaceName, message: Option<PeerMessage>) {
        self.with_record(tunnel, |exchanged| {
            let now = Instant::now();
            exchanged.heard = Some(now);
            match message {
                Some(message) => exchanged.far = Some((message, now)),
                None => exchanged.answered = Some(now),
            }
        });
    }
}

fn peer_message(exchanged: &Exchanged) -> PeerMessage {
    exchanged.far.filter(|(_, at)| at.elapsed() < MESSAGE_LIFETIME).map(|(message, _)| message).unwrap_or_default()
}
