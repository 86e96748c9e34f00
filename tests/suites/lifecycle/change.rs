//! Changes the configuration while traffic flows.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use ecmpvpn::host::wireguard::kernel;
use lab::kind::Kind;
use lab::sites::Lab;
use rustix::process::Signal;
use serde_json::Value;

use super::stage::{blocks, indexes, lab, rewrite, stream};

/// Removes the tunnel `name` from a site's configuration. Returns its block.
fn take_out(lab: &Lab, site: usize, name: &str) -> Result<String> {
    let mut taken = None;
    rewrite(lab, site, |text| {
        let (tunnel, rest): (Vec<String>, Vec<String>) = blocks(text)
            .into_iter()
            .partition(|block| block.starts_with("[[peer.tunnel]]") && block.contains(&format!("\"{name}\"")));
        taken = tunnel.into_iter().next();
        rest.concat()
    })?;
    taken.with_context(|| format!("no tunnel {name}"))
}

/// Inserts a tunnel's block behind the last tunnel.
fn put_in(lab: &Lab, site: usize, tunnel: &str) -> Result<()> {
    rewrite(lab, site, |text| {
        let mut blocks = blocks(text);
        let last = blocks.iter().rposition(|block| block.starts_with("[[peer.tunnel]]")).expect("a tunnel");
        blocks.insert(last + 1, tunnel.to_owned());
        blocks.concat()
    })
}

fn reload(lab: &Lab, site: usize) -> Result<()> {
    let (code, _, complaint) = lab.ecmpvpn(site, &["reload"])?;
    ensure!(code == 0, "`reload` ended with {code}: {complaint}");
    Ok(())
}

fn tunnel<'a>(stats: &'a Value, name: &str) -> Option<&'a Value> {
    stats["tunnels"].as_array()?.iter().find(|tunnel| tunnel["name"] == name)
}

/// Waits until both sites use a tunnel, and it has answered probes of both. A tunnel that has never answered also
/// counts as up.
fn wait_until_used(lab: &Lab, name: &str) -> Result<()> {
    for _ in 0..100 {
        let up = |site: usize| -> Result<bool> {
            Ok(tunnel(&lab.stats(site)?, name).is_some_and(|tunnel| {
                tunnel["state"] == "up" && tunnel["rtt_us"].as_u64().is_some_and(|time| time > 0)
            }))
        };
        if up(0)? && up(1)? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("{name} does not come up: {} {}", lab.stats(0)?, lab.stats(1)?)
}

pub fn a_reload_adds_and_removes_tunnels(kind: Kind) -> Result<()> {
    let lab = lab(kind, 4)?;
    let before = [lab.sites[0].dump()?, lab.sites[1].dump()?];
    // Both sites begin with three of the four tunnels.
    let fourth = [take_out(&lab, 0, "wg3")?, take_out(&lab, 1, "wg3")?];
    let mut running = [lab.start(0)?, lab.start(1)?];
    for site in &mut running {
        site.wait_until_said("is up:")?;
    }
    for path in [lab.path_v4(), lab.path_v6()] {
        lab::traffic::wait_for_reply(path.from, path.source, path.destination, Duration::from_secs(20))?;
    }
    for name in ["wg0", "wg1", "wg2"] {
        wait_until_used(&lab, name)?;
    }
    std::thread::sleep(Duration::from_secs(1));
    let kept = |indexes: Vec<(String, u64)>| -> Vec<(String, u64)> {
        indexes.into_iter().filter(|(name, _)| !["wg1", "wg3"].contains(&name.as_str())).collect()
    };
    let others = kept(indexes(&lab, 0)?);
    // Two packets that are inside the removed tunnel may be lost.
    stream(&lab, 2, || {
        for (site, fourth) in fourth.iter().enumerate() {
            put_in(&lab, site, fourth)?;
            reload(&lab, site)?;
        }
        wait_until_used(&lab, "wg3")?;
        // The sender comes first, so that what it has put onto the tunnel still arrives.
        for site in 0..2 {
            take_out(&lab, site, "wg1")?;
            reload(&lab, site)?;
        }
        Ok(())
    })
    .inspect_err(|_| running.iter().for_each(|site| eprintln!("{}", site.output())))?;
    let stats = lab.stats(0)?;
    ensure!(tunnel(&stats, "wg1").is_none(), "wg1 is still there: {stats}");
    let carried = tunnel(&stats, "wg3").and_then(|tunnel| tunnel["tx_packets"].as_u64()).context("no wg3")?;
    ensure!(carried > 100, "wg3 has carried {carried} packets");
    ensure!(kept(indexes(&lab, 0)?) == others, "other links were made again");
    ensure!(!indexes(&lab, 0)?.iter().any(|(name, _)| name == "wg1"), "the link wg1 is still there");
    for (site, (running, before)) in running.into_iter().zip(&before).enumerate() {
        let output = running.output();
        ensure!(running.stop(Signal::TERM)?.success(), "{output}");
        let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[site].dump())?;
        ensure!(left.is_none(), "left at site {site}:\n{}", left.unwrap_or_default());
    }
    Ok(())
}

