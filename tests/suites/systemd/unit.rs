//! The unit is started, reloaded, watched, restarted and stopped.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::kind::Kind;
use lab::sites::Lab;

use super::machine::Machine;
use super::stage::{boot, bytes_cross, lab, lossless, rewrite, tunnels, warm_up};

/// How long a dump may take to settle.
const SETTLE: Duration = Duration::from_secs(5);
/// A period of the watchdog that a test can wait for.
const SHORT_WATCHDOG: &str = "WatchdogSec=3\n";
/// The unit is up, and was not started again by systemd.
const RUNNING: [(&str, &str); 3] = [("ActiveState", "active"), ("SubState", "running"), ("NRestarts", "0")];

fn ip_links(lab: &Lab) -> Result<String> {
    lab.sites[0].gateway.query("ip", "-o link show type wireguard")
}

pub fn the_unit_starts_reloads_and_stops(kind: Kind) -> Result<()> {
    let (lab, _b) = lab(kind)?;
    let [site, far] = &lab.sites;
    let before = site.dump()?;
    let machine = boot(&lab, kind, "")?;
    machine.unit("start")?;
    // `systemctl start` waited for READY=1, which brings the status: everything is in place.
    ensure!(tunnels(&machine.stats()?).len() == lab.tunnels.len(), "{}", machine.stats()?);
    let status = format!("{} is up: 3 tunnels to {} through ecmp0", site.name, far.name);
    machine.assert_properties(&[("Type", "notify"), ("NotifyAccess", "main"), ("StatusText", &status)])?;
    machine.assert_properties(&[("WatchdogUSec", "30s"), ("Restart", "on-failure")])?;
    machine.assert_properties(&RUNNING)?;
    let journal = machine.journal()?;
    ensure!(!journal.contains("Unknown key") && !journal.contains("Failed to parse"), "{journal}");
    warm_up(&lab, &machine)?;

    rewrite(&lab, |text| text.replacen("weight = 1", "weight = 3", 1))?;
    machine.unit("reload")?;
    let weights = tunnels(&machine.stats()?).iter().map(|tunnel| tunnel["weight"].clone()).collect::<Vec<_>>();
    ensure!(weights == [3, 1, 1], "the weights are {weights:?}");
    machine.assert_properties(&RUNNING)?;

    let sound = rewrite(&lab, |text| text.replacen("weight = 3", "weight = \"three\"", 1))?;
    let reload = machine.systemctl(&["reload", "ecmpvpn.service"])?;
    ensure!(reload.code == 1, "`systemctl reload` of a wrong configuration ended with {reload:?}");
    machine.assert_properties(&RUNNING)?;
    ensure!(machine.journal()?.contains("weight"), "the journal has no reason:\n{}", machine.journal()?);
    bytes_cross(&lab)?;
    fs::write(&site.config, sound)?;
    machine.unit("reload")?;
    machine.assert_properties(&RUNNING)?;

    machine.unit("stop")?;
    machine.assert_properties(&[("ActiveState", "inactive"), ("Result", "success"), ("MainPID", "0")])?;
    if kind == Kind::Kernel {
        bytes_cross(&lab).context("`systemctl stop` did not leave the VPN up")?;
        let (code, _, complaint) = machine.ecmpvpn(&["down"])?;
        ensure!(code == 0, "`down` ended with {code}: {complaint}");
    }
    let left = before.wait_for_same(SETTLE, || site.dump())?;
    ensure!(left.is_none(), "left at A:\n{}\n{}", left.unwrap_or_default(), machine.journal()?);
    ensure!(!machine.path("/run/ecmpvpn").join(&site.name).exists(), "run files are left");
    Ok(())
}

pub fn a_hung_process_is_replaced(kind: Kind) -> Result<()> {
    let (lab, _b) = lab(kind)?;
    let machine = boot(&lab, kind, SHORT_WATCHDOG)?;
    machine.unit("start")?;
    warm_up(&lab, &machine)?;
    let former = machine.property("MainPID")?;
    let replaced = || {
        let stop = machine.systemctl(&["kill", "--signal=STOP", "ecmpvpn.service"])?;
        ensure!(stop.code == 0, "it was not stopped: {stop:?}");
        machine.wait_for("NRestarts", "1")?;
        machine.wait_for("ActiveState", "active")
    };
    // The userspace backend's tunnels hang with the process.
    if kind == Kind::Kernel {
        lossless(&lab, replaced)?;
    } else {
        replaced()?;
    }
    let journal = machine.journal()?;
    ensure!(journal.contains("Watchdog timeout"), "it was not the watchdog:\n{journal}");
    ensure!(machine.property("MainPID")? != former, "the process is the same");
    warm_up(&lab, &machine)?;
    machine.assert_properties(&[("ActiveState", "active"), ("NRestarts", "1")])
}

pub fn a_restart_loses_no_packet(kind: Kind) -> Result<()> {
    let (lab, _b) = lab(kind)?;
    let machine = boot(&lab, kind, "")?;
    machine.unit("start")?;
    warm_up(&lab, &machine)?;
    let (former, links) = (machine.property("MainPID")?, ip_links(&lab)?);
    lossless(&lab, || machine.unit("restart"))?;
    ensure!(machine.property("MainPID")? != former, "the process is the same");
    ensure!(ip_links(&lab)? == links, "links were made again: {links}, now {}", ip_links(&lab)?);
    machine.assert_properties(&RUNNING)?;
    warm_up(&lab, &machine)
}

