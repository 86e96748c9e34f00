//! The output of `ecmpvpn stats`. The JSON is a contract: fields are only ever added.

use std::collections::BTreeMap;
use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

/// The statistics of one site.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub site: String,
    /// Interface name.
    pub steering_device: String,
    /// The policy in force.
    pub policy: String,
    /// `kernel` or `userspace`.
    pub backend: String,
    /// Where the steering program is attached: `tcx` or `clsact`.
    pub hook: String,
    /// In the configuration's order.
    pub tunnels: Vec<Tunnel>,
    /// The interfaces that carry the tunnels' outer packets.
    pub members: Vec<Member>,
    pub balance: Balance,
    /// How sprayed packets are put back in order, for each remote site.
    pub order: Vec<Order>,
    /// Packets that the program passed on without steering them, by name of the reason.
    pub not_steered: BTreeMap<String, u64>,
    /// Packets that the program dropped, by name of the reason.
    pub dropped: BTreeMap<String, u64>,
}

/// One tunnel. Bytes are those of inner IP packets with headers; each segment of a GSO packet counts with its own
/// headers. Rates are in bits per second over the sampling interval.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tunnel {
    /// Interface name.
    pub name: String,
    /// Name of the remote site.
    pub peer: String,
    pub ifindex: u32,
    /// `up`, `down`, or `missing` (the interface does not exist).
    pub state: String,
    /// Weight in force.
    pub weight: u32,
    /// Present destination of the tunnel's outer packets, such as `10.5.6.7:51822`. It changes if the peer roams.
    pub endpoint: String,
    /// The port that the tunnel's outer packets leave by, as predicted. Empty if it cannot be predicted.
    pub member: String,
    /// The port that the tunnel's outer packets arrive on, as counted. `null` if none arrived yet, or if they arrive on
    /// several ports.
    pub rx_member: Option<String>,
    /// Outer packets that arrived on each port since ecmpvpn counts there. Empty if there is no bond.
    pub rx_members: Vec<RxMember>,
    /// Steered into the tunnel.
    pub tx_packets: u64,
    /// Steered into the tunnel.
    pub tx_bytes: u64,
    /// Received from the tunnel.
    pub rx_packets: u64,
    /// Received from the tunnel.
    pub rx_bytes: u64,
    /// Bits per second.
    pub tx_bps: f64,
    /// Bits per second.
    pub rx_bps: f64,
    /// Number of flow buckets that are on the tunnel now.
    pub buckets: u64,
    /// How many buckets moved here at a pause.
    pub flowlet_moves: u64,
    /// How many buckets `run` moved here.
    pub rebalance_moves: u64,
    /// How many buckets moved here because another tunnel failed, or returned when this tunnel came up again.
    pub failover_moves: u64,
    /// Smoothed round-trip time of probes, microseconds; 0 before the first answer.
    pub rtt_us: u64,
    /// Mean deviation of the round-trip time, microseconds; 0 before the first answer.
    pub rtt_jitter_us: u64,
    /// Lowest round-trip time of the last 10 to 20 seconds, microseconds; 0 before the first answer.
    pub rtt_min_us: u64,
    /// Share of the last 256 probes that were lost, 0 to 1; 0 before the first probe.
    pub loss: f64,
    /// How many times it went down.
    pub deaths: u64,
    /// How many times it was restarted because it stayed down.
    pub restarts: u64,
    /// Seconds since it last went down or came up; -1 if it never did.
    pub changed_s: i64,
    /// Seconds since the last WireGuard handshake; -1 if there was none.
    pub last_handshake_s: i64,
}

/// How sprayed packets to and from one remote site are put back in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Order {
    /// Name of the remote site.
    pub peer: String,
    /// Whether the remote site restores the order of what this one sprays, now.
    pub restored_there: bool,
    /// Whether this site restores the order of what the remote site sprays, now.
    pub restored_here: bool,
    /// Sprayed packets that were sent with their send time; a GSO packet counts as one.
    pub stamped: u64,
    /// Packets that arrived with their send time, and were held until their turn.
    pub restored: u64,
    /// Packets that arrived with their send time when later ones may have passed already.
    pub late: u64,
    /// Packets that arrived with their send time, and a delay that differs too much from the others'.
    pub given_up: u64,
}

