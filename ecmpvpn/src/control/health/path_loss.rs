//! Measures which share of the packets sent to a tunnel is lost on the way. Pure.
//!
//! Packets of a tunnel stay in order. So when a probe arrives, the far end has received what was sent before the probe,
//! except what was lost. It reports how many packets it had received then.
//!
//! What this host's own queue dropped was not lost on the way: those for which it had no room are not sent by the
//! device's count, and what it dropped later (`CoDel`, RFC 8289) is subtracted. Where each flow has a queue of its own, a
//! probe overtakes what waits: that is subtracted too, and makes the result less certain.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts are modulo 2^32, and shares are below 1"
)]

use super::handover::OwnQueue;
use super::nanos::{MILLISECOND, Nanos};
use crate::host::packets::Packets;

/// The probes whose sequence numbers are multiples of this are counted at.
pub const EVERY: u16 = 8;
/// A count that is read later than this after the probe came is not used.
pub const AT_ONCE: Nanos = MILLISECOND / 2;
/// When there are this many packets, and those between [`PROBES`] probes, they count half. A loss of one in ten thousand
/// is some 13 packets then.
const MOST: f64 = 131_072.0;
const PROBES: f64 = 32.0;
/// So they do after this many counts, a minute with the default interval: a tunnel that is avoided carries little, and
/// must be tried again.
const COUNTS: u32 = 75;
/// This many packets may be counted on the wrong side of a probe: those that are being encrypted when it is sent. If it
/// is a few more, little follows: what a loss changes is in proportion to it.
const UNCERTAIN: f64 = 4.0;
/// The same for those that come while the far end reads its count: as a share of the packets since the last one,
/// [`AT_ONCE`] of 0.8 seconds.
const UNCERTAIN_SHARE: f64 = 1.0 / 1_600.0;

/// How much the number of overtaken packets counts at the next probe.
const OVERTAKEN_LATELY: f64 = 0.75;

/// The share of a tunnel's packets that are lost.
#[derive(Debug, Default)]
pub struct PathLoss {
    /// Sequence number of a probe, and the packets sent before it.
    sent: Option<(u16, u32)>,
    /// Packets sent before the last probe that was counted at, and received.
    last: Option<(u32, u32)>,
    packets: f64,
    lost: f64,
    /// How often both were added to since they were halved.
    counts: u32,
    /// Packets between the last two probes.
    between: f64,
    /// Packets that the last probes overtook, at most.
    overtaken: f64,
}

impl PathLoss {
    /// Before the probe `sequence`, the device had counted `device`, and the queue of its link `queue`.
    pub fn sent(&mut self, sequence: u16, device: Packets, queue: OwnQueue) {
        let dropped_later = queue.dropped.saturating_sub(device.not_sent);
        let passed = device.sent.wrapping_sub(dropped_later).wrapping_sub(queue.overtaken.into());
        self.sent = Some((sequence, passed as u32));
        // What waits is read some times between two probes, and may have become more or less meanwhile.
        self.overtaken = f64::from(queue.overtaken).max(self.overtaken * OVERTAKEN_LATELY);
    }

    /// The far end reports that its device had received `count` packets, modulo 2^32, when the probe came whose sequence
    /// number has the lower 8 bits `sequence`.
    pub fn received(&mut self, sequence: u8, count: u64) {
        let count = count as u32;
        let Some((_, sent)) = self.sent.take_if(|(of, _)| of.to_le_bytes()[0] == sequence) else { return };
        let Some(last) = self.last.replace((sent, count)) else { return };
        let (sent, received) = (sent.wrapping_sub(last.0), count.wrapping_sub(last.1));
        // A device was made anew, or the tunnel is dying: that shows elsewhere.
        if sent > u32::MAX / 2 || received < sent / 2 || received > u32::MAX / 2 {
            return;
        }
        self.counts += 1;
        if self.packets >= MOST.max(PROBES * f64::from(sent)) || self.counts > COUNTS {
            (self.packets, self.lost, self.counts) = (self.packets / 2.0, self.lost / 2.0, 0);
        }
        self.between = f64::from(sent);
        self.packets += f64::from(sent);
        self.lost += f64::from(sent) - f64::from(received);
    }

