//! Tests the bond and its members.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::config::{Bond, BondMode, LacpRate, XmitHashPolicy};
use ecmpvpn::host::{self, Change};
use ecmpvpn::plan::{Backend, Plan};

use crate::fixture::{Fixture, OPTIONS, Sabotage, chain, name};
use crate::tunnels;

const MEMBERS: [&str; 3] = ["m0", "m1", "m2"];

fn bond() -> Bond {
    Bond {
        name: name("bond0"),
        members: MEMBERS.iter().map(|member| name(member)).collect(),
        mode: BondMode::Lacp,
        xmit_hash_policy: XmitHashPolicy::Layer34,
        lacp_rate: LacpRate::Fast,
        miimon_ms: 100,
        addresses: vec!["10.2.3.4/24".parse().unwrap()],
    }
}

/// Makes a host with three cables into a bond. The ports here have nearly every kind of address, route and neighbour
/// that a member can have.
fn cabled() -> Result<Fixture> {
    let fixture = Fixture::bare()?;
    let (ns, far) = (&fixture.ns, &fixture.far);
    far.ip("link add bond0 type bond mode 802.3ad miimon 100 lacp_rate fast xmit_hash_policy layer3+4")?;
    for (at, member) in MEMBERS.iter().enumerate() {
        ns.ip(&format!("link add {member} type veth peer name f{at} netns {}", far.name()))?;
        far.ip(&format!("link set f{at} master bond0"))?;
    }
    far.ip("link set bond0 up")?;
    for command in [
        "link set m0 mtu 1600",
        "link set m1 mtu 2000",
        "address add 10.2.3.4/24 brd + dev m0",
        "address add 10.2.3.5/24 dev m0",
        "address add 10.9.9.9/32 dev m0 scope link",
        "address add 10.8.0.1 peer 10.8.0.2/32 dev m0 label m0:ptp",
        "address add fd00:2::4/64 dev m0",
        "address add fd00:3::4/64 dev m0 noprefixroute",
        "link set m0 up",
        "link set m1 up",
        "address add 192.0.2.1/24 dev m1 metric 77",
        // m2 is down but has an address.
        "address add 198.51.100.1/24 dev m2",
        "route add default via 10.2.3.1 proto static metric 100",
        "route add 203.0.113.0/24 via 10.2.3.2 dev m0 proto dhcp src 10.2.3.5 mtu 1400",
        "route add 10.7.0.0/16 via 10.77.0.1 dev m0 onlink",
        "route add 10.6.0.0/16 dev m1 scope link table 7",
        // The kernel accepts this route only after the route before it.
        "route add 10.5.1.0/24 via 10.8.0.2",
        "route add 10.4.0.0/16 nexthop via 10.2.3.6 weight 2 nexthop via 192.0.2.9",
        "rule add from 10.2.3.5 table 7",
        "neighbour add 10.2.3.99 lladdr 02:00:00:00:00:99 dev m0 nud permanent",
        "-6 neighbour add fd00:2::99 lladdr 02:00:00:00:00:98 dev m0 nud permanent",
    ] {
        ns.ip(command)?;
    }
    fixture.wait_for_addresses()?;
    for command in ["-6 route add fd00:9::/64 via fd00:2::9 metric 50", "-6 route add default via fe80::9 dev m0"] {
        ns.ip(command)?;
    }
    std::thread::sleep(Duration::from_millis(500));
    Ok(fixture)
}

fn plan(fixture: &Fixture, backend: Backend) -> Plan {
    Plan::new(&fixture.config(Some(bond()), 3), backend)
}

fn active_ports(fixture: &Fixture) -> Result<String> {
    fixture.ns.query("cat", "/proc/thread-self/net/bonding/bond0")
}

pub fn bond_round_trip_leaves_no_trace(backend: Backend) -> Result<()> {
    let fixture = cabled()?;
    let before = fixture.dump()?;
    let plan = plan(&fixture, backend);
    for round in 0..2 {
        fixture.up_and_down(&plan, |_| {
            let detail = active_ports(&fixture)?;
            for line in
                ["IEEE 802.3ad", "layer3+4", "LACP rate: fast", "Number of ports: 3", "MII Polling Interval (ms): 100"]
            {
                ensure!(detail.contains(line), "no `{line}` in {detail}");
            }
            let members: Vec<&str> = detail.lines().filter_map(|line| line.strip_prefix("Slave Interface: ")).collect();
            ensure!(members == MEMBERS, "{members:?}");
            let addresses = fixture.ns.query("ip", "-br address show")?;
            ensure!(addresses.lines().any(|l| l.starts_with("bond0") && l.contains("10.2.3.4/24")), "{addresses}");
            ensure!(!addresses.lines().any(|l| l.starts_with('m') && l.contains('/')), "{addresses}");
            Ok(())
        })?;
        fixture.assert_same(&before, &format!("after round {round}"))?;
    }
    Ok(())
}