pub fn a_reload_that_cannot_be_changes_nothing(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let running = lab.run()?;
    let site = &lab.sites[0];
    let sound = std::fs::read_to_string(&site.config)?;
    // The first reload leaves its result in the run directory.
    reload(&lab, 0)?;
    let before = site.dump()?;
    let refuse = |why: &str, code: i32, change: &dyn Fn(&str) -> String| -> Result<()> {
        rewrite(&lab, 0, change)?;
        let (ended, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
        ensure!(ended == code && complaint.contains(why), "{why}: it ended with {ended}: {complaint}");
        let changed = before.wait_for_same(Duration::from_secs(3), || site.dump())?;
        ensure!(changed.is_none(), "{why}: it changed\n{}", changed.unwrap_or_default());
        std::fs::write(&site.config, &sound)?;
        Ok(())
    };
    refuse("mtu in [steering]", 2, &|text| text.replacen("mtu = 1420", "mtu = 1400", 1))?;
    // A foreign device has the name of the new tunnel. Only a look at the host shows that.
    site.gateway.ip("link add thief type veth peer name thief1")?;
    let before_thief = site.dump()?;
    let new = "\n[[peer.tunnel]]\nname = \"thief\"\nlisten_port = 51990\nremote_port = 51990\naddress = \"169.254.78.0/31\"\n";
    put_in(&lab, 0, new)?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(
        code == 1 && complaint.contains("thief exists and was not made by ecmpvpn"),
        "it ended with {code}: {complaint}"
    );
    ensure!(before_thief.diff(&site.dump()?).is_none(), "it changed something");
    std::fs::write(&site.config, &sound)?;
    // A foreign route conflicts with a new prefix.
    site.gateway.ip("route add 10.77.0.0/16 dev lo")?;
    let before_route = site.dump()?;
    rewrite(&lab, 0, |text| text.replacen("prefixes = [", "prefixes = [\"10.77.0.0/16\", ", 1))?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(code == 1 && complaint.contains("10.77.0.0/16 is already routed"), "it ended with {code}: {complaint}");
    ensure!(before_route.diff(&site.dump()?).is_none(), "it changed something");
    std::fs::write(&site.config, &sound)?;
    reload(&lab, 0)?;
    let [a, b] = running;
    drop((a, b));
    Ok(())
}

/// `reload --dry-run` says what would change and changes nothing. What `reload --confirm` changes is changed back, unless
/// it is confirmed.
pub fn a_reload_is_shown_and_tried(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [mut a, _b] = lab.run()?;
    let site = &lab.sites[0];
    let sound = std::fs::read_to_string(&site.config)?;
    let ask = |options: &[&str]| lab.ecmpvpn(0, &[&["reload"], options].concat());
    let (code, output, complaint) = ask(&["--dry-run"])?;
    ensure!(code == 0 && output.contains("would change nothing"), "it ended with {code}: {output}{complaint}");
    let before = site.dump()?;
    take_out(&lab, 0, "wg2")?;
    rewrite(&lab, 0, |text| text.replacen("prefixes = [", "prefixes = [\"10.77.0.0/16\", ", 1))?;
    let changed = std::fs::read_to_string(&site.config)?;
    let (code, output, complaint) = ask(&["--dry-run"])?;
    for words in ["remove tunnel wg2", "route 10.77.0.0/16 to ecmp0"] {
        ensure!(code == 0 && output.contains(words), "it ended with {code}: {output}{complaint}");
    }
    ensure!(before.diff(&site.dump()?).is_none(), "it changed something");
    std::fs::write(&site.config, "junk")?;
    let (code, ..) = ask(&["--dry-run"])?;
    ensure!(code == 2, "it ended with {code}");

    // Tried and not confirmed.
    std::fs::write(&site.config, &changed)?;
    let (code, output, complaint) = ask(&["--confirm", "3"])?;
    ensure!(code == 0 && output.contains("the former configuration returns in 3 s"), "{code}: {output}{complaint}");
    ensure!(tunnel(&lab.stats(0)?, "wg2").is_none(), "wg2 is still there");
    let (code, _, complaint) = ask(&[])?;
    ensure!(code == 1 && complaint.contains("still waits for `ecmpvpn confirm`"), "{code}: {complaint}");
    a.wait_until_said("the former one is in force again")?;
    ensure!(tunnel(&lab.stats(0)?, "wg2").is_some(), "wg2 did not come back");
    ensure!(site.gateway.query("ip", "route show 10.77.0.0/16")?.is_empty(), "the new prefix is still routed");
    wait_until_used(&lab, "wg2")?;

    // Tried and confirmed.
    let (code, _, complaint) = ask(&["--confirm", "5"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    let (code, _, complaint) = lab.ecmpvpn(0, &["confirm"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    a.wait_until_said("the new configuration stays in force")?;
    std::thread::sleep(Duration::from_secs(6));
    ensure!(tunnel(&lab.stats(0)?, "wg2").is_none(), "wg2 came back though it was confirmed");
    std::fs::write(&site.config, &sound)?;
    reload(&lab, 0)?;
    ensure!(a.stop(Signal::TERM)?.success());
    Ok(())
}

/// `run` is killed while a `reload --confirm` waits. The next one returns to the former configuration.
pub fn a_tried_reload_that_is_cut_off_is_taken_back(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let [a, _b] = lab.run()?;
    take_out(&lab, 0, "wg2")?;
    let (code, output, complaint) = lab.ecmpvpn(0, &["reload", "--confirm", "60"])?;
    ensure!(code == 0, "it ended with {code}: {output}{complaint}");
    ensure!(tunnel(&lab.stats(0)?, "wg2").is_none(), "wg2 is still there");
    a.stop(Signal::KILL)?;
    let mut again = lab.start(0)?;
    again.wait_until_said("is up:")?;
    ensure!(again.output().contains("the configuration before that is in force again"), "{}", again.output());
    wait_until_used(&lab, "wg2")?;
    // The file still has the new one. It can be tried again, and a confirmed one stays.
    let (code, output, complaint) = lab.ecmpvpn(0, &["reload", "--confirm", "60"])?;
    ensure!(code == 0, "it ended with {code}: {output}{complaint}");
    let (code, _, complaint) = lab.ecmpvpn(0, &["confirm"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    again.stop(Signal::KILL)?;
    let mut last = lab.start(0)?;
    last.wait_until_said("is up:")?;
    ensure!(tunnel(&lab.stats(0)?, "wg2").is_none(), "wg2 came back though it was confirmed");
    ensure!(last.stop(Signal::TERM)?.success());
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    Ok(())
}

/// The next `run` applies, as a difference, what was changed while no daemon was running.
pub fn a_changed_configuration_is_taken_at_the_next_run(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    rewrite(&lab, 0, |text| text.replacen("prefixes = [", "prefixes = [\"10.78.0.0/16\", ", 1))?;
    let before = lab.sites[0].dump()?;
    let [a, b] = lab.run()?;
    a.stop(Signal::KILL)?;
    let made = indexes(&lab, 0)?;
    rewrite(&lab, 0, |text| {
        text.replacen("10.78.0.0/16", "10.77.0.0/16", 1).replacen("10.100.0.1/32", "10.100.0.9/32", 1)
    })?;
    stream(&lab, 0, || {
        let mut again = lab.start(0)?;
        again.wait_until_said("is up:")?;
        std::thread::sleep(Duration::from_millis(500));
        ensure!(again.stop(Signal::KILL)?.code().is_none());
        Ok(())
    })?;
    ensure!(indexes(&lab, 0)? == made, "links were made again");
    let gateway = &lab.sites[0].gateway;
    ensure!(gateway.query("ip", "route show 10.77.0.0/16")?.contains("ecmp0"), "the new prefix is not routed");
    ensure!(gateway.query("ip", "route show 10.78.0.0/16")?.is_empty(), "the former prefix is still routed");
    if kind == Kind::Kernel {
        for tunnel in &lab.tunnels {
            let peers = gateway.run(|| kernel::peers(&tunnel.name))?;
            let [peer] = &peers[..] else { bail!("{}: {peers:?}", tunnel.name) };
            let allows = |second| peer.allowed_ips.contains(&(Ipv4Addr::new(10, second, 0, 0).into(), 16));
            ensure!(allows(77) && !allows(78), "{}: {peer:?}", tunnel.name);
        }
    }
    let addresses = gateway.query("ip", "-4 address show ecmp0")?;
    ensure!(addresses.contains("10.100.0.9") && !addresses.contains("10.100.0.1/"), "{addresses}");
    let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
    ensure!(code == 0, "`down` ended with {code}: {complaint}");
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left:\n{}", left.unwrap_or_default());
    drop(b);
    Ok(())
}

/// A port with the default route is enslaved only if an option requests it and the bond takes over its addresses.
pub fn the_management_port_is_not_taken(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let gateway = &lab.sites[0].gateway;
    gateway.ip("address add 10.2.3.4/24 dev u0")?;
    gateway.ip("address add 192.0.2.7/24 dev u0")?;
    gateway.ip("link set u0 up")?;
    gateway.ip("route add default via 10.2.3.5 dev u0")?;
    gateway.ip("route add default via 10.2.3.5 dev u0 table 100")?;
    std::thread::sleep(Duration::from_secs(2));
    let before = lab.sites[0].dump()?;
    let refused = |options: &[&str], words: &[&str]| -> Result<()> {
        let (code, _, complaint) = lab.ecmpvpn(0, &[&["run"], options].concat())?;
        ensure!(code == 1 && words.iter().all(|word| complaint.contains(word)), "it ended with {code}: {complaint}");
        let changed = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
        ensure!(changed.is_none(), "it changed\n{}", changed.unwrap_or_default());
        Ok(())
    };
    refused(&[], &["u0 carries the default route via 10.2.3.5", "192.0.2.7/24", "--take-management-port"])?;
    refused(&["--take-management-port"], &["add its addresses", "192.0.2.7/24"])?;
    gateway.ip("address delete 192.0.2.7/24 dev u0")?;
    let before = lab.sites[0].dump()?;
    let mut run = lab.start_with(0, &["--take-management-port"])?;
    run.wait_until_said("is up:")?;
    for table in ["main", "100"] {
        let route = gateway.query("ip", &format!("route show default table {table}"))?;
        ensure!(route.contains("dev bond0"), "the default route of table {table} did not move: {route}");
    }
    ensure!(run.stop(Signal::TERM)?.success());
    let left = before.wait_for_same(Duration::from_secs(8), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left:\n{}", left.unwrap_or_default());
    Ok(())
}
