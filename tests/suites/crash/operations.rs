//! Bring-up, adoption, reload and undoing, cut off.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::PresharedKey;
use lab::kind::Kind;
use lab::sites::{Lab, Running};
use rustix::process::Signal;

use crate::rig::{Operation, Rig};

/// Part of every operation that is not special.
const PLAIN: Operation = Operation {
    name: "",
    tunnels: 2,
    configure: |_| Ok(()),
    prepare: |_| Ok(None),
    act: |_, running| Ok(running),
    recover: Rig::recover,
};

/// `run` from nothing.
fn come_up(rig: &Rig, _: Option<Running>) -> Result<Option<Running>> {
    let mut running = rig.start()?;
    rig.is_up_or_ended(&mut running)?;
    Ok(Some(running))
}

pub fn killed_while_it_comes_up(kind: Kind) -> Result<()> {
    Operation { name: "bring-up", act: come_up, ..PLAIN }.at_each_point(kind)
}

/// A site whose `run` was killed.
fn abandoned(rig: &Rig) -> Result<Option<Running>> {
    rig.up()?.stop(Signal::KILL)?;
    Ok(None)
}

pub fn killed_while_it_adopts(kind: Kind) -> Result<()> {
    Operation { name: "adoption", prepare: abandoned, act: come_up, ..PLAIN }.at_each_point(kind)
}

pub fn killed_while_down_undoes(kind: Kind) -> Result<()> {
    let down = |rig: &Rig, _: Option<Running>| {
        let ended = rig.output(&["down"])?;
        let complaint = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.success() || ended.status.code().is_none(), "{}: {complaint}", ended.status);
        Ok(None)
    };
    Operation { name: "down", prepare: abandoned, act: down, ..PLAIN }.at_each_point(kind)
}

pub fn killed_while_it_stops(kind: Kind) -> Result<()> {
    let stop = |_: &Rig, running: Option<Running>| {
        let mut running = running.context("nothing runs")?;
        running.signal(Signal::TERM)?;
        running.wait()?;
        Ok(None)
    };
    Operation { name: "stop", prepare: |rig| rig.up().map(Some), act: stop, ..PLAIN }.at_each_point(kind)
}

/// The near site's configuration before a reload, and after it. Beside the configuration.
const FORMER: &str = "former.toml";
const CHANGED: &str = "changed.toml";

/// Prepares a change of a key, of a port, and of which tunnels there are. The far site has what fits the changed
/// configuration from the start: all four tunnels and the new key. It follows the changed port by itself.
fn two_configurations(lab: &Lab) -> Result<()> {
    let key = PresharedKey::generate().to_base64();
    for site in &lab.sites {
        let path = site.config.with_file_name("new.psk");
        fs::write(&path, key.as_bytes())?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    }
    let tunnels = |site: usize| -> Result<(String, Vec<String>)> {
        let text = fs::read_to_string(&lab.sites[site].config)?;
        let mut blocks = text.split("[[peer.tunnel]]\n");
        let head = blocks.next().unwrap_or_default().to_owned();
        let blocks: Vec<String> = blocks.map(|block| format!("[[peer.tunnel]]\n{block}")).collect();
        ensure!(blocks.len() == 4, "four tunnels are expected:\n{text}");
        Ok((head, blocks))
    };
    let with_key = |block: &str| format!("{}preshared_key_file = \"new.psk\"\n\n", block.trim_end().to_owned() + "\n");
    let (head, far) = tunnels(1)?;
    fs::write(&lab.sites[1].config, head + &with_key(&far[0]) + &far[1..].concat())?;
    let (head, near) = tunnels(0)?;
    let port = format!("listen_port = {}", lab.tunnels[1].ports[0]);
    ensure!(near[1].contains(&port), "{} has no line {port}", near[1]);
    let moved = near[1].replace(&port, "listen_port = 61234");
    let folder = lab.sites[0].config.with_file_name("");
    fs::write(folder.join(FORMER), format!("{head}{}", near[..3].concat()))?;
    fs::write(folder.join(CHANGED), format!("{head}{}{moved}{}", with_key(&near[0]), near[3]))?;
    Ok(())
}

fn choose(rig: &Rig, which: &str) -> Result<()> {
    let config = &rig.lab.sites[0].config;
    fs::copy(config.with_file_name(which), config)?;
    Ok(())
}

fn before_the_reload(rig: &Rig) -> Result<Option<Running>> {
    choose(rig, FORMER)?;
    let running = rig.up()?;
    // The tunnels that answer are left before they change.
    for tunnel in &rig.lab.tunnels[1..3] {
        let [a, b] = tunnel.addresses;
        let patience = Duration::from_secs(20);
        lab::traffic::wait_for_reply(&rig.lab.sites[0].gateway, a.into(), b.into(), patience)?;
    }
    choose(rig, CHANGED)?;
    Ok(Some(running))
}

fn reload(rig: &Rig, running: Option<Running>) -> Result<Option<Running>> {
    let mut running = running.context("nothing runs")?;
    let (code, _, complaint) = rig.lab.ecmpvpn(0, &["reload"])?;
    if running.ended()?.is_none() {
        // It may be ending just now.
        let since = Instant::now();
        while code != 0 && running.ended()?.is_none() && since.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(20));
        }
        ensure!(code == 0 || running.ended()?.is_some(), "`reload` ended with {code}: {complaint}");
    }
    Ok(Some(running))
}

pub fn killed_while_it_reloads(kind: Kind) -> Result<()> {
    let operation = Operation {
        name: "reload",
        tunnels: 4,
        configure: two_configurations,
        prepare: before_the_reload,
        act: reload,
        ..PLAIN
    };
    operation.at_each_point(kind)
}
