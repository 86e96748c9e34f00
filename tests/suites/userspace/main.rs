//! Tests the userspace backend alone: one backend in each of two namespaces, which a veth pair joins.
//!
//! ```text
//! ns a                                    ns b
//! wg-ua 169.254.77.0/31, fd00:77::        wg-ub 169.254.77.1/31, fd00:77::1
//!   | UDP 51820                             | UDP 51821
//! v0 192.0.2.1/24 ----------------------- v0 192.0.2.2/24
//! ```
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

use std::net::IpAddr;
use std::thread::JoinHandle;
use std::time::Duration;

use ecmpvpn::config::{InterfaceName, PresharedKey, PrivateKey};
use ecmpvpn::host::wireguard::userspace::{MAX_MTU, Userspace, UserspaceError};
use ecmpvpn::plan::Tunnel;
use lab::netns::Netns;
use lab::skip::{self, Feature, Tier, requires};
use lab::tests;
use lab::traffic::{Path, TcpLoad, UdpLoad, ping, wait_for_reply};
use tokio::sync::oneshot;

const MTU: u32 = 1420;

/// WireGuard is in the process itself, so the kernel makes no difference.
const TIERS: [Tier; 1] = [Tier::Here];

type Test = (&'static str, fn() -> anyhow::Result<()>);

fn main() {
    let tests: &[Test] = &tests![
        outer_packets_may_be_ipv6,
        traffic_crosses_both_ways_and_the_devices_go,
        a_device_of_somebody_else_is_left_alone,
        what_cannot_start_names_itself_and_leaves_nothing,
        what_is_not_steered_is_dropped,
        garbage_on_the_device_does_not_end_the_tunnel,
    ];
    let features = [Feature::Tun];
    skip::run(tests.iter().map(|(name, test)| requires(&TIERS, &features, name, *test)));
}

fn name(name: &str) -> InterfaceName {
    InterfaceName::new(name).expect("a valid name")
}

struct Ends {
    a: Netns,
    b: Netns,
    tunnels: [Tunnel; 2],
}

fn ends() -> anyhow::Result<Ends> {
    let (a, b) = (Netns::new("uspace")?, Netns::new("uspace")?);
    a.ip(&format!("link add v0 type veth peer name v0 netns {}", b.name()))?;
    for (ns, last) in [(&a, 1), (&b, 2)] {
        ns.ip(&format!("address add 192.0.2.{last}/24 dev v0"))?;
        ns.ip(&format!("address add fd00:99::{last}/64 dev v0 nodad"))?;
        ns.ip("link set v0 up")?;
    }
    wait_for_reply(&a, "192.0.2.1".parse()?, "192.0.2.2".parse()?, Duration::from_secs(30))?;
    let keys = [PrivateKey::generate(), PrivateKey::generate()];
    let preshared = PresharedKey::generate();
    let tunnel = |end: usize| Tunnel {
        name: name(["wg-ua", "wg-ub"][end]),
        peer: 0,
        slot: 0,
        mtu: MTU,
        address: format!("169.254.77.{end}/31").parse().unwrap(),
        private_key: keys[end].clone(),
        public_key: keys[1 - end].public_key(),
        preshared_key: Some(preshared.clone()),
        listen_port: [51820, 51821][end],
        local_endpoint: format!("192.0.2.{}", 1 + end).parse().unwrap(),
        remote_endpoint: format!("192.0.2.{}:{}", 2 - end, [51821, 51820][end]).parse().unwrap(),
        allowed_ips: vec!["169.254.77.0/31".parse().unwrap(), "fd00:77::/64".parse().unwrap()],
    };
    Ok(Ends { tunnels: [tunnel(0), tunnel(1)], a, b })
}

/// A backend that runs in a thread inside a namespace until [`Backend::stop`].
struct Backend {
    stop: Option<oneshot::Sender<()>>,
    thread: JoinHandle<Vec<(InterfaceName, Option<Duration>)>>,
}

impl Backend {
    fn start(ns: &Netns, tunnel: Tunnel) -> anyhow::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = ns.spawn(move || {
            // This thread starts the workers, so they are inside the namespace too.
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(
                async {
                    let mut userspace = Userspace::new();
                    let started = userspace.start_tunnel(&tunnel).await;
                    ready.send(started).unwrap();
                    let _ = stopped.await;
                    let ages = userspace.last_handshakes().await;
                    userspace.stop().await;
                    ages
                },
            )
        });
        is_ready.recv()??;
        Ok(Self { stop: Some(stop), thread })
    }

    fn stop(mut self) -> Vec<(InterfaceName, Option<Duration>)> {
        self.stop.take().unwrap().send(()).expect("the backend waits for this");
        self.thread.join().expect("the backend does not panic")
    }
}

/// Configures the device as the host code does by netlink.
fn set_up(ns: &Netns, tunnel: &Tunnel, end: usize) -> anyhow::Result<()> {
    let name = &tunnel.name;
    ns.ip(&format!("link set {name} mtu {} addrgenmode none", tunnel.mtu))?;
    ns.ip(&format!("address add {} dev {name}", tunnel.address))?;
    ns.ip(&format!("address add fd00:77::{end}/64 dev {name} nodad"))?;
    ns.ip(&format!("link set {name} up"))?;
    Ok(())
}

