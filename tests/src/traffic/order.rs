//! Counts what a numbered stream's receiver sees: loss, duplicates and reordering as RFC 4737 defines them. Pure.

/// The datagrams that have arrived.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// Whether each number has arrived.
    seen: Vec<bool>,
    /// The arrivals with a higher number than all before them: number, and position among all arrivals. Both ascend.
    records: Vec<(u32, u32)>,
    /// Different numbers that have arrived.
    pub received: u32,
    /// Arrivals of a number that had arrived before. They count for nothing else.
    pub duplicated: u32,
    /// Arrivals with a lower number than an earlier arrival: Type-P-Reordered (RFC 4737, section 3.3).
    pub reordered: u32,
    /// Greatest reordering extent (RFC 4737, section 4.2.1): how many datagrams before a reordered one arrived the first
    /// one with a higher number.
    pub extent: u32,
    /// Arrivals after one with a number that is higher by 3 or more. QUIC takes such a packet for lost.
    pub beyond_threshold: u32,
}

/// `kPacketThreshold` of RFC 9002, section 6.1.1.
const THRESHOLD: u32 = 3;

impl Order {
    /// A stream of `count` datagrams, numbered from 0.
    pub fn new(count: u32) -> Self {
        Self { seen: vec![false; count as usize], ..Self::default() }
    }

    /// Counts an arrival. Returns whether it is the first one with this number.
    pub fn add(&mut self, number: u32) -> bool {
        let Some(seen) = self.seen.get_mut(number as usize) else { return false };
        if std::mem::replace(seen, true) {
            self.duplicated += 1;
            return false;
        }
        let position = self.received;
        self.received += 1;
        // The first arrival with a higher number is a record: all arrivals before it have lower numbers than it.
        match self.records.get(self.records.partition_point(|(record, _)| *record < number)) {
            None => self.records.push((number, position)),
            Some((_, overtaker)) => {
                self.reordered += 1;
                self.extent = self.extent.max(position - overtaker);
                let highest = self.records.last().map_or(number, |(record, _)| *record);
                self.beyond_threshold += u32::from(highest - number >= THRESHOLD);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(arrivals: &[u32]) -> Order {
        let mut order = Order::new(20);
        for number in arrivals {
            order.add(*number);
        }
        order
    }

    #[test]
    fn a_gap_is_no_reordering() {
        let order = order(&[0, 1, 5, 6, 9]);
        assert_eq!((order.received, order.reordered, order.extent), (5, 0, 0));
    }

    #[test]
    fn an_extent_reaches_back_to_the_first_higher_number() {
        let one = order(&[1, 2, 3, 5, 6, 7, 8, 4, 9, 10]);
        assert_eq!((one.reordered, one.extent, one.beyond_threshold), (1, 4, 1));
        // 6 was overtaken by 7 and 8, which is not yet a loss for QUIC.
        let two = order(&[1, 2, 3, 4, 7, 8, 5, 6, 9, 10]);
        assert_eq!((two.reordered, two.extent, two.beyond_threshold), (2, 3, 1));
        let records = order(&[9, 1, 12, 11, 10]);
        assert_eq!((records.reordered, records.extent, records.beyond_threshold), (3, 2, 1));
    }

    #[test]
    fn a_second_copy_is_a_duplicate_only() {
        let order = order(&[0, 3, 0, 1, 1, 19, 20, 2]);
        assert_eq!((order.received, order.duplicated, order.reordered, order.extent), (5, 2, 2, 3));
    }
}
