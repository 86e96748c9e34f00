//! Tests tunnels, steering device, routes and settings, on a host whose uplink does not change.

use std::net::UdpSocket;

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::control::down::TakenDown;
use ecmpvpn::host::{self, Change, HostError, HostLinks, Netlink};
use ecmpvpn::plan::{Backend, Plan};
use ipnet::IpNet;
use serde_json::Value;

use crate::fixture::{Fixture, OPTIONS, Sabotage, chain, name};

fn json(fixture: &Fixture, words: &str) -> Result<Vec<Value>> {
    let text = fixture.ns.query("ip", words)?;
    let values: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("`ip {words}` printed {text}"))?;
    Ok(values.into_iter().filter(|value| value.as_object().is_none_or(|o| !o.is_empty())).collect())
}

/// Checks with iproute2 that a plan is up.
fn check_up(fixture: &Fixture, plan: &Plan, links: &HostLinks) -> Result<()> {
    let kind = match plan.backend {
        Backend::Kernel => "wireguard",
        Backend::Userspace => "tun",
    };
    let steering = (plan.steering.name.clone(), links.steering);
    for (at, (name, index)) in links.tunnels.iter().chain([&steering]).enumerate() {
        let link = &json(fixture, &format!("-d -j link show {name}"))?[0];
        ensure!(link["ifindex"] == *index, "{link}");
        ensure!(link["mtu"] == 1420 && link["linkinfo"]["info_kind"] == kind, "{link}");
        ensure!(link["ifalias"] == format!("ecmpvpn:{}", fixture.site), "{link}");
        ensure!(link["flags"].as_array().is_some_and(|f| f.contains(&"UP".into())), "{link}");
        let addresses = json(fixture, &format!("-j address show {name}"))?[0]["addr_info"].clone();
        let texts: Vec<String> =
            addresses.as_array().context("addresses")?.iter().map(|a| a["local"].to_string()).collect();
        let expected = if at < links.tunnels.len() {
            vec![format!("\"169.254.77.{}\"", 2 * at)]
        } else {
            vec!["\"10.100.0.1\"".to_owned(), "\"fd00:100::1\"".to_owned()]
        };
        ensure!(texts == expected, "{name} has {texts:?}");
        if at < links.tunnels.len() {
            let rp_filter = fixture.ns.query("cat", &format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"))?;
            ensure!(rp_filter.trim() == "2", "rp_filter of {name} is {rp_filter}");
        }
    }
    let route = &json(fixture, "-j -d -4 route show 10.20.0.0/16")?[0];
    ensure!(route["dev"] == "ecmp0" && route["prefsrc"] == "10.100.0.1", "{route}");
    ensure!(route["protocol"].as_str() == Some(&host::ROUTE_PROTOCOL.to_string()), "{route}");
    let route = &json(fixture, "-j -d -6 route show fd00:20::/48")?[0];
    ensure!(route["dev"] == "ecmp0" && route["prefsrc"] == "fd00:100::1", "{route}");
    ensure!(route["gateway"] == "fe80::1" && route["flags"].to_string().contains("onlink"), "{route}");
    for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        ensure!(fixture.ns.query("cat", &format!("/proc/sys/net/{switch}"))?.trim() == "1", "{switch} is off");
    }
    Ok(())
}

pub fn a_round_trip_leaves_no_trace(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    // A setting that differs from its default must also be restored.
    fixture.ns.sysctl("net/ipv4/conf/up0/forwarding", "1")?;
    fixture.ns.sysctl("net/ipv6/conf/up0/forwarding", "1")?;
    fixture.ns.sysctl("net/ipv4/conf/all/accept_redirects", "0")?;
    let before = fixture.dump()?;
    let plan = fixture.plan(backend);
    for round in 0..2 {
        fixture.up_and_down(&plan, |links| {
            check_up(&fixture, &plan, links)?;
            let journal = std::fs::read_to_string(fixture.run_root.join(&fixture.site).join("journal.json"))?;
            for secret in [&plan.tunnels[0].private_key.to_base64()[..40], "private", "preshared"] {
                ensure!(!journal.contains(secret), "the journal has a secret");
            }
            ensure!(before.diff(&fixture.dump()?).is_some(), "nothing shows in the dump");
            Ok(())
        })?;
        fixture.assert_same(&before, &format!("after round {round}"))?;
    }
    Ok(())
}