fn has_link(ns: &Netns, name: &InterfaceName) -> bool {
    ns.ip(&format!("link show {name}")).is_ok()
}

/// Bytes that the device has received and sent.
fn counters(ns: &Netns, name: &InterfaceName) -> anyhow::Result<(u64, u64)> {
    let links: serde_json::Value = serde_json::from_str(&ns.query("ip", &format!("-s -j link show {name}"))?)?;
    let bytes = |side| links[0]["stats64"][side]["bytes"].as_u64().expect("a counter");
    Ok((bytes("rx"), bytes("tx")))
}

fn traffic_crosses_both_ways_and_the_devices_go() -> anyhow::Result<()> {
    let Ends { a, b, tunnels } = ends()?;
    let backends = [Backend::start(&a, tunnels[0].clone())?, Backend::start(&b, tunnels[1].clone())?];
    set_up(&a, &tunnels[0], 0)?;
    set_up(&b, &tunnels[1], 1)?;
    for (source, destination) in [("169.254.77.0", "169.254.77.1"), ("fd00:77::", "fd00:77::1")] {
        let path = Path { from: &a, source: source.parse()?, to: &b, destination: destination.parse()? };
        wait_for_reply(path.from, path.source, path.destination, Duration::from_secs(30))?;
        for path in [path, path.reversed()] {
            // Payloads up to the full MTU: 20 or 40 bytes are for IP, 8 for ICMP.
            let header = if path.source.is_ipv4() { 28 } else { 48 };
            for payload in [0, 1, 56, MTU as usize - header] {
                let pings = ping(path.from, path.source, path.destination, 2, payload, Duration::from_secs(5))?;
                assert_eq!(pings.answered(), 2, "{} bytes from {}", payload, path.source);
            }
            let before = counters(path.to, &tunnels[usize::from(path.to.name() == b.name())].name)?;
            // TCP gives the device 64 KiB at a time, which the kernel segments.
            let report = TcpLoad::bytes(3, 3_000_000).run(path)?;
            assert_eq!(report.received(), 9_000_000);
            let after = counters(path.to, &tunnels[usize::from(path.to.name() == b.name())].name)?;
            assert!((9_000_000..9_900_000).contains(&(after.0 - before.0)), "{before:?} {after:?}");
            let report = UdpLoad { flows: 3, packets: 200, payload: 1200, rate: 20.0 }.run(path)?;
            assert_eq!((report.received(), report.reordered()), (600, 0));
        }
    }
    for (backend, tunnel) in backends.into_iter().zip(&tunnels) {
        let ages = backend.stop();
        assert_eq!(ages.len(), 1);
        assert_eq!(ages[0].0, tunnel.name);
        assert!(ages[0].1.is_some_and(|age| age < Duration::from_secs(60)), "{ages:?}");
    }
    assert!(!has_link(&a, &tunnels[0].name) && !has_link(&b, &tunnels[1].name));
    Ok(())
}

fn outer_packets_may_be_ipv6() -> anyhow::Result<()> {
    let Ends { a, b, mut tunnels } = ends()?;
    for (end, tunnel) in tunnels.iter_mut().enumerate() {
        tunnel.local_endpoint = format!("fd00:99::{}", 1 + end).parse()?;
        tunnel.remote_endpoint.set_ip(format!("fd00:99::{}", 2 - end).parse()?);
    }
    let backends = [Backend::start(&a, tunnels[0].clone())?, Backend::start(&b, tunnels[1].clone())?];
    set_up(&a, &tunnels[0], 0)?;
    set_up(&b, &tunnels[1], 1)?;
    let path = Path { from: &a, source: "169.254.77.0".parse()?, to: &b, destination: "169.254.77.1".parse()? };
    wait_for_reply(path.from, path.source, path.destination, Duration::from_secs(30))?;
    assert_eq!(TcpLoad::bytes(2, 1_000_000).run(path)?.received(), 2_000_000);
    for backend in backends {
        backend.stop();
    }
    Ok(())
}

/// Tries to start a tunnel in `ns`, which must fail.
fn refused(ns: &Netns, tunnel: &Tunnel) -> UserspaceError {
    ns.run(|| {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let mut userspace = Userspace::new();
            let error = userspace.start_tunnel(tunnel).await.expect_err("this cannot start");
            userspace.stop().await;
            error
        })
    })
}

fn a_device_of_somebody_else_is_left_alone() -> anyhow::Result<()> {
    let Ends { a, b: _far, tunnels } = ends()?;
    for make in ["link add wg-ua type veth peer name other", "tuntap add mode tun name wg-ua"] {
        a.ip(make)?;
        let before = a.ip("-d link show wg-ua")?;
        let error = refused(&a, &tunnels[0]);
        assert!(matches!(&error, UserspaceError::NameTaken { name } if name.as_str() == "wg-ua"), "{error}");
        assert_eq!(a.ip("-d link show wg-ua")?, before);
        a.ip("link del wg-ua")?;
    }
    Ok(())
}