/// What arrived from a tunnel on one port.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RxMember {
    /// Interface name.
    pub name: String,
    /// Outer packets.
    pub packets: u64,
    /// Their bytes, outer IP header included.
    pub bytes: u64,
    /// Seconds since the last packet.
    pub last_s: f64,
    /// Whether the tunnel arrives here now, and not only at an earlier time.
    pub current: bool,
}

/// A port that carries outer packets: a bond member, or a plain interface if there is no bond.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Interface name.
    pub name: String,
    /// The interface's own counter.
    pub tx_bytes: u64,
    /// The interface's own counter.
    pub rx_bytes: u64,
    /// Outer packets of the tunnels that arrived here; 0 if there is no bond.
    pub arrived_packets: u64,
    /// Their bytes, outer IP header included.
    pub arrived_bytes: u64,
}

/// How evenly the tunnels are used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Balance {
    /// For each tunnel, bytes per unit of weight: the highest value divided by the mean. 1 is even; an idle VPN has 1
    /// too.
    pub max_over_mean: f64,
}

impl Balance {
    /// Calculates the balance from `(bytes, weight)` of each tunnel. Tunnels of weight 0 are ignored.
    pub fn of(tunnels: impl IntoIterator<Item = (u64, u32)>) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
        let load: Vec<f64> = tunnels
            .into_iter()
            .filter(|(_, weight)| *weight > 0)
            .map(|(bytes, weight)| bytes as f64 / f64::from(weight))
            .collect();
        #[allow(clippy::cast_precision_loss, reason = "there are at most a few thousand tunnels")]
        let mean = load.iter().sum::<f64>() / load.len() as f64;
        let max = load.iter().copied().fold(0.0, f64::max);
        Self { max_over_mean: if mean > 0.0 { max / mean } else { 1.0 } }
    }
}

impl Report {
    /// Calculates the rates from an `earlier` report, which is `seconds` older.
    pub fn set_rates(&mut self, earlier: &Report, seconds: f64) {
        #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 * 8.0 / seconds;
        for tunnel in &mut self.tunnels {
            if let Some(before) = earlier.tunnels.iter().find(|before| before.name == tunnel.name) {
                tunnel.tx_bps = rate(tunnel.tx_bytes, before.tx_bytes);
                tunnel.rx_bps = rate(tunnel.rx_bytes, before.rx_bytes);
            }
        }
    }
}

/// The table for a terminal.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: steering by {} through {} ({}), {} WireGuard",
            self.site, self.policy, self.steering_device, self.hook, self.backend
        )?;
        writeln!(f, "{}", self.tunnel_table())?;
        let far = self.tunnels.iter().filter(|tunnel| !tunnel.endpoint.is_empty());
        let far: Vec<String> = far.map(|tunnel| format!("{} {}", tunnel.name, tunnel.endpoint)).collect();
        writeln!(f, "far ends: {}", if far.is_empty() { "unknown".to_owned() } else { far.join(", ") })?;
        writeln!(f, "fullest tunnel: {:.2} times the mean", self.balance.max_over_mean)?;
        if !self.members.is_empty() {
            writeln!(f, "{}", self.member_table())?;
        }
        for order in self.order.iter().filter(|order| order.stamped + order.restored + order.late + order.given_up > 0)
        {
            let Order { peer, stamped, restored, late, given_up, .. } = order;
            writeln!(
                f,
                "order, {peer}: sent {stamped} stamped; of those that arrived {restored} in turn, {late} late, \
                 {given_up} given up"
            )?;
        }
        for (title, counts) in [("not steered", &self.not_steered), ("dropped", &self.dropped)] {
            let shown: Vec<String> =
                counts.iter().filter(|(_, n)| **n > 0).map(|(reason, n)| format!("{reason} {n}")).collect();
            writeln!(f, "{title}: {}", if shown.is_empty() { "nothing".to_owned() } else { shown.join(", ") })?;
        }
        Ok(())
    }
}