pub fn a_dry_run_says_what_a_run_does_and_changes_nothing(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    let before = fixture.dump()?;
    let plan = fixture.plan(backend);
    let lines: Vec<String> =
        fixture.inside(async || host::changes(&plan).await)?.iter().map(ToString::to_string).collect();
    fixture.assert_same(&before, "after a dry run")?;
    let (carrier, steering) = match backend {
        Backend::Kernel => ("kernel WireGuard", "WireGuard without peers"),
        Backend::Userspace => ("userspace WireGuard", "TUN"),
    };
    let unreachable = ["10.20.0.0/16", "fd00:20::/48"];
    let unreachable =
        unreachable.map(|to| format!("add an unreachable route to {to}, so that it never leaves unencrypted"));
    let mut expected = unreachable.to_vec();
    expected.extend((0..3).map(|i| {
        format!(
            "create tunnel wg{i} ({carrier}, UDP port {} to 10.5.6.7:{}, address 169.254.77.{}/31, MTU 1420)",
            51820 + i,
            51920 + i,
            2 * i
        )
    }));
    expected
        .push(format!("create steering device ecmp0 ({steering}, addresses 10.100.0.1/32, fd00:100::1/128, MTU 1420)"));
    expected.push("route 10.20.0.0/16 to ecmp0 (source 10.100.0.1)".into());
    expected.push("route fd00:20::/48 to ecmp0 (source fd00:100::1)".into());
    expected.push("turn IPv4 forwarding on (net.ipv4.ip_forward = 1)".into());
    expected.push("turn IPv6 forwarding on (net.ipv6.conf.all.forwarding = 1)".into());
    expected.extend((0..3).map(|i| format!("set net.ipv4.conf.wg{i}.rp_filter to 2")));
    let lines: Vec<String> = lines.into_iter().filter(|line| !line.contains("BPF file system")).collect();
    ensure!(lines == expected, "{lines:#?}");
    Ok(())
}

/// Makes a change of a tunnel, the steering device, a route or a setting fail.
pub fn sabotage(fixture: &Fixture, change: &Change) -> Result<Option<Sabotage>> {
    let ip = |command: String, object: &str, repair: &[String]| {
        fixture.ns.ip(&command)?;
        Ok(Some(Sabotage { object: object.to_owned(), repair: repair.to_vec() }))
    };
    match change {
        Change::CreateTunnel { name, .. } | Change::CreateSteering { name, .. } => {
            ip(format!("link add {name} type veth peer name thief"), name.as_str(), &[format!("link delete {name}")])
        }
        Change::AddRoute { prefix, .. } => {
            // The host already has a route for the prefix. In IPv6, a route with another metric is another route.
            let metric = if prefix.addr().is_ipv6() { " metric 1024" } else { "" };
            let route = format!("{prefix} dev lo{metric}");
            ip(format!("route add {route}"), &prefix.to_string(), &[format!("route delete {route}")])
        }
        Change::AddUnreachable { prefix } => {
            let route = format!("unreachable {prefix} metric 4278198272");
            ip(format!("route add {route}"), &prefix.to_string(), &[format!("route delete {route}")])
        }
        Change::LooseReversePath { device } => ip(format!("link delete {device}"), device.as_str(), &[]),
        Change::EnableForwarding { ipv4 } => {
            let (switch, object) =
                if *ipv4 { ("ipv4/ip_forward", "IPv4") } else { ("ipv6/conf/all/forwarding", "IPv6") };
            make_unwritable(switch)?;
            Ok(Some(Sabotage { object: object.to_owned(), repair: vec![] }))
        }
        Change::AcceptRouterAdvertisements { device } => {
            make_unwritable(&format!("ipv6/conf/{device}/accept_ra"))?;
            Ok(Some(Sabotage { object: device.clone(), repair: vec![] }))
        }
        _ => Ok(None),
    }
}