pub fn bond_step_that_fails_undoes_the_earlier_ones(backend: Backend) -> Result<()> {
    let fixture = cabled()?;
    let plan = plan(&fixture, backend);
    fixture.each_step_fails(&plan, |change| {
        let ip = |command: &str, object: &str, repair: &[String]| {
            fixture.ns.ip(command)?;
            Ok(Some(Sabotage { object: object.to_owned(), repair: repair.to_vec() }))
        };
        match change {
            Change::CreateBond { .. } => {
                ip("link add bond0 type veth peer name thief", "bond0", &["link delete bond0".to_owned()])
            }
            Change::Enslave { member, .. } => ip("link delete bond0", member.as_str(), &[]),
            Change::AddAddress { .. } => ip("address add 10.2.3.4/24 dev bond0", "10.2.3.4/24", &[]),
            Change::SetUp { .. } | Change::MoveRoute { .. } => ip("link delete bond0", "bond0", &[]),
            other => tunnels::sabotage(&fixture, other),
        }
    })
}

/// Finding A2.
pub fn bond_undo_that_fails_is_tried_again(backend: Backend) -> Result<()> {
    let fixture = cabled()?;
    fixture.each_undo_fails(&plan(&fixture, backend))
}

pub fn bond_of_somebody_else_is_reused_and_stays(backend: Backend) -> Result<()> {
    let fixture = cabled()?;
    let ns = &fixture.ns;
    ns.ip("link add bond0 type bond mode 802.3ad miimon 100 lacp_rate fast xmit_hash_policy layer3+4")?;
    ns.ip("link set m1 down")?;
    ns.ip("link set m1 master bond0")?;
    ns.ip("link set bond0 up")?;
    std::thread::sleep(Duration::from_secs(3));
    fixture.wait_for_addresses()?;
    let before = fixture.dump()?;
    let plan = plan(&fixture, backend);
    let lines: Vec<String> =
        fixture.inside(async || host::changes(&plan).await)?.iter().map(ToString::to_string).collect();
    for line in [
        "reuse bond bond0: it has these settings",
        "leave m1 in bond0",
        "enslave m2 to bond0 (its address 198.51.100.1/24 comes back on `ecmpvpn down`)",
    ] {
        ensure!(lines.iter().any(|l| l == line), "no `{line}` in {lines:#?}");
    }
    fixture.up_and_down(&plan, |_| {
        ensure!(active_ports(&fixture)?.matches("Slave Interface").count() == 3);
        Ok(())
    })?;
    fixture.assert_same(&before, "afterwards")
}

pub fn bond_that_differs_or_cannot_be_made_is_named(backend: Backend) -> Result<()> {
    let fixture = cabled()?;
    let ns = &fixture.ns;
    let before = fixture.dump()?;
    let message = |plan: &Plan| {
        let error = fixture.inside(async || host::preflight(plan).await).err().context("no error")?;
        anyhow::Ok(chain(&error))
    };
    let desired = plan(&fixture, backend);
    fixture.inside(async || host::preflight(&desired).await)?;
    fixture.assert_same(&before, "after a good preflight")?;

    let mut missing = bond();
    missing.members[2] = name("eno3");
    let text = message(&Plan::new(&fixture.config(Some(missing), 1), backend))?;
    ensure!(text == "bond member eno3 does not exist; this host has m0, m1, m2", "{text}");

    let mut homeless = bond();
    homeless.addresses.clear();
    let text = message(&Plan::new(&fixture.config(Some(homeless), 1), backend))?;
    ensure!(text.contains("it is on a bond member, which loses it"), "{text}");

    for (make, expected) in [
        ("link add bond0 type veth peer name thief", "bond0 exists and was not made by ecmpvpn"),
        ("link add bond0 type bond mode balance-xor miimon 100 xmit_hash_policy layer3+4", "with mode balance-xor"),
        ("link add bond0 type bond mode 802.3ad miimon 100 lacp_rate fast", "with xmit_hash_policy layer2"),
        ("link add bond0 type bond mode 802.3ad miimon 100 xmit_hash_policy layer3+4", "with lacp_rate slow"),
        (
            "link add bond0 type bond mode 802.3ad miimon 50 lacp_rate fast xmit_hash_policy layer3+4",
            "with miimon_ms 50",
        ),
    ] {
        ns.ip(make)?;
        let text = message(&desired)?;
        ensure!(text.contains(expected), "{text}");
        ns.ip("link delete bond0")?;
    }
    ns.ip("link add other type bond")?;
    ns.ip("link set m2 master other")?;
    let text = message(&desired)?;
    ensure!(text.starts_with("bond member m2 already belongs to other"), "{text}");
    ns.ip("link delete other")?;
    Ok(())
}

pub fn bond_crash_is_undone_by_another_process(backend: Backend) -> Result<()> {
    let fixture = cabled()?;
    let before = fixture.dump()?;
    let plan = plan(&fixture, backend);
    let steps = fixture.inside(async || host::changes(&plan).await)?.len();
    // The process is killed before every third change: the future is dropped there.
    for stop_at in (0..=steps).step_by(3) {
        fixture.inside(async || {
            let (_run_dir, mut journal) = fixture.open()?;
            let mut step = 0;
            let (killed, kill) = tokio::sync::oneshot::channel::<()>();
            let mut killed = Some(killed);
            let mut on_change = |_: &Change| {
                step += 1;
                if step > stop_at {
                    killed.take();
                }
            };
            let work = host::bring_up(&plan, &OPTIONS, &mut journal, &mut on_change);
            tokio::select! {
                biased;
                _ = kill => {}
                result = work => { result.map(drop)?; }
            }
            anyhow::Ok(())
        })?;
        fixture.take_down()?;
        fixture.assert_same(&before, &format!("after a crash at step {stop_at}"))?;
    }
    Ok(())
}
