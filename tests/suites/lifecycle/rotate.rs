//! Rotates keys while traffic flows.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::{self, Config, PublicKey};
use ecmpvpn::host::wireguard::kernel;
use lab::kind::Kind;
use lab::sites::{Lab, Running};
use lab::traffic::{Stream, StreamReport, TcpLoad};
use rustix::process::Signal;
use serde_json::Value;

use super::stage::{indexes, lab};

/// Number of flows of the stream, and its packets a second.
const FLOWS: usize = 32;
const RATE: u32 = 1_000;

pub fn rotate(lab: &Lab, site: usize, arguments: &[&str]) -> Result<String> {
    let (code, output, complaint) = lab.ecmpvpn(site, &[&["rotate"], arguments].concat())?;
    ensure!(code == 0, "`rotate {}` ended with {code}: {complaint}", arguments.join(" "));
    Ok(output + &complaint)
}

fn status(lab: &Lab, site: usize) -> Result<Value> {
    let (code, output, complaint) = lab.ecmpvpn(site, &["rotate", "--status", "--json"])?;
    ensure!(code == 0, "`rotate --status` ended with {code}: {complaint}");
    Ok(serde_json::from_str::<Value>(&output)?["rotation"].take())
}

/// Prepares new keys at A, and applies A's file at B.
pub fn prepare_and_apply(lab: &Lab) -> Result<()> {
    let file = lab.dir().join("for-b").display().to_string();
    rotate(lab, 0, &["--prepare", "--output", &file])?;
    let description = rotate(lab, 1, &["--apply", &file])?;
    ensure!(description.contains("follows"), "{description}");
    fs::remove_file(file)?;
    Ok(())
}

fn load(lab: &Lab, site: usize) -> Result<Config> {
    config::load(&lab.sites[site].config).map_err(|error| anyhow::anyhow!("{error}"))
}

/// The public keys that the tunnels of a site should have.
fn own_keys(config: &Config) -> Vec<PublicKey> {
    let tunnels = config.peers[0].tunnels.iter();
    tunnels.map(|tunnel| tunnel.private_key.as_ref().unwrap_or(&config.site.private_key).public_key()).collect()
}

fn stream<T>(lab: &Lab, meanwhile: impl FnOnce() -> Result<T>) -> Result<(StreamReport, T)> {
    let stream = Stream::start(lab.path_v4(), FLOWS, RATE)?;
    // The first packets resolve the neighbours.
    std::thread::sleep(Duration::from_millis(500));
    let done = meanwhile();
    let report = stream.stop()?;
    Ok((report, done?))
}

fn assert_none_lost(report: &StreamReport) -> Result<()> {
    let outages = report.outages();
    ensure!(report.lost() == 0, "{} of {} packets were lost: {outages:?}", report.lost(), report.sent());
    Ok(())
}

fn files(folder: &Path) -> Result<BTreeSet<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// Checks that every tunnel of B has one peer with A's new key, and a handshake that is younger than `since`.
fn assert_in_use(lab: &Lab, kind: Kind, keys: &[PublicKey], since: Instant) -> Result<()> {
    let stats = lab.stats(1)?;
    for (tunnel, key) in lab.tunnels.iter().zip(keys) {
        let shown = stats["tunnels"].as_array().context("no tunnels")?.iter().find(|t| t["name"] == *tunnel.name);
        let shown = shown.with_context(|| format!("no {}", tunnel.name))?;
        ensure!(shown["state"] == "up", "{shown}");
        let age = shown["last_handshake_s"].as_u64().context("no handshake")?;
        ensure!(age <= since.elapsed().as_secs(), "{}: the handshake is {age} s old", tunnel.name);
        if kind == Kind::Kernel {
            let peers = lab.sites[1].gateway.run(|| kernel::peers(&tunnel.name))?;
            ensure!(peers.len() == 1 && peers[0].public_key == *key, "{}: {peers:?} and not {key}", tunnel.name);
            let age = peers[0].last_handshake.with_context(|| format!("no handshake with {key}"))?;
            ensure!(age <= since.elapsed() + Duration::from_secs(1), "{}: {age:?}", tunnel.name);
        }
    }
    Ok(())
}