pub fn a_wrong_configuration_is_not_tried_again(kind: Kind) -> Result<()> {
    let (lab, _b) = lab(kind)?;
    let site = &lab.sites[0];
    let before = site.dump()?;
    let machine = boot(&lab, kind, "")?;
    let sound = rewrite(&lab, |text| format!("{text}\nno TOML\n"))?;
    let start = machine.systemctl(&["start", "ecmpvpn.service"])?;
    ensure!(start.code == 1, "`systemctl start` of a wrong configuration ended with {start:?}");
    // A unit that waits for its restart is `activating`, in the state `auto-restart`.
    let failed = [("ActiveState", "failed"), ("SubState", "failed"), ("Result", "exit-code")];
    machine.assert_properties(&failed)?;
    machine.assert_properties(&[("ExecMainStatus", "2"), ("NRestarts", "0")])?;
    let left = before.wait_for_same(SETTLE, || site.dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    fs::write(&site.config, sound)?;
    machine.unit("start")?;
    machine.assert_properties(&RUNNING)?;
    warm_up(&lab, &machine)
}

/// `run` writes the names of new key files to the configuration, in the only folder that it may write.
pub fn keys_are_renewed(kind: Kind) -> Result<()> {
    let (lab, _b) = lab(kind)?;
    let machine = boot(&lab, kind, "")?;
    machine.unit("start")?;
    warm_up(&lab, &machine)?;
    let rotate = |words: &[&str]| -> Result<String> {
        let (code, output, complaint) = machine.ecmpvpn(&[&["rotate"], words].concat())?;
        ensure!(code == 0, "`rotate {}` ended with {code}: {complaint}\n{}", words.join(" "), machine.journal()?);
        Ok(output + &complaint)
    };
    let former = fs::read_to_string(&lab.sites[0].config)?;
    let file = lab.sites[0].config.with_file_name("for-b").display().to_string();
    rotate(&["--prepare", "--output", "/etc/ecmpvpn/for-b"])?;
    let (code, _, complaint) = lab.ecmpvpn(1, &["rotate", "--apply", &file])?;
    ensure!(code == 0, "`rotate --apply` at B ended with {code}: {complaint}");
    let description = rotate(&[])?;
    for tunnel in &lab.tunnels {
        ensure!(description.contains(&format!("{}: works with its new keys", tunnel.name)), "{description}");
    }
    ensure!(fs::read_to_string(&lab.sites[0].config)? != former, "the configuration names the former keys");
    machine.assert_properties(&RUNNING)?;
    bytes_cross(&lab)
}

fn field<'t>(status: &'t str, name: &str) -> Result<&'t str> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.map(str::trim).with_context(|| format!("no {name} in {status}"))
}

/// Whether the mount at exactly `path` is read-only, for the process at `process`.
fn is_read_only(process: &Path, path: &str) -> Result<bool> {
    let mounts = fs::read_to_string(process.join("mountinfo"))?;
    let mut fields = mounts.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    // The last one covers the others.
    let found = fields.rfind(|fields| fields.get(4) == Some(&path));
    let options = found.with_context(|| format!("{path} is not mounted:\n{mounts}"))?[5];
    Ok(options.split(',').any(|option| option == "ro"))
}

pub fn the_process_is_confined(kind: Kind) -> Result<()> {
    // Bits 12, 13, 38 and 39: NET_ADMIN, NET_RAW, PERFMON and BPF (include/uapi/linux/capability.h).
    const KEPT: &str = "000000c000003000";
    let (lab, _b) = lab(kind)?;
    let machine = boot(&lab, kind, "")?;
    machine.unit("start")?;
    let bounding = machine.property("CapabilityBoundingSet")?;
    let bounding = bounding.split_whitespace().collect::<BTreeSet<_>>();
    ensure!(bounding == BTreeSet::from(["cap_bpf", "cap_net_admin", "cap_net_raw", "cap_perfmon"]), "{bounding:?}");
    machine.assert_properties(&[("NoNewPrivileges", "yes"), ("LimitCORE", "0"), ("UMask", "0077")])?;
    let process = machine.process()?;
    // The probing thread starts a moment after systemd has heard that the site is up.
    let since = Instant::now();
    while fs::read_dir(process.join("task"))?.count() < 3 {
        ensure!(since.elapsed() < Duration::from_secs(5), "it has fewer than three threads");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut threads = 0;
    for task in fs::read_dir(process.join("task"))? {
        // A thread may have ended since.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
        for (name, value) in [
            ("CapBnd", KEPT),
            ("CapPrm", KEPT),
            ("CapEff", KEPT),
            ("CapInh", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            // 2: a filter.
            ("Seccomp", "2"),
            ("Umask", "0077"),
        ] {
            let found = field(&status, name)?;
            ensure!(found == value, "{name} of {} is {found} and not {value}", field(&status, "Name")?);
        }
        threads += 1;
    }
    ensure!(threads >= 3, "it has only {threads} threads");
    let limits = fs::read_to_string(process.join("limits"))?;
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).context("no limit")?;
    ensure!(core.split_whitespace().take(2).eq(["0", "0"]), "core dumps are limited to {core}");
    ensure!(is_read_only(&process, "/")? && !is_read_only(&process, "/etc/ecmpvpn")?, "what it may write is wrong");
    Ok(())
}

pub fn a_system_that_ends_leaves_nothing(kind: Kind) -> Result<()> {
    let (lab, _b) = lab(kind)?;
    let machine = boot(&lab, kind, "")?;
    machine.unit("start")?;
    machine.unit("stop")?;
    let traces = machine.traces();
    ensure!(traces.iter().all(|path| path.exists()), "{traces:?} are not there");
    drop::<Machine<'_>>(machine);
    ensure!(traces.iter().all(|path| !path.exists()), "something is left of {traces:?}");
    Ok(())
}
