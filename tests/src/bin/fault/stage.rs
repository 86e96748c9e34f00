//! The two sites and their `run`s, and what is done to them.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::dump::{Dump, idle_shared_things};
use lab::sites::{Lab, Options, Running, Underlay};
use rustix::process::Signal;

use crate::clear::{Outer, Watch};
use crate::exchange::Exchange;
use crate::links::SOUND;
use crate::ports;
use crate::random::Random;
use crate::schedule::Schedule;

/// The bond at both sites.
pub const BOND: &str = "bond0";
/// Each link's rate, 10^6 bits a second.
const RATE: f64 = 100.0;
/// What a site says once it is up.
const UP: &str = "is up:";
/// The gateways' network, and its mask.
const OUTER: (u32, u32) = (0x0a02_0300, 0xffff_ff00);
/// How long a host may take to look as before.
const SETTLE: Duration = Duration::from_secs(5);

/// Both sites, up.
pub struct Stage {
    pub lab: Lab,
    running: [Option<Running>; 2],
    /// Each gateway's address on its bond now.
    pub addresses: [Ipv4Addr; 2],
    /// The tunnels' UDP ports at A and B, by tunnel.
    pub ports: Vec<[u16; 2]>,
    pub watch: Arc<Watch>,
    source_ports: [u16; 2],
    before: [Dump; 2],
    idle_before: Vec<String>,
    /// The tunnel that is not there now: its block of each configuration.
    pub taken_out: Option<[String; 2]>,
}

impl Stage {
    /// Builds it and brings both sites up.
    pub fn new(schedule: &Schedule, binary: &Path) -> Result<Self> {
        let endpoints = [Ipv4Addr::new(10, 2, 3, 4), Ipv4Addr::new(10, 2, 3, 5)];
        let mut random = Random::new(schedule.seed, "ports");
        let ports = ports::plan(endpoints, schedule.first_port, schedule.tunnels, &mut random);
        let options = Options {
            underlay: Underlay::Bonded,
            backend: "kernel",
            policy: "hash",
            members: crate::schedule::LINKS,
            tunnels: usize::from(schedule.tunnels),
            rate: Some(RATE),
            wires: Some(SOUND),
            ports: Some(ports.clone()),
            ..Options::default()
        };
        let idle_before = idle_shared_things()?;
        let lab = Lab::new(options, binary)?;
        let addresses = [lab.sites[0].endpoint, lab.sites[1].endpoint];
        ensure!(addresses == endpoints, "the lab's endpoints are {addresses:?}");
        let before = [lab.sites[0].dump()?, lab.sites[1].dump()?];
        let outer = Outer { network: OUTER, ports: ports.concat() };
        let watch = Arc::new(Watch::begin(lab.wires()?.namespace(), &outer)?);
        let a = lab.start(0)?;
        thread::sleep(schedule.stagger);
        let mut running = [a, lab.start(1)?];
        for site in &mut running {
            site.wait_until_said(UP)?;
        }
        lab.warm_up(&mut running)?;
        let source_ports = schedule.source_ports;
        let running = running.map(Some);
        let stage = Self { lab, running, addresses, ports, watch, source_ports, before, idle_before, taken_out: None };
        stage.uplink(0)?;
        stage.uplink(1)?;
        Ok(stage)
    }

    /// Starts the traffic.
    pub fn traffic(&self) -> Result<Exchange> {
        Exchange::begin(&self.lab, self.source_ports, Arc::clone(&self.watch))
    }

    /// A site's `run`.
    pub fn running(&self, site: usize) -> Result<&Running> {
        self.running[site].as_ref().with_context(|| format!("no `run` at {site}"))
    }

    /// A gateway's way to the rest of the world leads over its bond, and by the other gateway: what is not steered is not
    /// stuck, but leaves in the clear and shows.
    pub fn uplink(&self, site: usize) -> Result<()> {
        let hop = |site: usize| format!("fe80::{}", ['a', 'b'][site]);
        self.lab.sites[site].gateway.apply(
            "ip",
            &[
                format!("route replace default via {} dev {BOND}", self.addresses[1 - site]),
                format!("address replace {}/64 dev {BOND} nodad", hop(site)),
                format!("route replace default via {} dev {BOND}", hop(1 - site)),
            ],
        )
    }

    /// Who takes a site down has no use for that way.
    fn no_uplink(&self, site: usize) -> Result<()> {
        let commands = ["route flush default", "-6 route flush default"];
        for command in commands {
            self.lab.sites[site].gateway.ip(command)?;
        }
        Ok(())
    }

    /// SIGKILL for a site's `run`.
    pub fn kill(&mut self, site: usize) -> Result<()> {
        let run = self.running[site].take().context("it does not run")?;
        run.stop(Signal::KILL).map(drop)
    }

    /// Starts `run` at a site; it is not yet up.
    pub fn start(&mut self, site: usize) -> Result<()> {
        self.running[site] = Some(self.lab.start(site)?);
        Ok(())
    }