pub fn keys_are_renewed_without_a_lost_packet(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, b] = lab.run()?;
    let former = own_keys(&load(&lab, 0)?);
    let links = [indexes(&lab, 0)?, indexes(&lab, 1)?];
    let (code, _, complaint) = lab.ecmpvpn(0, &["rotate"])?;
    ensure!(code == 2 && complaint.contains("--prepare"), "it ended with {code}: {complaint}");
    std::thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    let renewed = stream(&lab, || {
        prepare_and_apply(&lab)?;
        rotate(&lab, 0, &[])
    });
    let (report, description) = renewed.with_context(|| format!("A:\n{}\nB:\n{}", a.output(), b.output()))?;
    let took = began.elapsed();
    for tunnel in &lab.tunnels {
        ensure!(description.contains(&format!("{}: works with its new keys", tunnel.name)), "{description}");
    }
    eprintln!("  {}: {} packets, {} lost, renewed in {took:.1?}", kind.name(), report.sent(), report.lost());
    assert_none_lost(&report)?;
    let configs = [load(&lab, 0)?, load(&lab, 1)?];
    let renewed = own_keys(&configs[0]);
    ensure!(renewed.iter().all(|key| !former.contains(key)), "a former key is still configured");
    for (a, b) in configs[0].peers[0].tunnels.iter().zip(&configs[1].peers[0].tunnels) {
        let public = a.private_key.as_ref().context("no key of its own")?.public_key();
        ensure!(b.public_key == Some(public), "{}: the configurations do not match", a.name);
        ensure!(a.preshared_key.is_some() && a.preshared_key == b.preshared_key, "{}: no new pre-shared key", a.name);
    }
    assert_in_use(&lab, kind, &renewed, began)?;
    ensure!([indexes(&lab, 0)?, indexes(&lab, 1)?] == links, "links were made again");
    for site in 0..2 {
        ensure!(status(&lab, site)?["done"] == true, "{}", status(&lab, site)?);
    }
    let said = description + &a.output() + &b.output();
    for tunnel in &configs[0].peers[0].tunnels {
        let secrets = [
            tunnel.private_key.as_ref().map(config::PrivateKey::to_base64),
            tunnel.preshared_key.as_ref().map(config::PresharedKey::to_base64),
        ];
        ensure!(secrets.iter().flatten().all(|secret| !said.contains(secret.as_str())), "a key was printed");
    }
    // A second rotation removes the keys of the first one. The new keys outlive the process.
    prepare_and_apply(&lab)?;
    rotate(&lab, 0, &[])?;
    for (site, per_tunnel) in [(0, 2), (1, 1)] {
        let folder = lab.sites[site].config.parent().context("no folder")?;
        let left = files(folder)?.into_iter().filter(|name| name.starts_with("wg")).count();
        ensure!(left == per_tunnel * lab.tunnels.len(), "{:?}", files(folder)?);
    }
    ensure!(a.stop(Signal::TERM)?.success());
    let mut running = [lab.start(0)?, b];
    running[0].wait_until_said("is up:")?;
    lab.warm_up(&mut running)?;
    Ok(())
}

/// Keys that do not match, a site that does not take part, and `--abort`. Nothing is left, and both ends agree again.
pub fn renewing_that_does_not_work_is_undone(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, b] = lab.run()?;
    let folders = [0, 1].map(|site| lab.sites[site].config.parent().expect("a folder").to_owned());
    let before = [files(&folders[0])?, files(&folders[1])?];
    let texts = [fs::read_to_string(&lab.sites[0].config)?, fs::read_to_string(&lab.sites[1].config)?];
    std::thread::sleep(Duration::from_secs(1));
    prepare_and_apply(&lab)?;
    // At B, one tunnel gets a pre-shared key that A did not make.
    let wrong = files(&folders[1])?.into_iter().find(|name| name.starts_with("wg0-")).context("no new key")?;
    fs::write(folders[1].join(wrong), config::PresharedKey::generate().to_base64().as_bytes())?;
    ensure!(lab.ecmpvpn(1, &["reload"])?.0 == 0);
    let (code, _, complaint) = lab.ecmpvpn(0, &["rotate"])?;
    ensure!(code == 1 && complaint.contains("has its former ones again"), "it ended with {code}: {complaint}");
    ensure!(complaint.contains("the other tunnels were not touched"), "{complaint}");
    // B returns to the former keys by itself.
    b_is_up(&lab)?;
    let state = status(&lab, 0)?;
    let waiting = |tunnel: &Value| tunnel["stage"] == "waiting";
    ensure!(state["tunnels"].as_array().is_some_and(|all| all.iter().all(waiting)), "{state}");
    for site in [0, 1] {
        rotate(&lab, site, &["--abort"])?;
    }
    ensure!(TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received() == 400_000, "nothing gets through");
    ensure!(b.output().contains("former ones again"), "{}", b.output());
    ensure!([files(&folders[0])?, files(&folders[1])?] == before, "files were left: {:?}", files(&folders[0])?);
    let now = [fs::read_to_string(&lab.sites[0].config)?, fs::read_to_string(&lab.sites[1].config)?];
    ensure!(now == texts, "the configurations were changed");
    // Now B does not take part.
    let file = lab.dir().join("for-b").display().to_string();
    rotate(&lab, 0, &["--prepare", "--output", &file])?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["rotate"])?;
    let said = || format!("{complaint}\nA:\n{}\nB:\n{}", a.output(), b.output());
    ensure!(code == 1 && complaint.contains("does not have the new keys"), "it ended with {code}: {}", said());
    rotate(&lab, 0, &["--abort"])?;
    ensure!(files(&folders[0])? == before[0], "files were left: {:?}", files(&folders[0])?);
    Ok(())
}

