//! The numbers of packets that a device has sent and received.

use std::fs;

use crate::config::InterfaceName;

/// Every device of the calling thread's network namespace, a line each.
const DEVICES: &str = "/proc/thread-self/net/dev";

/// What the kernel counted at a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packets {
    pub sent: u64,
    /// Packets that could not be sent. Of a tunnel's, those for which a queue below had no room are among them
    /// (`iptunnel_xmit()`, `net/ipv4/ip_tunnel_core.c`).
    pub not_sent: u64,
    pub received: u64,
}

/// Reads the counts of `device`; `None` if there is no such device.
pub fn counted(device: &InterfaceName) -> Option<Packets> {
    parse(&fs::read_to_string(DEVICES).ok()?, device.as_str())
}

/// The format is that of `dev_seq_printf_stats()`, `net/core/net-procfs.c`.
fn parse(devices: &str, device: &str) -> Option<Packets> {
    let counts = devices.lines().find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))?;
    let mut words = counts.split_whitespace();
    let received = words.nth(1)?.parse().ok()?;
    let sent = words.nth(7)?.parse().ok()?;
    let not_sent = words.next()?.parse().ok()?;
    Some(Packets { sent, not_sent, received })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_of_a_device_are_found_by_its_whole_name() {
        let devices = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n\
            \u{20}  wg10:     100       1    0    0    0     0          0         0      100       2    0    0    0     0       0          0\n\
            \u{20}   wg1: 9876543  654321    0    7    0     0          0         0 1234567   12345    3    9    0     0       0          0\n";
        assert_eq!(parse(devices, "wg1"), Some(Packets { sent: 12_345, not_sent: 3, received: 654_321 }));
        assert_eq!(parse(devices, "wg10"), Some(Packets { sent: 2, not_sent: 0, received: 1 }));
        assert_eq!(parse(devices, "wg"), None);
        assert_eq!(parse("wg1: 5 x", "wg1"), None);
        let own = counted(&InterfaceName::new("lo").unwrap()).unwrap();
        assert_eq!(own.sent, own.received);
    }
}
