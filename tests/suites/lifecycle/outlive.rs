//! The daemon ends in different ways, and what it made continues to work.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use ecmpvpn_common::layout::programs;
use lab::dump::Dump;
use lab::kind::Kind;
use lab::sites::{Lab, Site, binary};
use lab::traffic::TcpLoad;
use memchr::memmem;
use rustix::process::Signal;

use super::stage::{indexes, lab, rewrite, stream, total};

/// How long a dump may take to settle.
const SETTLE: Duration = Duration::from_secs(5);

/// Ids of the programs on A's steering device. Empty without tcx.
fn attached(lab: &Lab) -> Vec<u32> {
    let query = || SchedClassifier::query_tcx("ecmp0", TcAttachType::Egress);
    let programs = lab.sites[0].gateway.run(query).map(|(_, programs)| programs).unwrap_or_default();
    programs.iter().map(ProgramInfo::id).collect()
}

/// The kernel's tag of A's steering program: a digest of its instructions.
fn tag(lab: &Lab) -> Result<u64> {
    Ok(ProgramInfo::from_pin(pins(lab)?.join(programs::EGRESS))?.tag())
}

/// The directory of A's pins.
fn pins(lab: &Lab) -> Result<PathBuf> {
    let pins = Path::new("/sys/fs/bpf/ecmpvpn").join(&lab.sites[0].name);
    Ok(fs::read_dir(&pins)?.next().context("no pins")??.path())
}

