//! Restores the order of sprayed packets at the far gateway.
//!
//! The near gateway stamps each sprayed packet with the time when it is expected to arrive, in header fields that carry
//! no meaning or need no certain value: the identification of an IPv4 packet that is no fragment (RFC 6864), or the flow
//! label of IPv6. A mark says that it did so: the reserved bit beside the fragment offset, or the first digit of the flow
//! label. The far gateway removes the mark, and the stamp too unless the packet may still be fragmented: then the stamp
//! stays as its identification, which no other packet of the flow has for 0.27 s. It holds each packet until its stamp,
//! plus the largest error that stamps had lately, so that packets leave in the order of their stamps. A flow's stamps only
//! rise.
//!
//! A stamp of the send time would do too, but then each packet would have to wait for the slowest tunnel, and for the
//! longest queue: and whenever queues grow, packets come too late.
//!
//! There is no state for each flow. The clocks of the gateways need not agree. Below, the *delay* of a packet is its
//! arrival by the clock of this host less its stamp by that of the other: only differences of delays count.

mod release;
mod stamp;

use crate::packet::{Packet, protocol::AH};
pub use release::{MAX_BOUND_NS, Release, release};
pub use stamp::{MAX_AHEAD_NS, stamp};

/// Times in packets are in units of 2^`UNIT_BITS` nanoseconds, modulo 2^16 (0.27 s). A super-packet's segments have
/// consecutive times, because segmentation counts the identification up (`inet_gso_segment()`, `net/ipv4/af_inet.c`).
pub const UNIT_BITS: u32 = 12;

/// A time in units, as packets have it: modulo 2^16.
#[must_use]
#[inline(always)]
pub const fn time_of(now_ns: u64) -> u16 {
    (now_ns >> UNIT_BITS) as u16
}

/// The word of a network header that can carry a stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carrier {
    /// In network byte order.
    pub word: u32,
    pub is_v4: bool,
}

/// Reserved bit of IPv4's fragment field, as a word with identification and fragment field.
const V4_MARK: u32 = u32::from_be(0x8000);
const V4_DONT_FRAGMENT: u32 = u32::from_be(0x4000);
/// More fragments, and the offset.
const V4_FRAGMENT: u32 = u32::from_be(0x3fff);
const V4_TIME: u32 = u32::from_be(0xffff_0000);
/// First digit of the flow label.
const V6_MARK: u32 = u32::from_be(0x000e_0000);
const V6_DIGIT: u32 = u32::from_be(0x000f_0000);
const V6_LABEL: u32 = u32::from_be(0x000f_ffff);

impl Carrier {
    /// From the first two words of a packet. `None`: the packet can carry no stamp.
    #[must_use]
    #[inline(always)]
    pub const fn of([first, second]: [u32; 2]) -> Option<Self> {
        let [version, ..] = first.to_ne_bytes();
        match version >> 4 {
            4 if second & V4_FRAGMENT == 0 => Some(Self { word: second, is_v4: true }),
            6 => Some(Self { word: first, is_v4: false }),
            _ => None,
        }
    }

    /// Offset of the word from the network header.
    #[must_use]
    #[inline(always)]
    pub const fn offset(self) -> u32 {
        if self.is_v4 { 4 } else { 0 }
    }

    /// Whether the packet is marked.
    #[must_use]
    #[inline(always)]
    pub const fn is_marked(self) -> bool {
        if self.is_v4 { self.word & V4_MARK != 0 } else { self.word & V6_DIGIT == V6_MARK }
    }

    /// The stamp of a marked packet.
    #[must_use]
    #[inline(always)]
    pub const fn time(self) -> u16 {
        let word = u32::from_be(self.word);
        if self.is_v4 { (word >> 16) as u16 } else { word as u16 }
    }

    /// The word with mark and stamp.
    #[must_use]
    #[inline(always)]
    pub const fn stamped(self, time: u16) -> u32 {
        if self.is_v4 {
            self.word & !V4_TIME | ((time as u32) << 16).to_be() | V4_MARK
        } else {
            self.word & !V6_LABEL | (time as u32).to_be() | V6_MARK
        }
    }

    /// The word of a stamped packet without its mark, and without the stamp if it needs no identification.
    #[must_use]
    #[inline(always)]
    pub const fn restored(self) -> u32 {
        if !self.is_v4 {
            self.word & !V6_LABEL
        } else if self.word & V4_DONT_FRAGMENT != 0 {
            self.word & !(V4_TIME | V4_MARK)
        } else {
            self.word & !V4_MARK
        }
    }

    /// The word without a mark that the packet's sender made up. A flow label becomes another one, the same for all of
    /// the flow's packets.
    #[must_use]
    #[inline(always)]
    pub const fn unmarked(self) -> u32 {
        if self.is_v4 { self.word & !V4_MARK } else { self.word ^ u32::from_be(0x0008_0000) }
    }
}

/// The carrier of a packet. IPv4's authentication header covers the identification (RFC 4302, section 3.3.3.1.1.1), so
/// such a packet has none.
#[inline(always)]
pub fn carrier<P: Packet + ?Sized>(packet: &P) -> Option<Carrier> {
    // The linear part has at least the network header of what the kernel routes.
    let [first, second, third] = packet.peek(0)?;
    let [_, protocol, ..] = third.to_ne_bytes();
    Carrier::of([first, second]).filter(|carrier| !carrier.is_v4 || protocol != AH)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_stamp_is_read_back_and_leaves_nothing(words in any::<[u32; 2]>(), is_v4 in any::<bool>(), time in any::<u16>()) {
            let [first, second] = words;
            let first = if is_v4 { first & !0xff | 0x45 } else { first & !0xf0 | 0x60 };
            let second = if is_v4 { second & !V4_FRAGMENT & !V4_MARK } else { second };
            let carrier = Carrier::of([first, second]).unwrap();
            let stamped = Carrier { word: carrier.stamped(time), ..carrier };
            prop_assert!(stamped.is_marked());
            prop_assert_eq!(stamped.time(), time);
            let restored = Carrier { word: stamped.restored(), ..carrier };
            prop_assert!(!restored.is_marked());
            if is_v4 && second & V4_DONT_FRAGMENT == 0 {
                prop_assert_eq!(restored.time(), time, "the identification");
            } else {
                prop_assert_eq!(restored.word, carrier.restored());
            }
            let unmarked = Carrier { word: stamped.unmarked(), ..carrier };
            prop_assert!(!unmarked.is_marked());
            // All else stays: flags, version and traffic class.
            let others = if is_v4 { V4_DONT_FRAGMENT | V4_FRAGMENT } else { !V6_LABEL };
            prop_assert_eq!(restored.word & others, carrier.word & others);
        }
    }

    #[test]
    fn fragments_carry_no_stamp() {
        for fragment in [1u32, 0x2000, 0x4001, 0x6000] {
            assert_eq!(Carrier::of([0x45, fragment.to_be()]), None, "{fragment:#x}");
        }
        assert_eq!(Carrier::of([0x55, 0x4000u32.to_be()]), None);
    }
}