    /// Whether a site that was started is up; from then on its traffic is watched. Fails if its `run` has ended.
    pub fn is_up(&mut self, site: usize, traffic: &Exchange) -> Result<bool> {
        let run = self.running[site].as_mut().context("it does not run")?;
        if !run.output().contains(UP) {
            let ended = run.ended()?;
            ensure!(ended.is_none(), "`run` ended: {}", ended.map(|status| status.to_string()).unwrap_or_default());
            return Ok(false);
        }
        traffic.site_is_up(&self.lab, site, self.source_ports[site])?;
        self.uplink(site)?;
        Ok(true)
    }

    /// Takes a site down, by SIGTERM or by SIGKILL and `down`; what goes wrong with that.
    pub fn take_down(&mut self, site: usize, killed: bool) -> Result<Option<String>> {
        self.no_uplink(site)?;
        let run = self.running[site].take().context("it does not run")?;
        if killed {
            run.stop(Signal::KILL)?;
            let (code, _, complaint) = self.lab.ecmpvpn(site, &["down"])?;
            if code != 0 {
                return Ok(Some(format!("`down` ended with {code}: {complaint}")));
            }
        } else {
            let status = run.stop(Signal::TERM)?;
            if !status.success() {
                return Ok(Some(format!("`run` ended with {status} after SIGTERM")));
            }
        }
        Ok(None)
    }

    /// What of a site's host is not as it was before `run`; all its links are whole.
    pub fn left_at(&self, site: usize) -> Result<Option<String>> {
        let left = self.before[site].wait_for_same(SETTLE, || self.lab.sites[site].dump())?;
        Ok(left.map(|left| format!("it is not as it was before:\n{left}")))
    }

    /// What both sites share on this host and is left though nobody needs it; when both are down.
    pub fn left_behind(&self) -> Result<Option<String>> {
        let left: Vec<String> =
            idle_shared_things()?.into_iter().filter(|thing| !self.idle_before.contains(thing)).collect();
        Ok((!left.is_empty()).then(|| left.join(", ")))
    }

    /// Changes a site's configuration.
    pub fn rewrite(&self, site: usize, change: impl FnOnce(&str) -> Result<String>) -> Result<()> {
        let file = &self.lab.sites[site].config;
        let text = fs::read_to_string(file)?;
        fs::write(file, change(&text)?)?;
        Ok(())
    }

    /// `ecmpvpn reload` at a site; what it complains of if it does not succeed.
    pub fn reload(&self, site: usize) -> Result<Option<String>> {
        let (code, _, complaint) = self.lab.ecmpvpn(site, &["reload"])?;
        Ok((code != 0).then(|| format!("`reload` ended with {code}: {}", complaint.trim_end())))
    }

    /// Tells the wires' watch about ports that tunnels have from now on; those that they had are still expected.
    pub fn expect_ports(&self, former: [u16; 2]) -> Result<()> {
        let ports = self.ports.iter().flatten().copied().chain(former).collect();
        self.watch.expect(&Outer { network: OUTER, ports })
    }

    /// The tunnels that do without a link in the directions of these senders.
    pub fn spared(&self, link: u8, senders: &[usize]) -> usize {
        let there = self.ports.len() - usize::from(self.taken_out.is_some());
        let endpoints = [self.lab.sites[0].endpoint, self.lab.sites[1].endpoint];
        let is_spared = |ports: &&[u16; 2]| {
            let links = ports::links(endpoints, **ports);
            senders.iter().all(|sender| links[*sender] != link)
        };
        self.ports[..there].iter().filter(is_spared).count()
    }

    /// What each gateway's bond and neighbours look like.
    pub fn underlay(&self) -> String {
        let told = |site: &lab::sites::Site| {
            let bond = site.gateway.run(|| fs::read_to_string(format!("/proc/thread-self/net/bonding/{BOND}")));
            let neighbours = site.gateway.query("ip", &format!("neighbour show dev {BOND}"));
            let keep = |line: &&str| {
                ["Interface:", "Aggregator ID", "port state", "Active", "Number"].iter().any(|word| line.contains(word))
            };
            let bond: Vec<String> =
                bond.unwrap_or_default().lines().filter(keep).map(|line| line.trim().to_owned()).collect();
            format!("{}:\n{}\n{}", site.name, bond.join("; "), neighbours.unwrap_or_default())
        };
        self.lab.sites.iter().map(told).collect()
    }

    /// The last lines that each `run` wrote.
    pub fn outputs(&self, lines: usize) -> String {
        let told = |run: &Running| {
            let output = plain(&run.output());
            let all: Vec<&str> = output.lines().collect();
            format!("{} wrote last:\n{}\n", run.site(), all[all.len().saturating_sub(lines)..].join("\n"))
        };
        self.running.iter().flatten().map(told).collect()
    }
}

/// Text without the colours of a terminal.
fn plain(text: &str) -> String {
    let mut parts = text.split('\u{1b}');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once('m').map_or(part, |(_, rest)| rest))
}

#[cfg(test)]
mod tests {
    #[test]
    fn colours_are_left_out() {
        assert_eq!(super::plain("a \u{1b}[32mINFO\u{1b}[0m m"), "a INFO m");
    }
}