/// `--abort` while a tunnel is being changed: both ends agree about that one and about the others.
pub fn renewing_that_is_given_up_in_the_midst_leaves_both_ends_alike(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [_a, _b] = lab.run()?;
    std::thread::sleep(Duration::from_secs(1));
    prepare_and_apply(&lab)?;
    let code = std::thread::scope(|scope| -> Result<i32> {
        let renewal = scope.spawn(|| lab.ecmpvpn(0, &["rotate"]));
        let since = Instant::now();
        while !status(&lab, 0)?["tunnels"].as_array().is_some_and(|all| all[0]["stage"] == "changing") {
            ensure!(since.elapsed() < Duration::from_secs(30), "nothing is changed: {}", status(&lab, 0)?);
            std::thread::sleep(Duration::from_millis(20));
        }
        let given_up = rotate(&lab, 0, &["--abort"])?;
        ensure!(given_up.contains("1 tunnel had new keys already"), "{given_up}");
        ensure!(given_up.contains("stay for 2 tunnels"), "{given_up}");
        Ok(renewal.join().expect("the thread has not panicked")?.0)
    })?;
    ensure!(code == 1, "`rotate` ended with {code}");
    rotate(&lab, 1, &["--abort"])?;
    b_is_up(&lab)?;
    for site in [0, 1] {
        let folder = lab.sites[site].config.parent().context("a folder")?;
        let new = files(folder)?.into_iter().filter(|name| name.starts_with("wg0-")).count();
        let others = files(folder)?.into_iter().filter(|name| name.starts_with("wg1-") || name.starts_with("wg2-"));
        ensure!(new == 2 - site && others.count() == 0, "{:?}", files(folder)?);
        // What the configuration names is what is in force: a reload changes nothing.
        ensure!(lab.ecmpvpn(site, &["reload"])?.0 == 0);
    }
    b_is_up(&lab)?;
    ensure!(TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received() == 400_000, "nothing gets through");
    Ok(())
}

fn b_is_up(lab: &Lab) -> Result<()> {
    let since = Instant::now();
    loop {
        let up = |site: usize| -> Result<bool> {
            let stats = lab.stats(site)?;
            Ok(stats["tunnels"].as_array().is_some_and(|all| all.iter().all(|tunnel| tunnel["state"] == "up")))
        };
        if up(0)? && up(1)? {
            return Ok(());
        }
        ensure!(since.elapsed() < Duration::from_secs(40), "not up again: {} {}", lab.stats(0)?, lab.stats(1)?);
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits until `a`, the leading end, changes a tunnel.
fn it_has_begun(lab: &Lab, a: &Running) -> Result<()> {
    let file = lab.sites[0].config.with_extension("rotation.json");
    let since = Instant::now();
    while !fs::read_to_string(&file)?.contains("changing") {
        ensure!(since.elapsed() < Duration::from_secs(20), "it does not begin: {}", a.output());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The leading end is killed while it changes a tunnel. After a new start it continues by itself.
pub fn renewing_that_is_cut_off_goes_on(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, b] = lab.run()?;
    prepare_and_apply(&lab)?;
    std::thread::scope(|scope| -> Result<()> {
        let command = scope.spawn(|| lab.ecmpvpn(0, &["rotate"]));
        it_has_begun(&lab, &a)?;
        // By now both ends have left the tunnel, or it already has its new keys.
        std::thread::sleep(Duration::from_millis(500));
        a.stop(Signal::KILL)?;
        let mut again = lab.start(0)?;
        again.wait_until_said("is up:")?;
        // The `rotate` command only watches, so it survives the new start.
        let (code, _, complaint) = command.join().expect("no panic")?;
        ensure!(code == 0, "it ended with {code}: {complaint}\n{}\n{}", again.output(), b.output());
        let configs = [load(&lab, 0)?, load(&lab, 1)?];
        for (a, b) in configs[0].peers[0].tunnels.iter().zip(&configs[1].peers[0].tunnels) {
            let public = a.private_key.as_ref().context("no key of its own")?.public_key();
            ensure!(b.public_key == Some(public), "{}: the configurations do not match", a.name);
        }
        lab.warm_up(&mut [again, b])
    })
}

/// Only `run` changes tunnels, so the command that watches it must not wait for a `run` that has ended.
pub fn renewing_does_not_wait_for_a_run_that_has_ended(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, _b] = lab.run()?;
    prepare_and_apply(&lab)?;
    std::thread::scope(|scope| -> Result<()> {
        let command = scope.spawn(|| lab.ecmpvpn(0, &["rotate"]));
        it_has_begun(&lab, &a)?;
        a.stop(Signal::KILL)?;
        let (code, _, complaint) = command.join().expect("no panic")?;
        ensure!(code == 1 && complaint.contains("has ended"), "it ended with {code}: {complaint}");
        Ok(())
    })
}