/// Makes another version of the program under test. Its BPF programs have another multiplier where they look up the
/// peer of a destination in their cache.
pub fn other_binary(lab: &Lab) -> Result<PathBuf> {
    // `*= 0x9e3779b1` as a BPF instruction: opcode, registers, offset 0, constant.
    const NOTHING: [u8; 2] = [0, 0];
    const FORMER: [u8; 4] = 0x9e37_79b1u32.to_le_bytes();
    const OTHER: [u8; 4] = 0x85eb_ca6bu32.to_le_bytes();
    const MULTIPLY: [u8; 2] = [0x24, 0x27];
    let former = fs::read(binary()?)?;
    let mut bytes = former.clone();
    let mut changed = 0;
    for at in memmem::find_iter(&former, &FORMER).filter(|at| *at >= 4) {
        if MULTIPLY.contains(&former[at - 4]) && former[at - 2..at] == NOTHING {
            bytes[at..at + 4].copy_from_slice(&OTHER);
            changed += 1;
        }
    }
    ensure!(changed > 0, "the programs have no such multiplier any more");
    let path = lab.dir().join("ecmpvpn-other");
    fs::write(&path, bytes)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn assert_clean(lab: &Lab, before: &lab::dump::Dump) -> Result<()> {
    let left = before.wait_for_same(SETTLE, || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    Ok(())
}

pub fn no_packet_is_lost_whatever_ends(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let [mut a, b] = lab.run()?;
    let made = indexes(&lab, 0)?;
    let first_programs = attached(&lab);
    let first_tag = tag(&lab)?;
    let upgraded = other_binary(&lab)?;
    let counted = total(&lab.stats(0)?, "tx_packets");
    let sent = stream(&lab, 0, || {
        // The daemon is killed, and none runs for a while.
        a.signal(Signal::KILL)?;
        a.wait()?;
        std::thread::sleep(Duration::from_secs(2));
        let mut again = lab.start_with(0, &["--persist"])?;
        again.wait_until_said("is up:")?;
        ensure!(again.output().contains(" up: adopting it"), "{}", again.output());
        ensure!(!again.output().contains("create"), "something was made again:\n{}", again.output());
        // An upgrade: another binary with other BPF programs.
        let status = again.stop(Signal::TERM)?;
        ensure!(status.success(), "{status}");
        let mut last = lab.start_program(0, &upgraded, &["--persist"])?;
        last.wait_until_said("is up:")?;
        a = last;
        Ok(())
    })?;
    ensure!(indexes(&lab, 0)? == made, "links were made again: {made:?}, now {:?}", indexes(&lab, 0)?);
    let stats = lab.stats(0)?;
    let since = total(&stats, "tx_packets") - counted;
    ensure!(since >= sent, "{since} packets counted of {sent}");
    let last_programs = attached(&lab);
    ensure!(
        first_programs.len() == last_programs.len() && first_programs.iter().all(|id| !last_programs.contains(id)),
        "the programs {first_programs:?} were not replaced: {last_programs:?}"
    );
    let last_tag = tag(&lab)?;
    ensure!(first_tag != last_tag, "the other binary's program is the same: {first_tag:x}");
    a.stop(Signal::TERM)?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
    ensure!(code == 0, "`down` ended with {code}: {complaint}");
    assert_clean(&lab, &before)?;
    drop(b);
    Ok(())
}

/// Counters and the journal outlive the process, even if the tunnels do not.
pub fn killed_and_started_again_nothing_is_forgotten(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let [a, b] = lab.run()?;
    ensure!(TcpLoad::bytes(8, 100_000).run(lab.path_v4())?.received() == 800_000);
    let counted = total(&lab.stats(0)?, "tx_bytes");
    a.stop(Signal::KILL)?;
    let mut again = lab.start(0)?;
    again.wait_until_said("is up:")?;
    let mut running = [again, b];
    lab.warm_up(&mut running)?;
    let now = total(&lab.stats(0)?, "tx_bytes");
    ensure!(now > counted, "{counted} bytes were counted before, {now} now");
    ensure!(TcpLoad::bytes(8, 100_000).run(lab.path_v4())?.received() == 800_000);
    let [again, b] = running;
    let status = again.stop(Signal::INT)?;
    ensure!(status.success(), "{status}");
    assert_clean(&lab, &before)?;
    drop(b);
    Ok(())
}

/// `run` refuses maps of another version. They continue to work, and `down` removes them.
pub fn another_layout_is_left_running(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let [a, _b] = lab.run()?;
    a.stop(Signal::KILL)?;
    let ours = pins(&lab)?;
    fs::rename(&ours, ours.with_file_name("v0"))?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["run"])?;
    ensure!(code == 1 && complaint.contains("another version"), "it ended with {code}: {complaint}");
    if kind == Kind::Kernel {
        ensure!(TcpLoad::bytes(4, 50_000).run(lab.path_v4())?.received() == 200_000, "traffic does not continue");
    }
    let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
    ensure!(code == 0, "`down` ended with {code}: {complaint}");
    assert_clean(&lab, &before)
}

/// `--confirm`, first without a confirmation and then with one.
pub fn unconfirmed_everything_is_undone(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let site = &lab.sites[0];
    if kind == Kind::Kernel {
        // An address and a route that the member must get back.
        site.gateway.ip("address add 192.0.2.1/24 dev u0")?;
        site.gateway.ip("route add 198.51.100.0/24 via 192.0.2.9 dev u0")?;
    }
    let before = site.dump()?;
    // A whole dump would take longer than the time for the confirmation.
    let is_up = || Ok::<_, anyhow::Error>(site.gateway.query("ip", "link show")?.contains("ecmp0:"));
    let mut run = lab.start_with(0, &["--confirm", "2"])?;
    run.wait_until_said("is up:")?;
    ensure!(is_up()?, "nothing is up");
    let since = Instant::now();
    let status = run.wait()?;
    ensure!(status.code() == Some(1) && since.elapsed() < Duration::from_secs(20), "it ended with {status}");
    ensure!(run.output().contains("nobody confirmed"), "{}", run.output());
    assert_clean(&lab, &before)?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["confirm"])?;
    ensure!(code == 1 && complaint.contains("nothing to confirm"), "it ended with {code}: {complaint}");

    let mut run = lab.start_with(0, &["--confirm", "6"])?;
    run.wait_until_said("is up:")?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["confirm"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    run.wait_until_said("confirmed: it stays up")?;
    std::thread::sleep(Duration::from_secs(7));
    ensure!(is_up()?, "it is down though it was confirmed");
    ensure!(run.stop(Signal::TERM)?.success());
    assert_clean(&lab, &before)
}

/// Takes a dump, with several attempts: it may fail while devices are being removed.
fn dump_of_changing(site: &Site) -> Result<Dump> {
    for _ in 0..40 {
        if let Ok(dump) = site.dump() {
            return Ok(dump);
        }
        std::thread::sleep(SETTLE / 20);
    }
    site.dump()
}

/// `--confirm` without a confirmation, and without the process that would undo everything.
pub fn unconfirmed_and_killed_everything_is_undone(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let site = &lab.sites[0];
    let before = site.dump()?;
    let is_up = || Ok::<_, anyhow::Error>(site.gateway.query("ip", "link show")?.contains("ecmp0:"));
    let mut run = lab.start_with(0, &["--confirm", "3"])?;
    run.wait_until_said("is up:")?;
    ensure!(run.stop(Signal::KILL)?.code().is_none());
    ensure!(kind == Kind::Userspace || is_up()?, "it ended with its process");
    let left = before.wait_for_same(Duration::from_secs(60), || dump_of_changing(site))?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());

    // With a confirmation, although the process has ended, everything stays up.
    let mut run = lab.start_with(0, &["--confirm", "6"])?;
    run.wait_until_said("is up:")?;
    ensure!(run.stop(Signal::KILL)?.code().is_none());
    let (code, _, complaint) = lab.ecmpvpn(0, &["confirm"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    std::thread::sleep(Duration::from_secs(8));
    ensure!(kind == Kind::Userspace || is_up()?, "it is down though it was confirmed");
    let (code, said, complaint) = lab.ecmpvpn(0, &["down"])?;
    ensure!(code == 0 && said.contains("changes were undone"), "`down` ended with {code}: {complaint}");
    assert_clean(&lab, &before)
}

/// `--confirm` without a confirmation, and with a process that hangs.
pub fn unconfirmed_and_hung_everything_is_undone(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let before = lab.sites[0].dump()?;
    let mut run = lab.start_with(0, &["--confirm", "2"])?;
    run.wait_until_said("is up:")?;
    run.signal(Signal::STOP)?;
    // The guard gives the process half a minute to undo everything by itself, and another half a minute to end when the
    // guard asks it to.
    let left = before.wait_for_same(Duration::from_secs(120), || dump_of_changing(&lab.sites[0]))?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    let status = run.wait()?;
    ensure!(status.code().is_none(), "it ended with {status}");
    Ok(())
}

/// A reload that takes long must not look like a process that hangs.
pub fn systemd_hears_of_a_long_reload(kind: Kind) -> Result<()> {
    const PERIOD: Duration = Duration::from_millis(1_500);
    let lab = lab(kind, 12)?;
    let path = lab.dir().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let (path, period) = (path.display().to_string(), PERIOD.as_micros().to_string());
    let mut a = lab.start_in(0, &[], &[("NOTIFY_SOCKET", &path), ("WATCHDOG_USEC", &period)])?;
    let mut b = lab.start(1)?;
    a.wait_until_up()?;
    b.wait_until_up()?;
    let mut running = [a, b];
    lab.warm_up(&mut running)?;
    // Every tunnel is changed, and answers only when it has found out where the other site really is.
    rewrite(&lab, 0, |text| {
        let here = format!("remote_endpoint = \"{}\"", lab.sites[1].endpoint);
        text.replacen(&here, "remote_endpoint = \"10.2.3.99\"", 1)
    })?;
    let (mut longest, mut last, mut began, mut lasted) = (Duration::ZERO, Instant::now(), None, None);
    let mut buffer = [0; 4096];
    running[0].signal(Signal::HUP)?;
    while lasted.is_none() {
        let length =
            socket.recv(&mut buffer).with_context(|| format!("the reload does not end: {}", running[0].output()))?;
        let message = String::from_utf8_lossy(&buffer[..length]);
        let is = |word: &str| message.lines().any(|line| line == word);
        if is("RELOADING=1") {
            (began, last) = (Some(Instant::now()), Instant::now());
        } else if let Some(began) = began
            && (is("WATCHDOG=1") || is("READY=1"))
        {
            longest = longest.max(last.elapsed());
            last = Instant::now();
            lasted = is("READY=1").then(|| began.elapsed());
        }
    }
    eprintln!("the reload lasted {lasted:?}; the longest gap was {longest:?}");
    ensure!(lasted > Some(2 * PERIOD), "the reload lasted only {lasted:?}");
    ensure!(longest < PERIOD, "nothing for {longest:?}\n{}", running[0].output());
    Ok(())
}

/// Messages to systemd on a real socket: readiness, reloading, watchdog and stopping.
pub fn systemd_is_notified(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let path = lab.dir().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let heard = |word: &str| -> Result<String> {
        let mut all = String::new();
        let mut buffer = [0; 4096];
        while !all.lines().any(|line| line == word) {
            let length = socket.recv(&mut buffer).with_context(|| format!("{word} did not come after {all:?}"))?;
            all.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        Ok(all)
    };
    let path = path.display().to_string();
    let run = lab.start_in(0, &[], &[("NOTIFY_SOCKET", &path), ("WATCHDOG_USEC", "300000")])?;
    ensure!(heard("READY=1")?.contains("STATUS="), "no status");
    heard("WATCHDOG=1")?;
    run.signal(Signal::HUP)?;
    let reloading = heard("RELOADING=1")?;
    ensure!(reloading.contains("MONOTONIC_USEC="), "{reloading:?}");
    heard("READY=1")?;
    let status = run.stop(Signal::TERM)?;
    ensure!(status.success(), "{status}");
    heard("STOPPING=1")?;
    Ok(())
}