/// Makes a setting read-only, but only in this thread's mount namespace, which ends with the attempt.
fn make_unwritable(switch: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{switch}");
    rustix::mount::mount_bind(&path, &path)?;
    let flags = rustix::mount::MountFlags::BIND | rustix::mount::MountFlags::RDONLY;
    Ok(rustix::mount::mount_remount(&path, flags, c"")?)
}

/// On a host without the BPF file system, it is mounted and later unmounted. A host where that fails is left as it was.
pub fn the_bpf_file_system_comes_and_goes(backend: Backend) -> Result<()> {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    let fixture = Fixture::new()?;
    let before = fixture.dump()?;
    let plan = fixture.plan(backend);
    let is_mounted = || host::bpffs::is_mounted(std::path::Path::new(host::bpffs::BPFFS));
    for fails in [false, true] {
        fixture.inside(async || {
            while is_mounted() {
                unmount(host::bpffs::BPFFS, UnmountFlags::DETACH)?;
            }
            let (run_dir, mut journal) = fixture.open()?;
            let result = host::bring_up(&plan, &OPTIONS, &mut journal, &mut |change| {
                if fails && matches!(change, Change::MountBpffs) {
                    // Hides the mount point, but only in this thread's mount namespace.
                    mount("none", "/sys/fs", "tmpfs", MountFlags::empty(), c"").expect("needs root");
                }
            })
            .await;
            match result {
                Ok(links) => {
                    ensure!(!fails && is_mounted(), "it is not mounted, or should not be");
                    if let Some(userspace) = links.userspace {
                        userspace.stop().await;
                    }
                    journal.undo(&Netlink::open()?, &mut |_| Ok(())).await?;
                }
                Err(error) => {
                    let text = chain(&error);
                    ensure!(fails && text.contains("/sys/fs/bpf"), "{text}");
                }
            }
            ensure!(journal.is_empty() && !is_mounted(), "the journal or the mount is left");
            run_dir.remove()?;
            anyhow::Ok(())
        })?;
        fixture.assert_same(&before, if fails { "after it failed" } else { "afterwards" })?;
    }
    Ok(())
}

pub fn a_step_that_fails_undoes_the_earlier_ones(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.each_step_fails(&fixture.plan(backend), |change| sabotage(&fixture, change))
}

/// Finding A2.
pub fn an_undo_that_fails_is_tried_again(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.each_undo_fails(&fixture.plan(backend))
}

pub fn another_process_undoes_what_a_crash_left(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    let before = fixture.dump()?;
    let plan = fixture.plan(backend);
    // Everything is dropped, as SIGKILL would do it: the lock and the TUN devices disappear, the rest stays.
    fixture.inside(async || {
        let (_run_dir, mut journal) = fixture.open()?;
        host::bring_up(&plan, &OPTIONS, &mut journal, &mut |_| {}).await.map(drop)?;
        anyhow::Ok(())
    })?;
    ensure!(before.diff(&fixture.dump()?).is_some(), "nothing is left to undo");
    let done = fixture.take_down()?;
    ensure!(done.undone >= 8 && done.stopped.is_none(), "{done:?}");
    fixture.assert_same(&before, "after undoing the crash")?;
    ensure!(fixture.take_down()? == TakenDown::default(), "the second time there is something to do");
    Ok(())
}

fn preflight(fixture: &Fixture, plan: &Plan) -> Result<String> {
    let error: HostError = fixture.inside(async || host::preflight(plan).await).err().context("no error")?;
    Ok(chain(&error))
}