    /// The share that is lost at least, millionths.
    pub fn ppm(&self) -> u32 {
        let certain = self.lost - UNCERTAIN - UNCERTAIN_SHARE * self.between - self.overtaken;
        if self.packets <= 0.0 { 0 } else { (1e6 * certain.max(0.0) / self.packets) as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(sent: u64) -> Packets {
        Packets { sent, ..Packets::default() }
    }

    const EMPTY: OwnQueue = OwnQueue { dropped: 0, overtaken: 0 };

    /// `rounds` probes, with `step` packets between two of them, of which one in `one_in` is lost.
    fn measured(rounds: u32, step: u32, one_in: u32) -> u32 {
        let mut loss = PathLoss::default();
        // Both counts wrap.
        let (mut sent, mut received) = (u32::MAX - 5_000, 7_u32);
        for round in 0..rounds {
            let sequence = u16::try_from(round % 4096).unwrap() * EVERY;
            loss.sent(sequence, device(sent.into()), EMPTY);
            loss.received(sequence.to_le_bytes()[0], u64::from(received + round % 3 * step / 3_200));
            sent = sent.wrapping_add(step);
            let gone = |after: u32| u64::from(after) * u64::from(step) / u64::from(one_in);
            received += step - u32::try_from(gone(round + 1) - gone(round)).unwrap();
        }
        loss.ppm()
    }

    #[test]
    fn a_loss_is_found_whatever_the_number_of_packets() {
        for packets in [2_000, 13_000, 200_000] {
            let found = measured(50 + 1_000_000 / packets, packets, 1_000);
            assert!((500..=1_000).contains(&found), "{packets}: {found}");
        }
        assert!((9_000..=10_000).contains(&measured(20, 13_000, 100)));
    }

    #[test]
    fn packets_around_the_probe_are_no_loss() {
        assert_eq!([20, 2_000, 13_000, 200_000].map(|packets| measured(200, packets, u32::MAX / 300)), [0; 4]);
    }

    #[test]
    fn a_device_made_anew_and_a_late_report_are_no_loss() {
        let mut loss = PathLoss::default();
        for (sequence, sent, received) in [(0, 1_000_000, 1_000_000), (16, 0, 1_000_500), (32, 500, 0), (48, 900, 397)]
        {
            loss.sent(sequence, device(sent), EMPTY);
            loss.received(sequence.to_le_bytes()[0], received);
            loss.received(sequence.to_le_bytes()[0], 0);
            assert_eq!(loss.ppm(), 0);
        }
        loss.sent(64, device(200_000), EMPTY);
        loss.received(48, 0);
        assert_eq!(loss.ppm(), 0);
        loss.received(64, 190_000);
        assert!(loss.ppm() > 40_000, "{}", loss.ppm());
    }

    #[test]
    fn a_tunnel_that_is_avoided_is_tried_again() {
        let mut loss = PathLoss::default();
        let (mut sent, mut received) = (0, 0);
        let mut count = |loss: &mut PathLoss, more: u64, lost: u64| {
            (sent, received) = (sent + more, received + more - lost);
            loss.sent(8, device(sent), EMPTY);
            loss.received(8, received);
            loss.ppm()
        };
        count(&mut loss, 0, 0);
        for _ in 0..20 {
            count(&mut loss, 5_000, 50);
        }
        assert!(loss.ppm() > 9_000);
        // A few hundred packets a second show nothing new, and the loss counts less and less.
        let rounds = (0..10_000).take_while(|_| count(&mut loss, 8, 0) > 100).count();
        assert!((200..1_000).contains(&rounds), "{rounds}");
    }

    #[test]
    fn what_the_own_queue_drops_or_holds_is_no_loss() {
        let mut loss = PathLoss::default();
        let (mut sent, mut received, mut dropped, mut refused) = (0, 0, 0, 0);
        for round in 0..200_u32 {
            // The queue drops some packets after a while and refuses others. It held up to 80 when it was read, and holds
            // half as many more at the probe.
            let waiting = round * 7 % 80;
            loss.sent(
                8,
                Packets { sent, not_sent: refused, received: 0 },
                OwnQueue { dropped: dropped + refused, overtaken: waiting },
            );
            loss.received(8, received - u64::from(waiting * 3 / 2));
            assert_eq!(loss.ppm(), 0, "round {round}");
            (sent, received, dropped, refused) = (sent + 13_000, received + 13_000 - 20, dropped + 20, refused + 5);
        }
    }
}
