//! What the two ends of a tunnel tell each other in their probes, so that both leave it before it is changed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::config::InterfaceName;

/// The far side's wish counts for so long: its process may end without taking it back.
const WISH_HOLDS: Duration = Duration::from_secs(3);

/// What one end says of a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerMessage {
    /// It wants both ends to send nothing but probes through it.
    pub asks: bool,
    /// It sends nothing but probes through it, because one of the ends wants that.
    pub has_left: bool,
    /// The renewal of keys that it has new keys for; 0: none.
    pub rotation: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Talk {
    asks: bool,
    rotation: u32,
    far: Option<(PeerMessage, Instant)>,
    heard: Option<Instant>,
}

/// Each tunnel's, shared between the probing thread and whoever changes tunnels.
#[derive(Clone, Debug, Default)]
pub struct Handover(Arc<Mutex<BTreeMap<InterfaceName, Talk>>>);

impl Handover {
    fn talks(&self) -> MutexGuard<'_, BTreeMap<InterfaceName, Talk>> {
        // Nothing in it can be left half changed.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn of<T>(&self, tunnel: &InterfaceName, change: impl FnOnce(&mut Talk) -> T) -> T {
        change(self.talks().entry(tunnel.clone()).or_default())
    }

    /// Says whether this end wants the tunnel left.
    pub fn ask(&self, tunnel: &InterfaceName, asks: bool) {
        self.of(tunnel, |talk| talk.asks = asks);
    }

    /// Says which renewal of keys this end has new keys of for the tunnel; 0: none.
    pub fn set_rotation(&self, tunnel: &InterfaceName, rotation: u32) {
        self.of(tunnel, |talk| talk.rotation = rotation);
    }

    /// Takes back all that this end says.
    pub fn forget(&self) {
        for talk in self.talks().values_mut() {
            (talk.asks, talk.rotation) = (false, 0);
        }
    }

    /// What the far end said last; nothing if that is long ago.
    pub fn far(&self, tunnel: &InterfaceName) -> PeerMessage {
        self.of(tunnel, |talk| far(talk))
    }

    /// When anything came from the far end last.
    pub fn heard(&self, tunnel: &InterfaceName) -> Option<Instant> {
        self.of(tunnel, |talk| talk.heard)
    }

    /// Whether one of the ends wants the tunnel left.
    pub(super) fn is_to_be_left(&self, tunnel: &InterfaceName) -> bool {
        self.of(tunnel, |talk| talk.asks || far(talk).asks)
    }

    /// What is sent with the next probe.
    pub(super) fn ours(&self, tunnel: &InterfaceName, has_left: bool) -> PeerMessage {
        self.of(tunnel, |talk| PeerMessage { asks: talk.asks, has_left, rotation: talk.rotation })
    }

    /// An answer to a probe came, or a probe with the far end's word.
    pub(super) fn hear(&self, tunnel: &InterfaceName, word: Option<PeerMessage>) {
        self.of(tunnel, |talk| {
            let now = Instant::now();
            talk.heard = Some(now);
            if let Some(word) = word {
                talk.far = Some((word, now));
            }
        });
    }
}

fn far(talk: &Talk) -> PeerMessage {
    talk.far.filter(|(_, at)| at.elapsed() < WISH_HOLDS).map(|(word, _)| word).unwrap_or_default()
}
