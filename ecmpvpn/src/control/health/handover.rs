//! The messages that the two ends of a tunnel exchange in their probes, so that both stop using it before it is
//! changed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::config::InterfaceName;

/// How long a message of the far end counts: its process may end without withdrawing it.
const WISH_HOLDS: Duration = Duration::from_secs(3);

/// What one end says about a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerMessage {
    /// This end asks that both ends send nothing but probes through the tunnel.
    pub asks: bool,
    /// This end sends nothing but probes through the tunnel, because one of the ends asks for it.
    pub has_left: bool,
    /// The id of the key rotation that this end has new keys for; 0: none.
    pub rotation: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Talk {
    asks: bool,
    rotation: u32,
    far: Option<(PeerMessage, Instant)>,
    heard: Option<Instant>,
}

/// The messages of each tunnel, shared between the probing thread and the code that changes tunnels.
#[derive(Clone, Debug, Default)]
pub struct Handover(Arc<Mutex<BTreeMap<InterfaceName, Talk>>>);

impl Handover {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<InterfaceName, Talk>> {
        // A panic cannot leave a record half changed.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn of<T>(&self, tunnel: &InterfaceName, change: impl FnOnce(&mut Talk) -> T) -> T {
        change(self.lock().entry(tunnel.clone()).or_default())
    }

    /// Sets whether this end asks both ends to stop using the tunnel.
    pub fn ask(&self, tunnel: &InterfaceName, asks: bool) {
        self.of(tunnel, |talk| talk.asks = asks);
    }

    /// Sets for which key rotation this end has new keys of the tunnel; 0: none.
    pub fn set_rotation(&self, tunnel: &InterfaceName, rotation: u32) {
        self.of(tunnel, |talk| talk.rotation = rotation);
    }

    /// Withdraws everything that this end says.
    pub fn forget(&self) {
        for talk in self.lock().values_mut() {
            (talk.asks, talk.rotation) = (false, 0);
        }
    }

    /// The last message of the far end; the default one if it is older than 3 s.
    pub fn peer_message(&self, tunnel: &InterfaceName) -> PeerMessage {
        self.of(tunnel, |talk| peer_message(talk))
    }

    /// When the last message or answer came from the far end.
    pub fn last_heard(&self, tunnel: &InterfaceName) -> Option<Instant> {
        self.of(tunnel, |talk| talk.heard)
    }

    /// Whether one of the ends asks both to stop using the tunnel.
    pub(super) fn is_to_be_left(&self, tunnel: &InterfaceName) -> bool {
        self.of(tunnel, |talk| talk.asks || peer_message(talk).asks)
    }

    /// The message to send with the next probe.
    pub(super) fn own_message(&self, tunnel: &InterfaceName, has_left: bool) -> PeerMessage {
        self.of(tunnel, |talk| PeerMessage { asks: talk.asks, has_left, rotation: talk.rotation })
    }

    /// Call it when an answer to a probe arrives (`None`), or a probe of the far end with its message.
    pub(super) fn on_message(&self, tunnel: &InterfaceName, word: Option<PeerMessage>) {
        self.of(tunnel, |talk| {
            let now = Instant::now();
            talk.heard = Some(now);
            if let Some(word) = word {
                talk.far = Some((word, now));
            }
        });
    }
}

fn peer_message(talk: &Talk) -> PeerMessage {
    talk.far.filter(|(_, at)| at.elapsed() < WISH_HOLDS).map(|(word, _)| word).unwrap_or_default()
}
