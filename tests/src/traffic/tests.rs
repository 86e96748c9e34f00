//! Tests the generator over a plain veth pair.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::*;

struct Pair {
    a: Netns,
    b: Netns,
}

impl Pair {
    fn new() -> Self {
        let (a, b) = (Netns::new("traffic").expect("needs root"), Netns::new("traffic").unwrap());
        a.ip(&format!("link add v0 type veth peer name v0 netns {}", b.name())).unwrap();
        for (ns, last) in [(&a, 1), (&b, 2)] {
            ns.ip(&format!("address add 192.0.2.{last}/24 dev v0")).unwrap();
            ns.ip(&format!("address add fd00::{last}/64 dev v0 nodad")).unwrap();
            ns.ip("link set v0 up").unwrap();
        }
        let pair = Self { a, b };
        for path in [pair.v4(), pair.v6()] {
            // A link that has just come up drops packets until the kernel's link watch has run.
            wait_for_reply(path.from, path.source, path.destination, Duration::from_secs(20)).unwrap();
        }
        pair
    }

    fn v4(&self) -> Path<'_> {
        let end = |last| Ipv4Addr::new(192, 0, 2, last).into();
        Path { from: &self.a, source: end(1), to: &self.b, destination: end(2) }
    }

    fn v6(&self) -> Path<'_> {
        let end = |last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).into();
        Path { from: &self.a, source: end(1), to: &self.b, destination: end(2) }
    }
}

#[test]
fn everything_crosses_a_plain_link_both_ways() {
    let pair = Pair::new();
    for path in [pair.v4(), pair.v6(), pair.v4().reversed(), pair.v6().reversed()] {
        let pings = ping(path.from, path.source, path.destination, 3, 56, Duration::from_secs(5)).unwrap();
        assert_eq!((pings.sent, pings.answered()), (3, 3));
        let report = TcpLoad::bytes(5, 200_001).run(path).unwrap();
        assert!(report.flows.iter().all(|flow| (flow.sent, flow.received) == (200_001, 200_001)));
        let report = UdpLoad { flows: 4, packets: 50, payload: 1200, rate: 50.0 }.run(path).unwrap();
        assert_eq!((report.sent(), report.received()), (200, 200));
        // The link has a queue for each processor. A sender that moves to another processor may overtake its own
        // packets.
        assert!(report.reordered() <= 10, "{} overtaken", report.reordered());
        assert_eq!(report.received_bytes(), 240_000);
        let load = ShortLoad { count: 20, bytes: 30_000, mean_gap: Duration::from_millis(2), seed: 1 };
        let times = load.run(path).unwrap();
        assert!(times.len() == 20 && times.iter().all(|time| *time > Duration::ZERO), "{times:?}");
    }
}

#[test]
fn a_shaped_link_limits_the_goodput() {
    let pair = Pair::new();
    pair.a.tc("qdisc add dev v0 root tbf rate 20mbit burst 16k latency 50ms").unwrap();
    // A number of bytes and not a time: the clock stops after the last byte was read, so that a late reader can only
    // lower the goodput. An emulated machine may be slower than the link.
    let report = TcpLoad::bytes(4, 1_000_000).run(pair.v4()).unwrap();
    let goodput = report.goodput();
    assert!((5.0..20.0).contains(&goodput), "{goodput} Mbit/s");
    assert_eq!(report.sent(), report.received());
    let report = UdpLoad { flows: 1, packets: 2_500, payload: 1250, rate: 40.0 }.run(pair.v4()).unwrap();
    // A busy machine sends more slowly than requested.
    assert!((0.05..0.6).contains(&report.loss()), "{}", report.loss());
}

#[test]
fn a_hole_is_an_error_and_not_a_hang() {
    let pair = Pair::new();
    pair.b.ip("link set v0 down").unwrap();
    let error = TcpLoad::bytes(1, 1).run(pair.v4()).unwrap_err();
    assert!(format!("{error:#}").contains("192.0.2.2"), "{error:#}");
    assert!(wait_for_reply(&pair.a, pair.v4().source, pair.v4().destination, Duration::from_secs(1)).is_err());
}

