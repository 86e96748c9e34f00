//! Two sites, as ecmpvpn finds them: a gateway and a LAN host each, and several shaped links between the gateways.
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
//! The endpoint addresses are the bond's, which ecmpvpn makes ([`Underlay::Bonded`]), or the loopback's, with the
//! kernel told by rules which link each tunnel's outer packets take ([`Underlay::Routed`]).

mod bypass;
mod config;
mod hole;
mod process;
mod underlay;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path as FsPath, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::dump::{Dump, PINS, RUN_DIR};
use crate::netns::{Netns, unique};
use crate::topology::{Quality, Wires};
use crate::traffic::{Path, wait_for_reply};

pub use hole::Hole;
pub use process::{Batch, Running, binary};
pub use underlay::Underlay;

/// How a lab is built.
#[derive(Clone, Debug)]
pub struct Options {
    /// What joins the gateways.
    pub underlay: Underlay,
    /// `steering.backend`
    pub backend: &'static str,
    /// `steering.policy`
    pub policy: &'static str,
    /// Links between the gateways.
    pub members: u8,
    /// Tunnels.
    pub tunnels: usize,
    /// Each link's rate in each direction, 10^6 bits a second; `None`: unshaped.
    pub rate: Option<f64>,
    /// Each link's queue in each direction, bytes; `None`: what it sends in 50 ms, but not less than 64 KiB.
    pub queue: Option<u32>,
    /// What happens to packets on each link, in each direction; `None`: the ports are joined directly, and links cannot be
    /// delayed, cut or unplugged.
    pub wires: Option<Quality>,
    /// UDP ports of the tunnels at A and B; `None`: as `init` plans them.
    pub ports: Option<Vec<[u16; 2]>>,
    /// `health.interval_ms`
    pub probe_ms: u32,
    /// Added to both configurations.
    pub extra: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            underlay: Underlay::Routed,
            backend: "userspace",
            policy: "hash",
            members: 3,
            tunnels: 3,
            rate: None,
            queue: None,
            wires: None,
            ports: None,
            probe_ms: 100,
            extra: String::new(),
        }
    }
}

/// One tunnel as both sites see it.
#[derive(Clone, Debug)]
pub struct LabTunnel {
    /// Its interface at both sites.
    pub name: String,
    /// UDP ports at A and B.
    pub ports: [u16; 2],
    /// Its addresses at A and B.
    pub addresses: [Ipv4Addr; 2],
    /// The link that A and B send on, counted from 0, by the bond's hash.
    pub members: [u8; 2],
}

/// One site.
#[derive(Debug)]
pub struct Site {
    /// Its name in the configuration; unique on this host, as pins and run files carry it.
    pub name: String,
    /// Where ecmpvpn runs.
    pub gateway: Netns,
    /// A machine in its LAN.
    pub host: Netns,
    /// 10 or 20: the middle of its addresses.
    pub number: u8,
    /// Where outer packets come from and go to.
    pub endpoint: Ipv4Addr,
    /// The gateway inside the VPN, as configured.
    pub addresses: Vec<IpAddr>,
    /// Its configuration file.
    pub config: PathBuf,
}

/// What a device has counted since it exists.
#[derive(Clone, Copy, Debug)]
pub struct DeviceCounters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

impl Site {
    fn new(index: u8) -> Result<Self> {
        let letter = ["a", "b"][usize::from(index)];
        let site = Self {
            name: unique(&format!("lab-{letter}")),
            gateway: Netns::new(&format!("gw-{letter}"))?,
            host: Netns::new(&format!("host-{letter}"))?,
            number: 10 * (index + 1),
            endpoint: Ipv4Addr::new(10, 2, 3, 4 + index),
            addresses: Vec::new(),
            config: PathBuf::new(),
        };
        let n = site.number;
        let lan = |last: u8| {
            [
                "link set lan0 addrgenmode none".to_owned(),
                format!("address add 10.{n}.0.{last}/16 dev lan0"),
                format!("address add fd00:{n}::{last}/48 dev lan0 nodad"),
                // A router needs it: without one it solicits no neighbours for what it forwards.
                format!("address add fe80::{last}/64 dev lan0 nodad"),
                "link set lan0 up".to_owned(),
            ]
        };
        let veth = format!("link add lan0 type veth peer name lan0 netns {}", site.host.name());
        site.gateway.apply("ip", &[&[veth][..], &lan(1)].concat())?;
        let routes = [format!("route add default via 10.{n}.0.1"), format!("route add default via fd00:{n}::1")];
        site.host.apply("ip", &[&lan(10)[..], &routes].concat())?;
        Ok(site)
    }

    /// The LAN host's address.
    pub fn host_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, self.number, 0, 10).into()
    }

    /// The LAN host's address.
    pub fn host_v6(&self) -> IpAddr {
        // The number is written in the address as it reads in decimal: fd00:10::10.
        let n = u16::from_str_radix(&self.number.to_string(), 16).expect("decimal digits are hexadecimal ones");
        Ipv6Addr::new(0xfd00, n, 0, 0, 0, 0, 0, 0x10).into()
    }

    /// Counters of a device of the gateway.
    pub fn device(&self, name: &str) -> Result<DeviceCounters> {
        let links: Value = serde_json::from_str(&self.gateway.query("ip", &format!("-s -j link show {name}"))?)?;
        let count = |side: &str, what: &str| {
            links[0]["stats64"][side][what].as_u64().with_context(|| format!("{name} has no {side} {what}"))
        };
        Ok(DeviceCounters {
            rx_packets: count("rx", "packets")?,
            rx_bytes: count("rx", "bytes")?,
            tx_packets: count("tx", "packets")?,
            tx_bytes: count("tx", "bytes")?,
        })
    }

    /// What the gateway, its pins and its run files look like.
    pub fn dump(&self) -> Result<Dump> {
        Dump::take(&self.gateway, &[&self.name])
    }
}

