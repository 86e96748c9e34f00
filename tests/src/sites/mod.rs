//! Two sites before ecmpvpn runs: each has a gateway and a LAN host, and several shaped links join the gateways.
//!
//! ```text
//!        site A                                                       site B
//!  host          gateway                                      gateway          host
//!  lan0 -------- lan0   u0 ---- tbf, both directions ---- u0   lan0 -------- lan0
//!  10.10.0.10    10.10.0.1                                     10.20.0.1     10.20.0.10
//!  fd00:10::10   fd00:10::1    u1 ---------------------- u1    fd00:20::1    fd00:20::10
//!                       u2 ------------------------------ u2
//!                endpoint 10.2.3.4                    endpoint 10.2.3.5
//! ```
//! With [`Underlay::Bonded`], the endpoint address is on the bond that ecmpvpn makes. With [`Underlay::Routed`], it is
//! on the loopback device, and policy routing rules choose the link for each tunnel's outer packets.

mod bypass;
mod config;
mod hole;
mod inner;
mod lab;
mod plain;
mod process;
mod underlay;

use std::net::Ipv4Addr;
use std::path::Path as FsPath;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::dump::{PINS, RUN_DIR};
use crate::netns::Netns;
use crate::topology::Wires;
use crate::traffic::{Path, wait_for_reply};

pub use hole::Hole;
pub use inner::InnerTunnel;
pub use lab::{DeviceCounters, Lab, LabTunnel, Options, Overrides, Site, Underlay};
pub use process::{Batch, Running, binary};

impl Lab {
    /// Builds the lab. ecmpvpn does not run yet. `binary` is the program under test.
    pub fn new(options: Options, binary: &FsPath) -> Result<Self> {
        let sites = [Site::new(0)?, Site::new(1)?];
        let dir = tempfile::Builder::new().prefix("ecmpvpn-lab-").tempdir()?;
        let mut lab = Self { sites, tunnels: Vec::new(), options, wires: None, binary: binary.to_owned(), dir };
        config::generate(&mut lab)?;
        underlay::build(&mut lab)?;
        for site in &lab.sites {
            for ns in [&site.gateway, &site.host] {
                wait_until_usable(ns)?;
            }
        }
        Ok(lab)
    }

    /// The directory of configurations, keys and output.
    pub fn dir(&self) -> &FsPath {
        self.dir.path()
    }