#[test]
fn flows_of_a_timetable_come_and_go_when_they_should() {
    let pair = Pair::new();
    for (ns, last) in [(&pair.a, 11), (&pair.b, 12)] {
        ns.ip(&format!("address add 192.0.2.{last}/24 dev v0")).unwrap();
    }
    pair.a.tc("qdisc add dev v0 root tbf rate 20mbit burst 16k latency 50ms").unwrap();
    let milliseconds = Duration::from_millis;
    let flow = |source: [u8; 4], begin, end| {
        let path = Path { source: Ipv4Addr::from(source).into(), ..pair.v4() };
        TimedFlow { path, begin: milliseconds(begin), end: milliseconds(end) }
    };
    let flows = vec![flow([192, 0, 2, 11], 3_000, 3_300), flow([192, 0, 2, 1], 0, 300)];
    let run = |window| Timetable { flows: flows.clone(), window, look: LOOK }.run().unwrap();
    let report = run(milliseconds(0)..milliseconds(300));
    assert!(report.goodput() > 2.0 && report.flows[0].source.ip() == flows[0].path.source, "{report:?}");
    assert!(report.flows.iter().all(|flow| flow.sent == flow.received && flow.sent > 0));
    // Nobody sends in this window, and the buffers are empty.
    let report = run(milliseconds(2_000)..milliseconds(2_900));
    assert_eq!(report.window_bytes, 0, "{report:?}");
    let nowhere = Path { destination: Ipv4Addr::new(198, 51, 100, 1).into(), ..pair.v4() };
    let flows = vec![TimedFlow { path: nowhere, begin: Duration::ZERO, end: milliseconds(100) }];
    let error = Timetable { flows, window: Duration::ZERO..Duration::ZERO, look: LOOK }.run().unwrap_err();
    assert!(format!("{error:#}").contains("198.51.100.1"), "{error:#}");
}

#[test]
fn one_quic_flow_arrives_whole_with_each_congestion_control() {
    let pair = Pair::new();
    for end in [&pair.a, &pair.b] {
        end.tc("qdisc replace dev v0 root tbf rate 50mbit burst 16384 limit 312500").unwrap();
    }
    for congestion in [CongestionControl::Cubic, CongestionControl::Bbr, CongestionControl::NewReno] {
        for path in [pair.v4(), pair.v6()] {
            let [begin, from, end] = [0, 200, 600].map(Duration::from_millis);
            let report = QuicLoad { congestion, begin, end, window: from..end }.run(path).unwrap();
            // How much it is depends on the machine. Simulated time shows that a flow fills its link.
            assert!(report.window_bytes > 0 && report.sent >= report.window_bytes, "{congestion:?}: {report:?}");
            assert!(report.packets > report.sent / 1_500 && report.source.ip() == path.source, "{report:?}");
        }
    }
}

#[test]
fn a_paced_stream_is_counted_and_timed() {
    let pair = Pair::new();
    for path in [pair.v4(), pair.v6()] {
        let [begin, from, end] = [50, 100, 300].map(Duration::from_millis);
        let load = RtpLoad { payload: 1_200, rate: 20.0, begin, end, window: from..end };
        let report = load.run(path).unwrap();
        // 20 Mbit/s are 2,083 datagrams a second.
        assert!((300..=521).contains(&report.sent), "{report:?}");
        assert_eq!((report.order.received, report.order.duplicated), (report.sent, 0));
        assert!(report.loss() == 0.0 && report.out_of_order() < 0.05, "{report:?}");
        assert_eq!(report.window_received, report.window_sent);
        assert!((10.0..25.0).contains(&report.goodput()), "{}", report.goodput());
        let Delays { least, median, p99, greatest } = report.delays;
        assert!(Duration::ZERO < least && least <= median && median <= p99 && p99 <= greatest, "{report:?}");
    }
}