pub fn what_stands_in_the_way_is_named_and_left_alone(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    let plan = fixture.plan(backend);
    let before = fixture.dump()?;
    fixture.inside(async || host::preflight(&plan).await)?;
    fixture.assert_same(&before, "after a good preflight")?;
    let message = |plan: &Plan| preflight(&fixture, plan);

    fixture.ns.ip("link add wg1 type veth peer name thief")?;
    let text = message(&plan)?;
    ensure!(
        text == "wg1 exists and was not made by ecmpvpn (it has no alias): rename the tunnel in the configuration, or remove that device"
    );
    fixture.ns.ip("link set wg1 alias uplink-to-Bern")?;
    ensure!(message(&plan)?.contains("(alias uplink-to-Bern)"));
    fixture.ns.ip(&format!("link set wg1 alias ecmpvpn:{}", fixture.site))?;
    ensure!(message(&plan)?.contains("left over from an earlier run"), "{}", message(&plan)?);
    fixture.ns.ip("link delete wg1")?;

    let taken = fixture.ns.run(|| UdpSocket::bind("[::]:51821"))?;
    ensure!(message(&plan)? == "UDP port 51821 is already in use: choose another listen_port for wg1");
    // Without preflight, the same problem is also noticed, and the changes are undone.
    let error = fixture.inside(async || {
        let (run_dir, mut journal) = fixture.open()?;
        let error = host::bring_up(&plan, &OPTIONS, &mut journal, &mut |_| {}).await.err().context("no error")?;
        run_dir.remove()?;
        anyhow::Ok(chain(&error))
    })?;
    let expected = match backend {
        Backend::Kernel => "UDP port 51821 is already in use",
        Backend::Userspace => {
            "starting tunnel wg1: cannot listen on 10.2.3.4 port 51821: another program has that port"
        }
    };
    ensure!(error.contains(expected), "{error}");
    fixture.assert_same(&before, "after a port in use")?;
    drop(taken);

    fixture.ns.ip("route add 10.20.0.0/16 via 10.2.3.9")?;
    ensure!(
        message(&plan)?
            == "10.20.0.0/16 is already routed via up0: remove that route, or take the prefix out of prefixes"
    );
    fixture.ns.ip("route delete 10.20.0.0/16")?;

    let mut elsewhere = fixture.plan(backend);
    elsewhere.tunnels.iter_mut().for_each(|tunnel| tunnel.local_endpoint = "10.2.3.77".parse().unwrap());
    let text = message(&elsewhere)?;
    ensure!(text.starts_with("local_endpoint 10.2.3.77 of site-b is on no interface of this host"), "{text}");
    fixture.assert_same(&before, "after all of it")
}

/// The cable carries 1,500 bytes. WireGuard adds 60 with IPv4 endpoints, 80 with IPv6 ones.
pub fn tunnels_whose_packets_would_be_fragmented_are_refused(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.ns.ip("route add default via fd00:2::1")?;
    let of_mtu = |mtu: u32, ipv6: bool| {
        let mut config = fixture.config(None, 3);
        config.steering.mtu = mtu;
        if ipv6 {
            config.peers[0].local_endpoint = "fd00:2::4".parse().unwrap();
            config.peers[0].remote_endpoint = "fd00:5::7".parse().unwrap();
        }
        Plan::new(&config, backend)
    };
    for (fits, ipv6, overhead) in [(1440, false, 60), (1420, true, 80)] {
        fixture.inside(async || host::preflight(&of_mtu(fits, ipv6)).await)?;
        let text = preflight(&fixture, &of_mtu(fits + 1, ipv6))?;
        let expected = format!(
            "mtu in [steering] is {}, but up0 sends packets of at most 1500 bytes and WireGuard adds {overhead}: set it \
             to {fits}, or raise the MTU of up0 to 1501; otherwise fragments, which have no ports, put all tunnels on \
             one bond member",
            fits + 1
        );
        ensure!(text == expected, "{text}");
    }
    Ok(())
}

pub fn a_device_that_took_the_name_survives_the_undoing(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    let plan = fixture.plan(backend);
    fixture.up_and_down(&plan, |_| {
        fixture.ns.ip("link delete wg0")?;
        fixture.ns.ip("link add wg0 type veth peer name theirs")?;
        Ok(())
    })?;
    fixture.ns.ip("link show wg0").context("somebody else's device is gone")?;
    Ok(())
}

