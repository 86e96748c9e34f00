//! The two sites with their `run` processes, and the actions on them.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::dump::{Dump, idle_shared_things};
use lab::hostile::{allow_ping, expose_configurations};
use lab::sites::{Lab, Options, Running, Underlay};
use rustix::process::Signal;

use crate::exchange::Exchange;
use crate::links::SOUND;
use crate::ports;
use crate::random::Random;
use crate::schedule::Schedule;
use lab::clear::{Outer, Watch};

/// Name of the bond at both sites.
pub const BOND: &str = "bond0";
/// Each link's rate, 10^6 bits a second.
const RATE: f64 = 100.0;
/// What `run` prints once its site is up.
const UP: &str = "is up:";
/// The gateways' network and its mask, in host byte order.
const OUTER: (u32, u32) = (0x0a02_0300, 0xffff_ff00);
/// How long a host may take until it looks as it did before.
const SETTLE: Duration = Duration::from_secs(5);

/// Both sites, which are up.
pub struct Stage {
    pub lab: Lab,
    running: [Option<Running>; 2],
    /// Each gateway's current address on its bond.
    pub addresses: [Ipv4Addr; 2],
    /// The tunnels' UDP ports at A and B, by tunnel.
    pub ports: Vec<[u16; 2]>,
    pub watch: Arc<Watch>,
    source_ports: [u16; 2],
    before: [Dump; 2],
    idle_before: Vec<String>,
    /// The block of each configuration for the tunnel that is removed at present, if any.
    pub taken_out: Option<[String; 2]>,
}

impl Stage {
    /// Builds the lab and brings both sites up.
    pub fn new(schedule: &Schedule, binary: &Path) -> Result<Self> {
        let endpoints = [Ipv4Addr::new(10, 2, 3, 4), Ipv4Addr::new(10, 2, 3, 5)];
        let mut random = Random::new(schedule.seed, "ports");
        let ports = ports::plan(endpoints, schedule.first_port, schedule.tunnels, &mut random);
        let options = Options {
            underlay: Underlay::Bonded,
            backend: "kernel",
            policy: "hash",
            members: crate::event::LINKS,
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
        expose_configurations(&lab)?;
        for site in &lab.sites {
            allow_ping(&site.gateway)?;
        }
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

    pub fn traffic(&self) -> Result<Exchange> {
        Exchange::begin(&self.lab, self.source_ports, Arc::clone(&self.watch))
    }

    /// The `run` process of a site.
    pub fn running(&self, site: usize) -> Result<&Running> {
        self.running[site].as_ref().with_context(|| format!("no `run` at {site}"))
    }

    /// Gives a gateway default routes over its bond, through the other gateway. A packet that is not steered then does
    /// not stay on the gateway. It leaves in the clear, where the watch sees it.
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

    /// Removes the default routes again, before a site is taken down.
    fn no_uplink(&self, site: usize) -> Result<()> {
        let commands = ["route flush default", "-6 route flush default"];
        for command in commands {
            self.lab.sites[site].gateway.ip(command)?;
        }
        Ok(())
    }

    /// Ends the `run` of a site with SIGKILL.
    pub fn kill(&mut self, site: usize) -> Result<()> {
        let run = self.running[site].take().context("it does not run")?;
        run.stop(Signal::KILL).map(drop)
    }

    /// Starts `run` at a site and does not wait until it is up.
    pub fn start(&mut self, site: usize) -> Result<()> {
        self.running[site] = Some(self.lab.start(site)?);
        Ok(())
    }

    /// Whether a site that was started is up. From then on its traffic is watched.
    ///
    /// # Errors
    /// The `run` of the site has ended.
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

    /// Takes a site down, with SIGTERM, or with SIGKILL and `down`. Returns what went wrong, if anything.
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

    /// Returns what on a site's host is not as it was before `run`. All links must work.
    pub fn left_at(&self, site: usize) -> Result<Option<String>> {
        let left = self.before[site].wait_for_same(SETTLE, || self.lab.sites[site].dump())?;
        Ok(left.map(|left| format!("it is not as it was before:\n{left}")))
    }

    /// Returns what both sites share on this host and have not removed. Both must be down.
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

    /// Runs `ecmpvpn reload` at a site. Returns its error if it fails.
    pub fn reload(&self, site: usize) -> Result<Option<String>> {
        let (code, _, complaint) = self.lab.ecmpvpn(site, &["reload"])?;
        Ok((code != 0).then(|| format!("`reload` ended with {code}: {}", complaint.trim_end())))
    }

    /// Makes the watch on the wires expect the current ports of the tunnels, and also the former ones.
    pub fn expect_ports(&self, former: [u16; 2]) -> Result<()> {
        let ports = self.ports.iter().flatten().copied().chain(former).collect();
        self.watch.expect(&Outer { network: OUTER, ports })
    }

    /// Counts the tunnels that do not use `link` in the directions of `senders`.
    pub fn spared(&self, link: u8, senders: &[usize]) -> usize {
        let there = self.ports.len() - usize::from(self.taken_out.is_some());
        let endpoints = [self.lab.sites[0].endpoint, self.lab.sites[1].endpoint];
        let is_spared = |ports: &&[u16; 2]| {
            let links = ports::links(endpoints, **ports);
            senders.iter().all(|sender| links[*sender] != link)
        };
        self.ports[..there].iter().filter(is_spared).count()
    }

    /// Describes each gateway's bond and neighbours.
    pub fn underlay(&self) -> String {
        let describe = |site: &lab::sites::Site| {
            let bond = site.gateway.run(|| fs::read_to_string(format!("/proc/thread-self/net/bonding/{BOND}")));
            let neighbours = site.gateway.query("ip", &format!("neighbour show dev {BOND}"));
            let keep = |line: &&str| {
                ["Interface:", "Aggregator ID", "port state", "Active", "Number"].iter().any(|word| line.contains(word))
            };
            let bond: Vec<String> =
                bond.unwrap_or_default().lines().filter(keep).map(|line| line.trim().to_owned()).collect();
            format!("{}:\n{}\n{}", site.name, bond.join("; "), neighbours.unwrap_or_default())
        };
        self.lab.sites.iter().map(describe).collect()
    }

    /// The last lines of each `run`'s output.
    pub fn outputs(&self, lines: usize) -> String {
        let describe = |run: &Running| {
            let output = plain(&run.output());
            let all: Vec<&str> = output.lines().collect();
            format!("{} wrote last:\n{}\n", run.site(), all[all.len().saturating_sub(lines)..].join("\n"))
        };
        self.running.iter().flatten().map(describe).collect()
    }
}

/// `text` without terminal colours.
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
