//! One end's side of the probes of a tunnel: which messages count. Pure: time and random numbers come from the caller.
//!
//! An answer counts if it brings back this end's identifier and secret. A report counts if the far end sealed it for
//! this end's secret. So it is no report that was recorded before this end had the secret. The secret is renewed again
//! and again, and between two renewals a report must be newer than the last one. An end that does not know the other
//! end's secret yet seals for the secret 0: such a message only tells its own secret.

use super::handover::PeerMessage;
use super::nanos::{Nanos, SECOND};
use super::seal::Keys;
use super::wire::{self, Kind, LENGTH, Probe, Received};

/// How long a secret is used at least. Longer than an answer may take to count, so that the secret of an answer that
/// counts is the current one or the former one. And so short that sequence numbers do not repeat meanwhile.
const RENEW: Nanos = 10 * SECOND;

/// A message that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The answer to this end's probe with this sequence number.
    Answer(u16),
    /// The sequence number of the far end's probe, what that end received from this one, and its message.
    Report(u16, Received, PeerMessage),
}

/// The secrets of both ends of a tunnel, and the last report.
#[derive(Debug)]
pub struct Dialogue {
    keys: Keys,
    identifier: u16,
    secret: u64,
    former: Option<u64>,
    /// An answer brought the current secret back: the far end has it.
    returned: bool,
    since: Nanos,
    /// How long a secret is used.
    renew: Nanos,
    /// The far end's secret; 0: not known.
    far: u64,
    /// Identifier and sequence number of the last report.
    last: Option<(u16, u16)>,
    refused: u64,
}

impl Dialogue {
    /// Begins at `now`, with probes every `interval`. `random`: two numbers that nobody can guess.
    pub fn new(keys: Keys, random: [u64; 2], now: Nanos, interval: Nanos) -> Self {
        Self {
            keys,
            identifier: u16::try_from(random[0] & 0xffff).unwrap_or_default(),
            secret: random[1].max(1),
            former: None,
            returned: false,
            since: now,
            renew: RENEW.max(2 * interval),
            far: 0,
            last: None,
            refused: 0,
        }
    }

    /// Uses the keys that the tunnel has now.
    pub fn set_keys(&mut self, keys: Keys) {
        self.keys = keys;
    }

    /// The identifier of this end's probes, which their answers bring back.
    pub fn identifier(&self) -> u16 {
        self.identifier
    }

    /// The number of messages that looked like reports and did not count.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Builds the next probe, from the ICMP header on. `random`: the next secret, if it is time for one.
    pub fn request(
        &mut self,
        sequence: u16,
        received: Received,
        peer_message: PeerMessage,
        now: Nanos,
        random: impl FnOnce() -> u64,
    ) -> [u8; LENGTH] {
        if self.returned && now.saturating_sub(self.since) >= self.renew {
            self.former = Some(std::mem::replace(&mut self.secret, random().max(1)));
            (self.since, self.returned) = (now, false);
        }
        let probe = Probe { identifier: self.identifier, sequence, secret: self.secret, received, peer_message };
        wire::request(probe, |message| self.keys.seal(message, self.far))
    }

