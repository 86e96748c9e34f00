//! Configurations of a lab's two sites. `ecmpvpn init` writes them. The lab reads from them what it must know.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::{self, Config, XmitHashPolicy};
use ecmpvpn::plan::bond_hash::{self, OuterFlow};
use ecmpvpn::plan::far_address;

use super::lab::{Lab, LabTunnel, Underlay};
use crate::log;

/// Writes both sites' files, and fills in the fields of the lab that follow from them.
pub(super) fn generate(lab: &mut Lab) -> Result<()> {
    let output = lab.dir.path().join("sites");
    let mut init = Command::new(&lab.binary);
    init.arg("init").arg("--output").arg(&output).arg(format!("--tunnels={}", lab.options.tunnels));
    for (letter, site) in ['a', 'b'].into_iter().zip(&lab.sites) {
        let n = site.number;
        init.arg(format!("--{letter}-name={}", site.name))
            .arg(format!("--{letter}-endpoint={}", site.endpoint))
            .arg(format!("--{letter}-prefix=10.{n}.0.0/16"))
            .arg(format!("--{letter}-prefix=fd00:{n}::/48"));
        match lab.options.underlay {
            Underlay::Bonded => {
                let members: Vec<String> = (0..lab.options.members).map(|member| format!("u{member}")).collect();
                init.arg(format!("--{letter}-members={}", members.join(",")))
                    .arg(format!("--{letter}-bond-address={}/24", site.endpoint));
            }
            Underlay::Routed => {
                init.arg(format!("--{letter}-members={}", lab.options.members));
            }
        }
    }
    let result =
        init.output().with_context(|| format!("starting {}: build it, or set ECMPVPN_BIN", lab.binary.display()))?;
    log::note(format!("$ {init:?} -> {}", result.status));
    ensure!(result.status.success(), "{init:?} failed: {}", String::from_utf8_lossy(&result.stderr));

    let mut configs = Vec::with_capacity(2);
    for (end, site) in lab.sites.iter_mut().enumerate() {
        site.config = output.join(&site.name).join("ecmpvpn.toml");
        let mut text = fs::read_to_string(&site.config)?;
        let overrides = &lab.options.overrides;
        let words = [("policy", lab.options.policy), ("backend", lab.options.backend)];
        let words = words.map(|(key, word)| (key.to_owned(), format!("\"{word}\"")));
        for (key, value) in words.iter().chain(&overrides.keys) {
            text = with_key(&text, key, value)
                .with_context(|| format!("`init` did not write exactly one {key}:\n{text}"))?;
        }
        let probes = "interval_ms = 100";
        ensure!(text.contains(probes), "`init` did not write {probes}:\n{text}");
        text = text.replace(probes, &format!("interval_ms = {}", lab.options.probe_ms));
        if let Some(ports) = &lab.options.ports {
            text = with_ports(&text, ports, end);
        }
        fs::write(&site.config, text + "\n" + &overrides.extra)?;
        let config = config::load(&site.config).map_err(|e| anyhow::anyhow!("{e}"))?;
        site.addresses = config.site.addresses.iter().map(ipnet::IpNet::addr).collect();
        configs.push(config);
    }
    lab.tunnels = tunnels(lab, &configs)?;
    Ok(())
}

/// `text` with another value, in TOML, in its line `key = …`. `None` unless there is exactly one such line.
fn with_key(text: &str, key: &str, value: &str) -> Option<String> {
    let is_key = |line: &str| line.split_once('=').is_some_and(|(name, _)| name.trim() == key);
    let lines = text.lines().map(|line| if is_key(line) { format!("{key} = {value}") } else { line.to_owned() });
    (text.lines().filter(|line| is_key(line)).count() == 1).then(|| lines.collect::<Vec<_>>().join("\n"))
}

/// `text` with the tunnels' ports replaced, in order.
fn with_ports(text: &str, ports: &[[u16; 2]], end: usize) -> String {
    let mut listen = ports.iter().map(|pair| pair[end]);
    let mut remote = ports.iter().map(|pair| pair[1 - end]);
    let line = |line: &str| {
        let key = line.split_once('=').map_or("", |(name, _)| name.trim());
        let port = match key {
            "listen_port" => listen.next(),
            "remote_port" => remote.next(),
            _ => None,
        };
        port.map_or_else(|| line.to_owned(), |port| format!("{key} = {port}"))
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

fn tunnels(lab: &Lab, configs: &[Config]) -> Result<Vec<LabTunnel>> {
    let [a, b] = [&configs[0].peers[0].tunnels, &configs[1].peers[0].tunnels];
    ensure!(a.len() == lab.options.tunnels && b.len() == a.len(), "`init` made {} and {} tunnels", a.len(), b.len());
    let tunnel = |(a, b): (&config::Tunnel, &config::Tunnel)| {
        ensure!(a.listen_port == b.remote_port && b.listen_port == a.remote_port, "{a:?} and {b:?} do not match");
        ensure!(far_address(a.address) == Some(b.address.addr()), "{a:?} and {b:?} do not match");
        let ports = [a.listen_port, b.listen_port];
        let mut members = [0; 2];
        for (end, member) in members.iter_mut().enumerate() {
            let flow = OuterFlow {
                src: lab.sites[end].endpoint.into(),
                dst: lab.sites[1 - end].endpoint.into(),
                sport: ports[end],
                dport: ports[1 - end],
                macs: None,
            };
            let choice = bond_hash::member(XmitHashPolicy::Layer34, &flow, lab.options.members);
            *member = choice.index().context("layer3+4 needs no more than that")?;
        }
        let addresses: [Ipv4Addr; 2] = [a.address.addr(), b.address.addr()];
        Ok(LabTunnel { name: a.name.to_string(), ports, addresses, members })
    };
    a.iter().zip(b).map(tunnel).collect()
}
