//! Finding A1: the host has a default route to the far gateway, so that packets without a steered route would leave
//! unencrypted.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::clear::{Outer, Watch};
use lab::kind::Kind;
use lab::sites::{Lab, Running};
use lab::traffic::Stream;
use rustix::process::Signal;

use super::outlive::other_binary;
use super::rotate::{prepare_and_apply, rotate};
use super::stage::{indexes, lab};

/// What somebody else does to A's gateway.
const DISTURBANCES: [&[&str]; 9] = [
    &["link set ecmp0 down"],
    &["link set ecmp0 down", "link set ecmp0 up"],
    &["link delete ecmp0"],
    &["route delete 10.20.0.0/16 dev ecmp0"],
    &["-6 route delete fd00:20::/48 dev ecmp0"],
    &["-4 route flush dev ecmp0", "-6 route flush dev ecmp0"],
    &["route delete unreachable 10.20.0.0/16"],
    &["address flush dev ecmp0"],
    &["link set ecmp0 mtu 1300"],
];
/// How soon steering must be whole again.
const WHOLE_AGAIN: Duration = Duration::from_secs(1);

/// Everything that a site's gateway must have.
fn is_whole(lab: &Lab, known: &str) -> Result<bool> {
    Ok(state(lab)? == known)
}

/// The steering device and its routes, without interface indexes and lifetimes.
fn state(lab: &Lab) -> Result<String> {
    let gateway = &lab.sites[0].gateway;
    let link = gateway.query("ip", "-o address show dev ecmp0").unwrap_or_default();
    let addresses: Vec<&str> = link.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    let flags = gateway.query("ip", "-o link show dev ecmp0").unwrap_or_default();
    let flags: Vec<&str> = flags.split_whitespace().skip(2).take(3).collect();
    let mut routes = gateway.query("ip", "route show proto 236")?;
    routes += &gateway.query("ip", "-6 route show proto 236")?;
    Ok(format!("{addresses:?}\n{flags:?}\n{routes}"))
}

fn wait_until_whole(lab: &Lab, known: &str, within: Duration, what: &str, a: &Running) -> Result<Duration> {
    let since = Instant::now();
    while !is_whole(lab, known)? {
        let now = state(lab)?;
        ensure!(since.elapsed() < within, "{what}: not whole after {within:?}: {now}\nbefore: {known}\n{}", a.output());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(since.elapsed())
}

/// Counts the frames that left in the clear; describes the first.
fn clear(watch: &Watch) -> Result<(usize, String)> {
    let (mut count, mut first) = (0, String::new());
    while let Some(frame) = watch.next()? {
        if count == 0 {
            first = frame;
        }
        count += 1;
    }
    Ok((count, first))
}

fn ensure_clear(watch: &Watch, after: &str) -> Result<()> {
    let (count, first) = clear(watch)?;
    ensure!(count == 0, "after {after}: {count} frames in the clear, the first: {first}");
    Ok(())
}

/// Another build takes over what runs. What the userspace backend carries ends with its process, so that process is
/// killed: after SIGTERM it would leave the host as it was, and its packets would leave as they did.
fn upgrade(lab: &Lab, kind: Kind, a: Running) -> Result<Running> {
    let build = other_binary(lab)?;
    a.stop(if kind == Kind::Kernel { Signal::TERM } else { Signal::KILL })?;
    std::thread::sleep(Duration::from_millis(300));
    let mut upgraded = lab.start_program(0, &build, &[])?;
    upgraded.wait_until_said("is up:")?;
    Ok(upgraded)
}

pub fn nothing_leaves_in_the_clear_when_routes_go(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let [mut a, b] = lab.run()?;
    let gateway = &lab.sites[0].gateway;
    let device = if kind == Kind::Kernel { "bond0" } else { "u0" };
    let far = lab.sites[1].endpoint;
    let default = format!("route add default via {far} dev {device} onlink");
    gateway.ip(&default)?;
    let ports = lab.tunnels.iter().flat_map(|tunnel| tunnel.ports).collect();
    let outer = Outer { network: (0x0a02_0300, 0xffff_ff00), ports };
    let index = indexes(&lab, 1)?.into_iter().find(|(name, _)| name == device).context("no such device")?.1;
    let watch = Watch::begin_at(&lab.sites[1].gateway, Some(u32::try_from(index)?), &outer)?;
    // Without the routes, this is where the packets go: the watch sees them.
    let stream = Stream::start(lab.path_v4(), 16, 1_000)?;
    let known = state(&lab)?;
    ensure!(known.contains("unreachable 10.20.0.0/16") && known.contains("unreachable fd00:20::/48"), "{known}");
    for commands in DISTURBANCES {
        let what = commands.join(", ");
        for command in commands {
            gateway.ip(command)?;
        }
        let took = wait_until_whole(&lab, &known, WHOLE_AGAIN, &what, &a)?;
        println!("{what}: whole again after {took:?}");
        ensure_clear(&watch, &what)?;
        std::thread::sleep(Duration::from_millis(500));
        ensure!(is_whole(&lab, &known)?, "{what}: it does not stay whole: {}", state(&lab)?);
    }
    gateway.sysctl("net/ipv4/ip_forward", "0")?;
    let since = Instant::now();
    while gateway.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward"))?.trim() != "1" {
        ensure!(since.elapsed() < WHOLE_AGAIN + Duration::from_millis(500), "forwarding stays off:\n{}", a.output());
        std::thread::sleep(Duration::from_millis(5));
    }
    let (exit, _, error) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(exit == 0, "{error}");
    ensure_clear(&watch, "a reload")?;
    prepare_and_apply(&lab)?;
    rotate(&lab, 0, &[])?;
    ensure_clear(&watch, "new keys")?;
    // A killed process leaves its routes, or with the userspace backend only the unreachable ones.
    a.signal(Signal::KILL)?;
    a.wait()?;
    std::thread::sleep(Duration::from_millis(300));
    ensure_clear(&watch, "SIGKILL")?;
    let mut a = lab.start_with(0, if kind == Kind::Kernel { &["--persist"] } else { &[] })?;
    a.wait_until_up()?;
    wait_until_whole(&lab, &known, WHOLE_AGAIN, "starting again", &a)?;
    ensure_clear(&watch, "starting again")?;
    let mut a = upgrade(&lab, kind, a)?;
    wait_until_whole(&lab, &known, WHOLE_AGAIN, "an upgrade", &a)?;
    ensure_clear(&watch, "an upgrade")?;
    // From here on the host is as it was, and so is where its packets go.
    drop(stream.stop()?);
    ensure_clear(&watch, "everything")?;
    gateway.ip("link delete ecmp0")?;
    wait_until_whole(&lab, &known, WHOLE_AGAIN, "deleting the device after starting again", &a)?;
    gateway.ip("link delete ecmp0")?;
    a.signal(Signal::TERM)?;
    ensure!(a.wait()?.success(), "stopping in the midst of a repair:\n{}", a.output());
    if kind == Kind::Userspace {
        // The bond takes its route along.
        gateway.ip("route delete default")?;
    }
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    drop(b);
    Ok(())
}