    /// The IPv4 path from A's LAN host to B's.
    pub fn path_v4(&self) -> Path<'_> {
        let [a, b] = &self.sites;
        Path { from: &a.host, source: a.host_v4(), to: &b.host, destination: b.host_v4() }
    }

    /// The IPv4 path from A's gateway itself to B's, between their LAN addresses.
    pub fn path_of_gateways_v4(&self) -> Path<'_> {
        let [a, b] = &self.sites;
        let address = |site: &Site| Ipv4Addr::new(10, site.number, 0, 1).into();
        Path { from: &a.gateway, source: address(a), to: &b.gateway, destination: address(b) }
    }

    /// The IPv6 path from A's LAN host to B's.
    pub fn path_v6(&self) -> Path<'_> {
        let [a, b] = &self.sites;
        Path { from: &a.host, source: a.host_v6(), to: &b.host, destination: b.host_v6() }
    }

    /// Limits every link to `rate`, 10^6 bits a second, in each direction.
    pub fn shape(&self, rate: f64) -> Result<()> {
        self.shape_each(&vec![rate; usize::from(self.options.members)])
    }

    /// Limits each link to its own rate, 10^6 bits a second, in each direction.
    pub fn shape_each(&self, rates: &[f64]) -> Result<()> {
        underlay::shape(self, rates)
    }

    /// Gives each shaped link a queue for each flow, until it is shaped again.
    pub fn queue_fairly(&self) -> Result<()> {
        underlay::queue_fairly(self)
    }

    /// Removes the rate limits of all links.
    pub fn unshape(&self) -> Result<()> {
        underlay::unshape(self)
    }

    /// The wires of the links, which can be delayed, cut and unplugged.
    ///
    /// # Errors
    /// The lab was built without wires.
    pub fn wires(&self) -> Result<&Wires> {
        self.wires.as_ref().context("this lab's ports are joined directly")
    }

    /// Starts `ecmpvpn run` at both sites and waits until traffic flows between them.
    pub fn run(&self) -> Result<[Running; 2]> {
        let mut running = [self.start(0)?, self.start(1)?];
        for site in &mut running {
            site.wait_until_up()?;
        }
        self.warm_up(&mut running)?;
        Ok(running)
    }

    /// Starts `ecmpvpn run` at one site and does not wait.
    pub fn start(&self, site: usize) -> Result<Running> {
        self.start_with(site, &[])
    }

    /// Starts `ecmpvpn run OPTIONS…` at one site and does not wait.
    pub fn start_with(&self, site: usize, options: &[&str]) -> Result<Running> {
        self.start_in(site, options, &[])
    }

    /// As [`Lab::start_with`], with additional environment variables.
    pub fn start_in(&self, site: usize, options: &[&str], env: &[(&str, &str)]) -> Result<Running> {
        Running::start(&self.sites[site], &self.binary, self.dir(), options, env)
    }

    /// As [`Lab::start_with`], but with another program.
    pub fn start_program(&self, site: usize, program: &FsPath, options: &[&str]) -> Result<Running> {
        Running::start(&self.sites[site], program, self.dir(), options, &[])
    }

    /// Waits until every tunnel and both LANs answer. `ecmpvpn` must run at both sites, however it was started.
    pub fn wait_until_reachable(&self, patience: Duration) -> Result<()> {
        underlay::wait_for_members(self, patience)?;
        for tunnel in &self.tunnels {
            let [a, b] = tunnel.addresses;
            wait_for_reply(&self.sites[0].gateway, a.into(), b.into(), patience)
                .with_context(|| format!("warming {} up", tunnel.name))?;
        }
        for path in [self.path_v4(), self.path_v6()] {
            wait_for_reply(path.from, path.source, path.destination, patience)
                .with_context(|| format!("warming up from LAN to LAN, {}", path.source))?;
        }
        Ok(())
    }

    /// Waits until every tunnel and both LANs answer, and neither site reports a tunnel as down. Handshakes and a
    /// bond's first LACP exchange take a moment, and a tunnel is used only after several answered probes.
    pub fn warm_up(&self, running: &mut [Running; 2]) -> Result<()> {
        let patience = Duration::from_secs(60);
        let wait = || -> Result<()> {
            self.wait_until_reachable(patience)?;
            (0..2).try_for_each(|site| self.wait_until_none_is_down(site, patience))
        };
        wait().map_err(|error| {
            let outputs = running.iter_mut().enumerate().map(|(site, run)| {
                let stats = self.ecmpvpn(site, &["stats"]).map(|(_, text, _)| text).unwrap_or_default();
                format!("\n{} wrote:\n{}\n{stats}", run.site(), run.output())
            });
            error.context(outputs.collect::<String>())
        })
    }

    /// Waits until a site reports no tunnel as down.
    pub fn wait_until_none_is_down(&self, site: usize, patience: Duration) -> Result<()> {
        let start = Instant::now();
        while self.stats(site)?["tunnels"].as_array().is_none_or(|all| all.iter().any(|one| one["state"] == "down")) {
            ensure!(start.elapsed() < patience, "a tunnel of {} stays down", self.sites[site].name);
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Runs `ecmpvpn ARGUMENTS… -c FILE` at one site. Returns its exit code, standard output and standard error.
    pub fn ecmpvpn(&self, site: usize, arguments: &[&str]) -> Result<(i32, String, String)> {
        process::once(&self.sites[site], &self.binary, arguments)
    }

    /// `ecmpvpn ARGUMENTS… -c FILE` at one site, not started yet.
    pub fn command(&self, site: usize, arguments: &[&str]) -> Command {
        process::command(&self.sites[site], &self.binary, arguments)
    }

    /// Starts `ecmpvpn policy batch` at one site.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn batch(&self, site: usize) -> Result<Batch> {
        Batch::start(&self.sites[site], &self.binary, self.dir())
    }

    /// Returns what `ecmpvpn stats --json` reports at one site.
    pub fn stats(&self, site: usize) -> Result<Value> {
        let (code, output, complaint) = self.ecmpvpn(site, &["stats", "--json"])?;
        ensure!(code == 0, "`ecmpvpn stats --json` ended with {code}: {complaint}");
        serde_json::from_str(&output).with_context(|| format!("reading `ecmpvpn stats --json`: {output}"))
    }
}

/// Waits until every link and address works. Until the kernel's link watch has run, which takes up to a second, a link
/// drops packets. Duplicate address detection takes another second.
fn wait_until_usable(ns: &Netns) -> Result<()> {
    let start = Instant::now();
    loop {
        let answers = ns.query_batch("ip", "-j -batch -", &["link show up", "address show tentative"])?;
        let mut answers = serde_json::Deserializer::from_str(&answers).into_iter::<Vec<Value>>();
        let links = answers.next().context("ip shows no links")??;
        let tentative = answers.next().context("ip shows no addresses")??;
        let addresses = |link: &Value| link["addr_info"].as_array().is_some_and(|all| !all.is_empty());
        let waiting = links.iter().find(|link| link["operstate"] == "DOWN");
        let Some(waiting) = waiting.or_else(|| tentative.iter().find(|link| addresses(link))) else { return Ok(()) };
        ensure!(start.elapsed() < Duration::from_secs(30), "not usable in {}: {waiting}", ns.name());
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for site in &self.sites {
            let left = [PINS, RUN_DIR].iter().any(|dir| crate::dump::any_path_contains(FsPath::new(dir), &site.name));
            if left {
                // After a crash, or a test that failed half-way. The namespace removes its links, but not pins and run
                // files.
                let _ = process::once(site, &self.binary, &["down"]);
            }
        }
    }
}
