//! A host in a namespace, a plan for it, and functions that run the code under test there.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::{
    BackendChoice, Bond, Config, Health, InterfaceName, Peer, Policy, PresharedKey, PrivateKey, Site, Steering, Tunnel,
};
use ecmpvpn::control::down::{TakenDown, down};
use ecmpvpn::control::site::Paths;
use ecmpvpn::dataplane::Pins;
use ecmpvpn::host::{self, Change, HostError, HostLinks, Journal, Netlink, RunDir, Undo};
use ecmpvpn::plan::{Backend, Plan};
use lab::dump::Dump;
use lab::netns::{Netns, unique};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// How long a dump may take to settle: the kernel does duplicate address detection and link watch with a delay.
const SETTLE: Duration = Duration::from_secs(30);

/// The options of all tests. A bond without a partner is waited for only 5 s.
pub const OPTIONS: host::Options = host::Options { bond_patience: Duration::from_secs(5) };

/// A host under test.
pub struct Fixture {
    pub ns: Netns,
    /// The namespace at the other end of the cables.
    pub far: Netns,
    pub site: String,
    /// The directory that replaces `/run/ecmpvpn`.
    pub run_root: PathBuf,
    _dir: tempfile::TempDir,
}

pub fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).expect("a valid name")
}

impl Fixture {
    /// Makes a host without cables.
    pub fn bare() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Ok(Self {
            ns: Netns::new("host")?,
            far: Netns::new("far")?,
            site: unique("host"),
            run_root: dir.path().join("run"),
            _dir: dir,
        })
    }

    /// Makes a host with one cable, and IPv4 and IPv6 addresses.
    pub fn new() -> Result<Self> {
        let fixture = Self::bare()?;
        let (ns, far) = (&fixture.ns, &fixture.far);
        ns.ip(&format!("link add up0 type veth peer name f0 netns {}", far.name()))?;
        ns.ip("address add 10.2.3.4/24 dev up0")?;
        ns.ip("address add fd00:2::4/64 dev up0 nodad")?;
        ns.ip("link set up0 up")?;
        far.ip("link set f0 up")?;
        ns.ip("route add default via 10.2.3.1")?;
        fixture.wait_for_addresses()?;
        Ok(fixture)
    }

    /// Undoes what an earlier process left, as `ecmpvpn down` does.
    pub fn take_down(&self) -> Result<TakenDown> {
        let paths = Paths { run_root: self.run_root.clone(), pins: Pins::of(&self.site) };
        Ok(self.inside(async || down(&self.site, &paths).await)?)
    }

    /// Waits until no address is tentative.
    pub fn wait_for_addresses(&self) -> Result<()> {
        for _ in 0..300 {
            let here = self.ns.query("ip", "-6 address show tentative")?;
            let there = self.far.query("ip", "-6 address show tentative")?;
            if here.trim().is_empty() && there.trim().is_empty() {
                std::thread::sleep(Duration::from_millis(100));
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        anyhow::bail!("addresses stay tentative")
    }

    /// The configuration of the tests. `local_endpoint` is 10.2.3.4.
    pub fn config(&self, bond: Option<Bond>, tunnels: u8) -> Config {
        Config {
            site: Site {
                name: self.site.clone(),
                private_key: PrivateKey::generate(),
                addresses: vec!["10.100.0.1/32".parse().unwrap(), "fd00:100::1/128".parse().unwrap()],
            },
            bond,
            steering: Steering {
                device: name("ecmp0"),
                policy: Policy::Hash,
                backend: BackendChoice::Auto,
                mtu: 1420,
                mss_clamp: true,
                seed: 7,
                flowlet_gap_us: None,
                spray_elephants: true,
                restore_order: true,
                restore_ms: 50,
            },
            peers: vec![Peer {
                name: "site-b".into(),
                public_key: PrivateKey::generate().public_key(),
                preshared_key: Some(PresharedKey::generate()),
                local_endpoint: "10.2.3.4".parse().unwrap(),
                remote_endpoint: "10.5.6.7".parse().unwrap(),
                remote_name: None,
                remote_bond: None,
                policy: None,
                restore_order: true,
                prefixes: vec!["10.20.0.0/16".parse().unwrap(), "fd00:20::/48".parse().unwrap()],
                tunnels: (0..tunnels)
                    .map(|i| Tunnel {
                        name: name(&format!("wg{i}")),
                        listen_port: 51820 + u16::from(i),
                        remote_port: 51920 + u16::from(i),
                        address: format!("169.254.77.{}/31", 2 * i).parse().unwrap(),
                        weight: Some(1),
                        private_key: None,
                        public_key: None,
                        preshared_key: None,
                    })
                    .collect(),
            }],
            rules: vec![],
            health: Health { interval_ms: 100, down_after: 3, up_after: 5 },
            metrics: None,
        }
    }

    pub fn plan(&self, backend: Backend) -> Plan {
        Plan::new(&self.config(None, 3), backend)
    }

    pub fn dump(&self) -> Result<Dump> {
        Dump::take(&self.ns, &[&self.site])
    }

    /// Fails unless the host is again as it was in `before`.
    pub fn assert_same(&self, before: &Dump, when: &str) -> Result<()> {
        let difference = before.wait_for_same(SETTLE, || self.dump())?;
        ensure!(difference.is_none(), "{when}:\n{}", difference.unwrap_or_default());
        Ok(())
    }

    /// Runs `body` inside the namespace, in its own runtime and mount namespace.
    pub fn inside<T: Send>(&self, body: impl AsyncFnOnce() -> T + Send) -> T {
        self.ns.run(|| {
            // SAFETY: only the mounts and the working directory of this short-lived thread change.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("needs root");
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .expect("making mounts private");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(body())
        })
    }

    /// Locks the run directory and opens the journal.
    pub fn open(&self) -> Result<(RunDir, Journal)> {
        let run_dir = RunDir::lock(&self.run_root, &self.site)?;
        let journal = Journal::open(&run_dir.journal_path(), &self.site)?;
        Ok((run_dir, journal))
    }

    /// Brings `plan` up, calls `meanwhile`, and takes everything down.
    pub fn up_and_down(&self, plan: &Plan, meanwhile: impl FnOnce(&HostLinks) -> Result<()> + Send) -> Result<()> {
        self.inside(async || {
            let (run_dir, mut journal) = self.open()?;
            host::preflight(plan).await?;
            let links = host::bring_up(plan, &OPTIONS, &mut journal, &mut |_| {}).await?;
            let result = meanwhile(&links);
            if let Some(userspace) = links.userspace {
                userspace.stop().await;
            }
            let undone = journal.undo(&Netlink::open()?, &mut |_| Ok(())).await?;
            ensure!(undone > plan.tunnels.len(), "only {undone} changes were undone");
            run_dir.remove()?;
            ensure!(!self.run_root.exists(), "the run directory is left");
            result
        })
    }

    /// Tests each change that `plan` needs: `sabotage` makes that change fail, and the error must name its object.
    /// After `repair` has removed the sabotage, the host must be as it was before.
    pub fn each_step_fails(
        &self,
        plan: &Plan,
        sabotage: impl Fn(&Change) -> Result<Option<Sabotage>> + Sync,
    ) -> Result<()> {
        let before = self.dump()?;
        let steps: Vec<Change> = self.inside(async || host::changes(plan).await)?;
        let mut failed = 0;
        for (at, planned) in steps.iter().enumerate() {
            let mut planted = None;
            let mut step = 0;
            let result = self.inside(async || {
                let (run_dir, mut journal) = self.open()?;
                let result = host::bring_up(plan, &OPTIONS, &mut journal, &mut |change| {
                    if step == at {
                        planted = sabotage(change).expect("the sabotage works");
                    }
                    step += 1;
                })
                .await;
                let result = match result {
                    Ok(links) => {
                        if let Some(userspace) = links.userspace {
                            userspace.stop().await;
                        }
                        journal.undo(&Netlink::open()?, &mut |_| Ok(())).await?;
                        Ok(())
                    }
                    Err(e) => Err(e),
                };
                ensure!(journal.is_empty(), "step {at}: the journal is not empty");
                run_dir.remove()?;
                Ok(result)
            })?;
            let Some(planted) = planted else { continue };
            let message = match result {
                Ok(()) => anyhow::bail!("step {at} ({planned}) does not fail"),
                Err(e) => chain(&e),
            };
            ensure!(message.contains(&planted.object), "step {at} ({planned}): {message}");
            lab::log::note(format!("step {at} ({planned}) fails with: {message}"));
            for command in &planted.repair {
                self.ns.ip(command)?;
            }
            self.assert_same(&before, &format!("after step {at} ({planned}) failed with: {message}"))?;
            failed += 1;
        }
        ensure!(failed > plan.tunnels.len() + plan.routes.len(), "only {failed} steps were made to fail");
        Ok(())
    }
}

impl Fixture {
    /// Brings `plan` up once for each undo, and lets that undo fail. The record of it must stay, on disk too, and
    /// `ecmpvpn down` must then undo it.
    pub fn each_undo_fails(&self, plan: &Plan) -> Result<()> {
        let before = self.dump()?;
        let (mut at, mut records) = (0, usize::MAX);
        while at < records {
            let failed = self.inside(async || {
                let (run_dir, mut journal) = self.open()?;
                host::preflight(plan).await?;
                let links = host::bring_up(plan, &OPTIONS, &mut journal, &mut |_| {}).await?;
                if let Some(userspace) = links.userspace {
                    userspace.stop().await;
                }
                records = journal.records().count();
                let mut failed = None;
                let mut step = 0;
                let mut on_undo = |undo: &Undo| {
                    step += 1;
                    if step == at + 1 {
                        failed = Some(undo.clone());
                        return Err(std::io::Error::other("sabotaged"));
                    }
                    Ok(())
                };
                let error = journal.undo(&Netlink::open()?, &mut on_undo).await.err().context("no error")?;
                let failed = failed.context("no undo failed")?;
                ensure!(error.to_string().contains(&format!("{failed}: sabotaged")), "{error}");
                let left = Journal::open(&run_dir.journal_path(), &self.site)?;
                ensure!(left.records().eq([&failed]), "undo {at} failed, and this is left: {left:?}");
                Ok(failed)
            })?;
            self.take_down()?;
            self.assert_same(&before, &format!("after undo {at} ({failed}) failed once"))?;
            ensure!(self.take_down()? == TakenDown::default(), "after undo {at} ({failed}) something is left");
            at += 1;
        }
        ensure!(at > plan.tunnels.len() + plan.routes.len(), "only {at} undos were made to fail");
        Ok(())
    }
}

/// A change of the host that makes the next step fail.
pub struct Sabotage {
    /// The object that the error must name.
    pub object: String,
    /// `ip` commands that remove the sabotage.
    pub repair: Vec<String>,
}

/// An error with its causes, in one line.
pub fn chain(error: &HostError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