/// Both sites.
#[derive(Debug)]
pub struct Lab {
    /// Sites A and B.
    pub sites: [Site; 2],
    /// The tunnels between them.
    pub tunnels: Vec<LabTunnel>,
    /// How it was built.
    pub options: Options,
    /// The links, numbered as the members are, where [`Options::wires`] asks for them.
    wires: Option<Wires>,
    /// The program under test.
    binary: PathBuf,
    dir: TempDir,
}

impl Lab {
    /// Builds it; ecmpvpn does not run yet. `binary` is the program under test.
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

    /// Where configurations, keys and output are.
    pub fn dir(&self) -> &FsPath {
        self.dir.path()
    }

    /// From A's LAN host to B's, IPv4.
    pub fn path_v4(&self) -> Path<'_> {
        let [a, b] = &self.sites;
        Path { from: &a.host, source: a.host_v4(), to: &b.host, destination: b.host_v4() }
    }

    /// From A's gateway itself to B's, by their addresses in the LANs, IPv4.
    pub fn path_of_gateways_v4(&self) -> Path<'_> {
        let [a, b] = &self.sites;
        let address = |site: &Site| Ipv4Addr::new(10, site.number, 0, 1).into();
        Path { from: &a.gateway, source: address(a), to: &b.gateway, destination: address(b) }
    }

    /// From A's LAN host to B's, IPv6.
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

    /// Lifts the links' limits.
    pub fn unshape(&self) -> Result<()> {
        underlay::unshape(self)
    }

    /// The links, which can be delayed, cut and unplugged.
    ///
    /// # Errors
    /// The lab was built without wires.
    pub fn wires(&self) -> Result<&Wires> {
        self.wires.as_ref().context("this lab's ports are joined directly")
    }

    /// Starts `ecmpvpn run` at both sites and waits until traffic crosses.
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

    /// As [`Lab::start_with`], with more in its environment.
    pub fn start_in(&self, site: usize, options: &[&str], env: &[(&str, &str)]) -> Result<Running> {
        Running::start(&self.sites[site], &self.binary, self.dir(), options, env)
    }

    /// As [`Lab::start_with`], but with another program.
    pub fn start_program(&self, site: usize, program: &FsPath, options: &[&str]) -> Result<Running> {
        Running::start(&self.sites[site], program, self.dir(), options, &[])
    }

    /// Waits until every tunnel, and the LANs through them, answer, and neither site holds a tunnel for down: handshakes take
    /// their time, a bond's first LACP exchange too, and a tunnel is used only after several probes were answered.
    pub fn warm_up(&self, running: &mut [Running; 2]) -> Result<()> {
        let patience = Duration::from_secs(60);
        let wait = || -> Result<()> {
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
            let start = Instant::now();
            for site in 0..2 {
                while self.stats(site)?["tunnels"]
                    .as_array()
                    .is_none_or(|all| all.iter().any(|one| one["state"] == "down"))
                {
                    ensure!(start.elapsed() < patience, "a tunnel of {} stays down", self.sites[site].name);
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            Ok(())
        };
        wait().map_err(|error| {
            let outputs = running.iter_mut().enumerate().map(|(site, run)| {
                let stats = self.ecmpvpn(site, &["stats"]).map(|(_, text, _)| text).unwrap_or_default();
                format!("\n{} wrote:\n{}\n{stats}", run.site(), run.output())
            });
            error.context(outputs.collect::<String>())
        })
    }

    /// Runs `ecmpvpn ARGUMENTS… -c FILE` at one site: its exit code, standard output and standard error.
    pub fn ecmpvpn(&self, site: usize, arguments: &[&str]) -> Result<(i32, String, String)> {
        process::once(&self.sites[site], &self.binary, arguments)
    }

    /// Starts `ecmpvpn policy batch` at one site.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn batch(&self, site: usize) -> Result<Batch> {
        Batch::start(&self.sites[site], &self.binary, self.dir())
    }

    /// `ecmpvpn stats --json` of one site.
    pub fn stats(&self, site: usize) -> Result<Value> {
        let (code, output, complaint) = self.ecmpvpn(site, &["stats", "--json"])?;
        ensure!(code == 0, "`ecmpvpn stats --json` ended with {code}: {complaint}");
        serde_json::from_str(&output).with_context(|| format!("reading `ecmpvpn stats --json`: {output}"))
    }
}

/// Waits until every link and address works: the kernel's link watch takes up to a second, and drops packets until then;
/// duplicate address detection takes another one.
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
                // After a crash, or a test that failed half-way. Links go with their namespace; these would stay.
                let _ = process::once(site, &self.binary, &["down"]);
            }
        }
    }
}