fn what_cannot_start_names_itself_and_leaves_nothing() -> anyhow::Result<()> {
    // The far end must be kept: the link, and the address on it, would be removed with it.
    let Ends { a, b: _far, tunnels: [tunnel, _] } = ends()?;
    let taken = a.run(|| std::net::UdpSocket::bind("192.0.2.1:51820"))?;
    let in_use = refused(&a, &tunnel);
    drop(taken);
    let absent = refused(&a, &Tunnel { local_endpoint: "192.0.2.77".parse()?, ..tunnel.clone() });
    let large = refused(&a, &Tunnel { mtu: MAX_MTU + 1, ..tunnel.clone() });
    for (error, words) in [
        (&in_use, ["wg-ua", "51820", "another program has that port"]),
        (&absent, ["wg-ua", "192.0.2.77", "no interface here has that address"]),
        (&large, ["wg-ua", "4065", "steering.mtu"]),
    ] {
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        let all = format!("{error:?} {text}");
        assert!(!all.contains(tunnel.private_key.to_base64().as_str()), "a key in {all}");
        assert!(!all.contains(&format!("{:?}", tunnel.private_key.as_bytes())), "a key in {all}");
    }
    assert!(!has_link(&a, &tunnel.name));
    Ok(())
}

fn what_is_not_steered_is_dropped() -> anyhow::Result<()> {
    let ns = Netns::new("steer")?;
    let (stop, stopped) = oneshot::channel::<()>();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = ns.spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let mut userspace = Userspace::new();
            ready.send(userspace.create_steering(&name("ecmp0"))).unwrap();
            let _ = stopped.await;
            userspace.stop().await;
        });
    });
    is_ready.recv()??;
    ns.ip("link set ecmp0 up addrgenmode none mtu 1420")?;
    ns.ip("address add 10.100.0.1/32 dev ecmp0")?;
    ns.ip("route add 10.20.0.0/16 dev ecmp0")?;
    assert!(ns.ip("link show ecmp0")?.contains("LOWER_UP"), "a route needs the carrier");
    let (source, destination): (IpAddr, IpAddr) = ("10.100.0.1".parse()?, "10.20.0.1".parse()?);
    // More than the device's queue holds. If the reader stopped, packets would be dropped.
    let socket = ns.run(|| std::net::UdpSocket::bind((source, 0)))?;
    for _ in 0..3_000 {
        socket.send_to(&[0; 1000], (destination, 9))?;
        std::thread::sleep(Duration::from_micros(20));
    }
    let pings = ping(&ns, source, destination, 3, 56, Duration::from_millis(100))?;
    assert_eq!((pings.sent, pings.answered()), (3, 0));
    std::thread::sleep(Duration::from_millis(200));
    let links: serde_json::Value = serde_json::from_str(&ns.query("ip", "-s -j link show ecmp0")?)?;
    let (rx, tx) = (&links[0]["stats64"]["rx"], &links[0]["stats64"]["tx"]);
    assert_eq!(rx["packets"], 0, "it answered something: {links}");
    // The kernel itself also sends a multicast report.
    assert!(tx["packets"].as_u64() >= Some(3_003), "it stopped reading: {links}");
    stop.send(()).expect("the backend waits for this");
    thread.join().expect("the backend does not panic");
    assert!(!has_link(&ns, &name("ecmp0")));
    Ok(())
}

fn garbage_on_the_device_does_not_end_the_tunnel() -> anyhow::Result<()> {
    let Ends { a, b, tunnels } = ends()?;
    let backends = [Backend::start(&a, tunnels[0].clone())?, Backend::start(&b, tunnels[1].clone())?];
    set_up(&a, &tunnels[0], 0)?;
    set_up(&b, &tunnels[1], 1)?;
    let (source, destination): (IpAddr, IpAddr) = ("169.254.77.0".parse()?, "169.254.77.1".parse()?);
    wait_for_reply(&a, source, destination, Duration::from_secs(30))?;
    let garbage: [&[u8]; 5] = [&[0], &[0x45], &[0xff; 100], &[0x60; 39], &[0x4f; 19]];
    lab::packet::inject(&a, tunnels[0].name.as_str(), &garbage)?;
    assert_eq!(ping(&a, source, destination, 3, 56, Duration::from_secs(5))?.answered(), 3);
    // While the interface is down, packets are lost. Afterwards everything works again.
    b.ip(&format!("link set {} down", tunnels[1].name))?;
    assert_eq!(ping(&a, source, destination, 3, 56, Duration::from_millis(100))?.answered(), 0);
    b.ip(&format!("link set {} up", tunnels[1].name))?;
    assert_eq!(ping(&a, source, destination, 3, 56, Duration::from_secs(5))?.answered(), 3);
    for backend in backends {
        backend.stop();
    }
    Ok(())
}