impl Report {
    fn tunnel_table(&self) -> Table {
        let mut table = new_table(&[
            "tunnel",
            "peer",
            "state",
            "weight",
            "member",
            "arrives on",
            "tx",
            "tx rate",
            "rx",
            "rx rate",
            "buckets",
            "rtt",
            "loss",
            "handshake",
        ]);
        for tunnel in &self.tunnels {
            let handshake = match tunnel.last_handshake_s {
                age @ 0.. => format!("{age} s ago"),
                _ => "none yet".to_owned(),
            };
            table.add_row([
                Cell::new(&tunnel.name),
                Cell::new(&tunnel.peer),
                Cell::new(tunnel.shown_state()),
                right_aligned(tunnel.weight),
                Cell::new(if tunnel.member.is_empty() { "?" } else { &tunnel.member }),
                Cell::new(tunnel.arrives_on()),
                right_aligned(bytes(tunnel.tx_bytes)),
                right_aligned(rate(tunnel.tx_bps)),
                right_aligned(bytes(tunnel.rx_bytes)),
                right_aligned(rate(tunnel.rx_bps)),
                right_aligned(tunnel.buckets),
                right_aligned(round_trip(tunnel)),
                right_aligned(percent(tunnel.loss)),
                right_aligned(handshake),
            ]);
        }
        table
    }

    fn member_table(&self) -> Table {
        let mut table = new_table(&["member", "tx", "rx", "tunnels' rx"]);
        for member in &self.members {
            table.add_row([
                Cell::new(&member.name),
                right_aligned(bytes(member.tx_bytes)),
                right_aligned(bytes(member.rx_bytes)),
                right_aligned(bytes(member.arrived_bytes)),
            ]);
        }
        table
    }
}

impl Tunnel {
    /// The state for people. A tunnel whose probes were never answered is in use, but nobody knows whether it works.
    fn shown_state(&self) -> &str {
        if self.state == "up" && self.rtt_us == 0 { "no answer yet" } else { &self.state }
    }

    /// The ports that it arrives on, with their shares if there are several.
    fn arrives_on(&self) -> String {
        let current: Vec<&RxMember> = self.rx_members.iter().filter(|member| member.current).collect();
        let all: u64 = current.iter().map(|member| member.packets).sum();
        match (&self.rx_member, current.as_slice()) {
            (Some(member), _) => member.clone(),
            (None, []) => "?".to_owned(),
            (None, several) => {
                let share = |member: &&RxMember| format!("{} {}%", member.name, member.packets * 100 / all.max(1));
                several.iter().map(share).collect::<Vec<_>>().join(", ")
            }
        }
    }
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header.iter().copied());
    table
}

fn right_aligned(value: impl fmt::Display) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}