pub fn forwarding_that_is_on_is_left_alone(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    for switch in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        fixture.ns.sysctl(switch, "1")?;
    }
    // One port must not forward, although the others do.
    fixture.ns.sysctl("net/ipv4/conf/up0/forwarding", "0")?;
    fixture.ns.sysctl("net/ipv6/conf/up0/forwarding", "0")?;
    let before = fixture.dump()?;
    let plan = fixture.plan(backend);
    let lines: Vec<String> =
        fixture.inside(async || host::changes(&plan).await)?.iter().map(ToString::to_string).collect();
    for line in ["leave IPv4 forwarding on", "leave IPv6 forwarding on"] {
        ensure!(lines.iter().any(|l| l == line), "{lines:#?}");
    }
    fixture.up_and_down(&plan, |_| {
        let forwarding = fixture.ns.query("cat", "/proc/sys/net/ipv4/conf/up0/forwarding")?;
        ensure!(forwarding.trim() == "0", "up0 forwards now");
        Ok(())
    })?;
    fixture.assert_same(&before, "afterwards")
}

/// A router advertisement for a raw socket: `ICMPv6` type 134, hop limit 64, lifetime 1,800 s.
const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];

fn advertise(fixture: &Fixture) -> Result<()> {
    use rustix::net::{AddressFamily, Protocol, SendFlags, SocketAddrV6, SocketType, ipproto, sendto, socket, sockopt};
    let links: Vec<Value> = serde_json::from_str(&fixture.far.query("ip", "-j link show f0")?)?;
    let index = u32::try_from(links[0]["ifindex"].as_u64().context("ifindex")?)?;
    fixture.far.run(|| {
        let icmpv6: Protocol = ipproto::ICMPV6;
        let socket = socket(AddressFamily::INET6, SocketType::RAW, Some(icmpv6))?;
        sockopt::set_ipv6_multicast_hops(&socket, 255)?;
        let all_nodes = SocketAddrV6::new("ff02::1".parse()?, 0, 0, index);
        sendto(&socket, &ADVERTISEMENT, SendFlags::empty(), &all_nodes)?;
        anyhow::Ok(())
    })
}

fn advertised_route(fixture: &Fixture) -> Result<String> {
    fixture.ns.query("ip", "-6 route show default proto ra")
}

pub fn router_advertisements_survive_forwarding(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    advertise(&fixture)?;
    for _ in 0..300 {
        if !advertised_route(&fixture)?.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    ensure!(advertised_route(&fixture)?.contains("up0"), "the router advertisement was not taken");
    let before = fixture.dump()?;
    let plan = fixture.plan(backend);
    fixture.up_and_down(&plan, |_| {
        ensure!(advertised_route(&fixture)?.contains("up0"), "the default route is gone");
        let accept = fixture.ns.query("cat", "/proc/sys/net/ipv6/conf/up0/accept_ra")?;
        ensure!(accept.trim() == "2", "accept_ra is {accept}");
        Ok(())
    })?;
    ensure!(advertised_route(&fixture)?.contains("up0"), "the default route is gone afterwards");
    fixture.assert_same(&before, "afterwards")?;
    // The steps now include one that the other tests do not have.
    fixture.each_step_fails(&plan, |change| sabotage(&fixture, change))
}

pub fn many_prefixes_fit(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    let before = fixture.dump()?;
    let mut config = fixture.config(None, 2);
    config.peers[0]
        .prefixes
        .extend((0..700_u32).map(|i| format!("10.{}.{}.0/24", 64 + i / 256, i % 256).parse::<IpNet>().unwrap()));
    let plan = Plan::new(&config, backend);
    fixture.up_and_down(&plan, |_| {
        let routes = fixture.ns.query("ip", "-4 route show dev ecmp0")?;
        ensure!(routes.lines().count() >= 701, "{} routes", routes.lines().count());
        Ok(())
    })?;
    fixture.assert_same(&before, "afterwards")?;
    // A netlink socket must receive its answers completely.
    let links = fixture.inside(async || anyhow::Ok(Netlink::open()?.links().await?))?;
    ensure!(links.iter().any(|link| link.name == name("up0").as_str()));
    Ok(())
}
