//! What a site shares with others: kernel settings with other sites, and ports with the operator's session.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::{Bond, BondMode, LacpRate, XmitHashPolicy};
use ecmpvpn::host::{self, Change, Netlink};
use ecmpvpn::plan::{Backend, Plan};
use lab::dump::Dump;
use lab::netns::unique;

use crate::fixture::{Fixture, OPTIONS, chain, name};

/// A process that has a connection and the name `sshd`, and does nothing.
struct Server(Child);

impl Server {
    fn start(dir: &std::path::Path, connection: TcpStream) -> Result<Self> {
        let program = dir.join("sshd");
        if !program.exists() {
            let places = ["/usr/bin/sleep", "/bin/sleep"];
            let sleep = places.into_iter().find(|place| std::path::Path::new(place).exists());
            std::os::unix::fs::symlink(sleep.context("there is no sleep")?, &program)?;
        }
        let mut command = Command::new(program);
        // Some systems have one program for all of coreutils: it must see its own name.
        command.arg0("sleep").arg("600").stdin(Stdio::from(OwnedFd::from(connection)));
        Ok(Self(command.spawn().context("starting a process named sshd")?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Why `up0` may not be enslaved; empty: it may.
fn refusal(fixture: &Fixture, plan: &Plan) -> String {
    let changes = [Change::Enslave { member: name("up0"), bond: name("bond0"), addresses: vec![] }];
    let checked = fixture.inside(async || host::check_management(plan, &changes, false).await);
    checked.map_or_else(|error| chain(&error), |()| String::new())
}

/// A session of `sshd` on another port, to an address of the port and to one that is reached through it; and a default
/// route of another table. Only the default route of the main table and port 22 were known before.
pub fn sessions_on_any_port_and_table_are_protected(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    let (ns, far, dir) = (&fixture.ns, &fixture.far, tempfile::tempdir()?);
    ns.ip("route del default via 10.2.3.1")?;
    ns.ip("link set lo up")?;
    ns.ip("address add 10.99.0.1/32 dev lo")?;
    far.ip("address add 10.2.3.5/24 dev f0")?;
    far.ip("route add 10.99.0.1/32 via 10.2.3.4")?;
    let bond = Bond {
        name: name("bond0"),
        members: vec![name("up0")],
        mode: BondMode::Lacp,
        xmit_hash_policy: XmitHashPolicy::Layer34,
        lacp_rate: LacpRate::Fast,
        miimon_ms: 100,
        addresses: vec!["10.2.3.4/24".parse()?],
    };
    let plan = Plan::new(&fixture.config(Some(bond), 3), backend);
    for address in ["10.2.3.4:2222", "10.99.0.1:2222"] {
        let listener = ns.run(|| TcpListener::bind(address))?;
        let _client = far.run(|| TcpStream::connect(address))?;
        let (connection, _) = listener.accept()?;
        let refused = refusal(&fixture, &plan);
        ensure!(refused.is_empty(), "{address}: a connection of another program counts as a session: {refused}");
        let _server = Server::start(dir.path(), connection)?;
        let refused = refusal(&fixture, &plan);
        let expected = format!("up0 carries an SSH session from 10.2.3.5 to {address}");
        ensure!(refused.contains(&expected), "{address}: {refused:?}");
    }
    let refused = refusal(&fixture, &plan);
    ensure!(refused.is_empty(), "without any session: {refused}");
    ns.ip("route add default via 10.2.3.5 table 1000")?;
    let refused = refusal(&fixture, &plan);
    ensure!(refused.contains("up0 carries the default route via 10.2.3.5 of table 1000"), "{refused:?}");
    Ok(())
}

/// A second site on the host of `first`: other devices, ports and nets.
fn second(first: &Fixture, backend: Backend) -> Result<(String, Plan)> {
    let mut config = first.config(None, 3);
    config.site.name = unique("second");
    config.site.addresses = vec!["10.100.0.2/32".parse()?, "fd00:100::2/128".parse()?];
    config.steering.device = name("ecmp1");
    config.peers[0].prefixes = vec!["10.21.0.0/16".parse()?, "fd00:21::/48".parse()?];
    for (i, tunnel) in (0_u8..).zip(&mut config.peers[0].tunnels) {
        tunnel.name = name(&format!("wh{i}"));
        tunnel.listen_port += 10;
        tunnel.address = format!("169.254.78.{}/31", 2 * i).parse()?;
    }
    Ok((config.site.name.clone(), Plan::new(&config, backend)))
}

/// `down` of one site leaves on what the other one needs, in either order; the last one restores the host. Before, the
/// site that came first turned forwarding off under the second.
pub fn two_sites_share_forwarding(backend: Backend) -> Result<()> {
    let fixture = Fixture::new()?;
    let plan_a = fixture.plan(backend);
    let (site_b, plan_b) = second(&fixture, backend)?;
    let dump = || Dump::take(&fixture.ns, &[&fixture.site, &site_b]);
    let before = dump()?;
    for first_leaves_first in [true, false] {
        fixture.inside(async || {
            let mut sites = Vec::new();
            for (site, plan) in [(&fixture.site, &plan_a), (&site_b, &plan_b)] {
                let run_dir = host::RunDir::lock(&fixture.run_root, site)?;
                let mut journal = host::Journal::open(&run_dir.journal_path(), site)?;
                let links = host::bring_up(plan, &OPTIONS, &mut journal, &mut |_| {}).await?;
                sites.push((run_dir, journal, links));
            }
            if !first_leaves_first {
                sites.reverse();
            }
            for (at, (run_dir, mut journal, links)) in sites.into_iter().enumerate() {
                if let Some(userspace) = links.userspace {
                    userspace.stop().await;
                }
                journal.undo(&Netlink::open()?, &mut |_| Ok(())).await?;
                run_dir.remove()?;
                let expected = if at == 0 { "1" } else { "0" };
                for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                    let value = fixture.ns.query("cat", &format!("/proc/sys/net/{switch}"))?;
                    ensure!(value.trim() == expected, "{switch} is {value} after {} sites went", at + 1);
                }
            }
            anyhow::Ok(())
        })?;
        let left = before.wait_for_same(std::time::Duration::from_secs(30), dump)?;
        ensure!(left.is_none(), "first leaves first: {first_leaves_first}\n{}", left.unwrap_or_default());
    }
    Ok(())
}