/// Smoothed round-trip time and its deviation; a dash before the first answer.
fn round_trip(tunnel: &Tunnel) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let ms = |us: u64| us as f64 / 1000.0;
    match tunnel.rtt_us {
        0 => "-".to_owned(),
        us => format!("{:.1} ± {:.1} ms", ms(us), ms(tunnel.rtt_jitter_us)),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// Bytes with a decimal prefix.
pub fn bytes(count: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    scaled(count as f64, "B")
}

/// Bits per second with a decimal prefix.
pub fn rate(bits_per_second: f64) -> String {
    scaled(bits_per_second, "bit/s")
}

fn scaled(value: f64, unit: &str) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P", "E"];
    let mut value = value;
    let mut at = 0;
    while value >= 999.5 && at + 1 < prefixes.len() {
        value /= 1000.0;
        at += 1;
    }
    let digits = usize::from(at > 0 && value < 99.95);
    format!("{value:.digits$} {}{unit}", prefixes[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            site: "site-a".into(),
            steering_device: "ecmp0".into(),
            policy: "hash".into(),
            backend: "kernel".into(),
            hook: "tcx".into(),
            tunnels: vec![Tunnel {
                name: "wg0".into(),
                peer: "site-b".into(),
                state: "up".into(),
                weight: 1,
                tx_bytes: 5000,
                last_handshake_s: -1,
                rtt_us: 1530,
                rtt_jitter_us: 70,
                loss: 0.0125,
                ..Tunnel::default()
            }],
            members: vec![Member { name: "eno1".into(), tx_bytes: 1, rx_bytes: 2, ..Member::default() }],
            balance: Balance { max_over_mean: 1.0 },
            order: vec![Order { peer: "site-b".into(), stamped: 7, restored: 5, ..Order::default() }],
            not_steered: BTreeMap::from([("no_peer".into(), 3), ("not_ip".into(), 0)]),
            dropped: BTreeMap::new(),
        }
    }

    #[test]
    fn json_holds_every_field_of_the_contract() {
        let json = serde_json::to_value(report()).unwrap();
        for key in
            ["site", "steering_device", "policy", "backend", "tunnels", "members", "balance", "not_steered", "dropped"]
        {
            assert!(json.get(key).is_some(), "{key}");
        }
        let contract = "name peer ifindex state weight member tx_packets tx_bytes rx_packets rx_bytes tx_bps rx_bps \
                        buckets flowlet_moves rebalance_moves failover_moves rtt_us rtt_jitter_us loss last_handshake_s \
                        rtt_min_us deaths restarts changed_s \
                        rx_member rx_members";
        for key in contract.split_whitespace() {
            assert!(json["tunnels"][0].get(key).is_some(), "{key}");
        }
        for key in ["name", "tx_bytes", "rx_bytes", "arrived_packets", "arrived_bytes"] {
            assert!(json["members"][0].get(key).is_some(), "{key}");
        }
        for key in ["peer", "restored_there", "restored_here", "stamped", "restored", "late", "given_up"] {
            assert!(json["order"][0].get(key).is_some(), "{key}");
        }
        assert!(json["balance"]["max_over_mean"].is_f64());
    }

    #[test]
    fn balance_is_by_weight_and_even_when_idle() {
        let even = |tunnels: &[(u64, u32)]| Balance::of(tunnels.iter().copied()).max_over_mean;
        assert!((even(&[]) - 1.0).abs() < f64::EPSILON);
        assert!((even(&[(0, 1), (0, 1)]) - 1.0).abs() < f64::EPSILON);
        assert!((even(&[(10, 1), (20, 2)]) - 1.0).abs() < f64::EPSILON);
        assert!((even(&[(30, 1), (0, 1), (0, 1)]) - 3.0).abs() < f64::EPSILON);
        assert!((even(&[(30, 1), (30, 1), (7, 0)]) - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn rates_are_bits_of_the_difference() {
        let mut now = report();
        let mut before = report();
        before.tunnels[0].tx_bytes = 1000;
        now.set_rates(&before, 0.5);
        assert!((now.tunnels[0].tx_bps - 64_000.0).abs() < 1e-6);
        // A counter that decreased, for example after a restart, must not give a negative rate.
        now.tunnels[0].tx_bytes = 0;
        now.set_rates(&before, 0.5);
        assert!(now.tunnels[0].tx_bps.abs() < 1e-6);
    }

    #[test]
    fn numbers_for_people_keep_three_digits() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (99_960, "100 kB"),
            (1_234_567, "1.2 MB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(rate(18_300_000.0), "18.3 Mbit/s");
    }

    #[test]
    fn the_ports_that_a_tunnel_arrives_on_are_shown() {
        let on = |name: &str, packets, current| RxMember { name: name.into(), packets, current, ..RxMember::default() };
        let mut tunnel = Tunnel::default();
        assert_eq!(tunnel.arrives_on(), "?");
        tunnel.rx_members = vec![on("eno1", 70, true), on("eno2", 30, true), on("eno3", 900, false)];
        assert_eq!(tunnel.arrives_on(), "eno1 70%, eno2 30%");
        tunnel.rx_member = Some("eno2".into());
        assert_eq!(tunnel.arrives_on(), "eno2");
    }

    #[test]
    fn the_table_names_reasons_that_were_seen() {
        let text = report().to_string();
        assert!(text.contains("not steered: no_peer 3\n"), "{text}");
        assert!(text.contains("dropped: nothing"), "{text}");
        assert!(text.contains("none yet"), "{text}");
    }

    #[test]
    fn the_table_shows_what_probes_found() {
        let text = report().to_string();
        assert!(text.contains("1.5 ± 0.1 ms") && text.contains("1.2%"), "{text}");
    }
}