    /// Takes an IPv4 packet from a raw ICMP socket. `None`: it does not count.
    pub fn take(&mut self, packet: &[u8]) -> Option<Heard> {
        let wire::Message { kind, probe, sealed, tag } = wire::parse(packet)?;
        let is_own = probe.secret == self.secret || Some(probe.secret) == self.former;
        if kind == Kind::Answer {
            if !is_own || probe.identifier != self.identifier {
                return None;
            }
            self.returned |= probe.secret == self.secret;
            return Some(Heard::Answer(probe.sequence));
        }
        // A probe with this end's secret is its own, returned by a loop: not a report.
        if is_own || probe.secret == 0 {
            return None;
        }
        let is_for = |secret| self.keys.is_sealed(sealed, secret, tag);
        if is_for(self.secret) || self.former.is_some_and(is_for) {
            let is_newer = |(identifier, sequence): (u16, u16)| {
                identifier != probe.identifier || (1..1 << 15).contains(&probe.sequence.wrapping_sub(sequence))
            };
            if self.last.is_none_or(is_newer) {
                self.last = Some((probe.identifier, probe.sequence));
                self.far = probe.secret;
                return Some(Heard::Report(probe.sequence, probe.received, probe.peer_message));
            }
        } else if is_for(0) {
            self.far = probe.secret;
            return None;
        }
        self.refused = self.refused.saturating_add(1);
        None
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::ordering::Ordering;
    use super::*;
    use crate::config::PrivateKey;

    const RECEIVED: Received = Received { count: 5, age: Some(0), at_probe: None };
    const NOTHING: PeerMessage = PeerMessage {
        asks: false,
        has_left: false,
        rotation: 0,
        ordering: Ordering { offers: false, acts: false, ready: false },
    };

    /// The keys of both ends of a tunnel with the number `tunnel`.
    fn keys([a, b]: &[PrivateKey; 2], tunnel: u8) -> [Keys; 2] {
        let [near, far] = [0, 1].map(|last| Ipv4Addr::new(169, 254, tunnel, last));
        [Keys::derive(a, &b.public_key(), [near, far]), Keys::derive(b, &a.public_key(), [far, near])]
    }

    fn ends() -> [Dialogue; 2] {
        let [a, b] = keys(&[PrivateKey::generate(), PrivateKey::generate()], 1);
        [Dialogue::new(a, [7, 100], 0, SECOND / 10), Dialogue::new(b, [9, 200], 0, SECOND / 10)]
    }

    /// The packet with the probe `sequence`, as a raw socket delivers it.
    fn probe(from: &mut Dialogue, sequence: u16, now: Nanos) -> Vec<u8> {
        let message = from.request(sequence, RECEIVED, NOTHING, now, || 1_000 + now);
        [&[0x45; 20][..], &message].concat()
    }

    /// The answer of the far end's kernel.
    fn answer(mut request: Vec<u8>) -> Vec<u8> {
        request[20] = 0;
        request
    }

    /// Two ends that know each other's secret, and have had their probe 0.
    fn acquainted() -> [Dialogue; 2] {
        let [mut a, mut b] = ends();
        assert_eq!(b.take(&probe(&mut a, 0, 0)), None, "sealed for nobody yet");
        assert_eq!(a.take(&probe(&mut b, 0, 0)), Some(Heard::Report(0, RECEIVED, NOTHING)));
        assert_eq!(b.take(&probe(&mut a, 1, 0)), Some(Heard::Report(1, RECEIVED, NOTHING)));
        assert_eq!([a.refused(), b.refused()], [0, 0]);
        [a, b]
    }

    #[test]
    fn an_answer_must_bring_identifier_and_secret_back() {
        let [mut a, _] = ends();
        let sent = answer(probe(&mut a, 300, 0));
        assert_eq!(a.take(&sent), Some(Heard::Answer(300)));
        for byte in [25, 39] {
            let mut other = sent.clone();
            other[byte] ^= 1;
            assert_eq!(a.take(&other), None, "{byte}");
        }
        assert_eq!(a.refused(), 0);
    }

    #[test]
    fn a_report_counts_only_as_the_far_end_sealed_it_and_once() {
        let [mut a, mut b] = acquainted();
        let report = probe(&mut b, 1, 0);
        for bit in 24 * 8..report.len() * 8 {
            let mut forged = report.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(a.take(&forged), None, "bit {bit}");
        }
        // Wrong marks are no reports at all; the rest was refused.
        assert_eq!(a.refused(), (report.len() as u64 - 24 - 4) * 8);
        assert_eq!(a.take(&report[..report.len() - 1]), None);
        assert_eq!(a.take(&report), Some(Heard::Report(1, RECEIVED, NOTHING)));
        let refused = a.refused();
        assert_eq!(a.take(&report), None, "again");
        assert_eq!(a.refused(), refused + 1);
        let before = probe(&mut b, 0, 0);
        assert_eq!(a.take(&before), None, "an older one");
        let own = probe(&mut a, 2, 0);
        assert_eq!(a.take(&own), None, "the own one, from a loop");
    }

    #[test]
    fn a_report_of_another_tunnel_does_not_count() {
        let sites = [PrivateKey::generate(), PrivateKey::generate()];
        let [near, far] = keys(&sites, 1);
        let [_, other] = keys(&sites, 2);
        let mut a = Dialogue::new(near, [7, 100], 0, SECOND);
        let mut b = Dialogue::new(far, [9, 200], 0, SECOND);
        let mut stranger = Dialogue::new(other, [9, 200], 0, SECOND);
        b.take(&probe(&mut a, 0, 0));
        stranger.far = b.far;
        assert_eq!(a.take(&probe(&mut stranger, 1, 0)), None);
        assert_eq!(a.refused(), 1);
        assert_eq!(a.take(&probe(&mut b, 1, 0)), Some(Heard::Report(1, RECEIVED, NOTHING)));
    }

    #[test]
    fn a_recorded_report_does_not_count_after_a_start_or_two_renewals() {
        let [mut a, mut b] = acquainted();
        let recorded = probe(&mut b, 1, 0);
        let mut restarted = Dialogue::new(a.keys.clone(), [8, 101], 0, SECOND / 10);
        assert_eq!(restarted.take(&recorded), None);
        for round in 1..=2 {
            let returned = answer(probe(&mut a, 2 * round, 0));
            assert_eq!(a.take(&returned), Some(Heard::Answer(2 * round)));
            let late = answer(probe(&mut a, 2 * round + 1, 0));
            let renewed = probe(&mut a, 2 * round + 2, u64::from(round) * RENEW);
            assert_eq!(a.take(&late), Some(Heard::Answer(2 * round + 1)), "its secret is the former one");
            assert_eq!(a.take(&answer(renewed.clone())), Some(Heard::Answer(2 * round + 2)));
            // Sealed for the former secret: on its way when the secret was renewed.
            assert!(a.take(&probe(&mut b, 10 * round, 0)).is_some());
            assert!(b.take(&renewed).is_some());
            assert!(a.take(&probe(&mut b, 10 * round + 1, 0)).is_some());
        }
        a.last = None;
        assert_eq!(a.take(&recorded), None);
    }

    #[test]
    fn a_secret_that_the_far_end_does_not_have_is_not_renewed() {
        let [mut a, mut b] = acquainted();
        // Nothing of this end arrives any more, and what the far end sends still counts.
        for second in 1..100 {
            probe(&mut a, second, u64::from(second) * SECOND);
            assert!(a.take(&probe(&mut b, second, u64::from(second) * SECOND)).is_some());
        }
    }

    #[test]
    fn a_restarted_end_is_understood_again() {
        let [mut a, b] = acquainted();
        let mut b = Dialogue::new(b.keys, [10, 201], 0, SECOND / 10);
        assert_eq!(b.take(&probe(&mut a, 2, 0)), None, "sealed for its former secret");
        assert_eq!(a.take(&probe(&mut b, 0, 0)), None, "only its secret");
        assert!(b.take(&probe(&mut a, 3, 0)).is_some());
        assert!(a.take(&probe(&mut b, 1, 0)).is_some());
        assert!(b.take(&probe(&mut a, 4, 0)).is_some());
    }

    #[test]
    fn new_keys_of_both_ends_go_on_and_those_of_one_do_not() {
        let [mut a, mut b] = acquainted();
        let [new_a, new_b] = keys(&[PrivateKey::generate(), PrivateKey::generate()], 1);
        b.set_keys(new_b);
        assert_eq!(a.take(&probe(&mut b, 1, 0)), None);
        a.set_keys(new_a);
        assert_eq!(a.take(&probe(&mut b, 2, 0)), Some(Heard::Report(2, RECEIVED, NOTHING)));
    }

    #[test]
    fn sequence_numbers_may_begin_again() {
        let [mut a, mut b] = acquainted();
        for sequence in [30_000, 60_000, 1_000] {
            assert!(a.take(&probe(&mut b, sequence, 0)).is_some(), "{sequence}");
        }
        assert_eq!(a.take(&probe(&mut b, 60_001, 0)), None);
    }
}
