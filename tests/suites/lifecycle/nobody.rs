//! Findings A3, A4 and A15: on both gateways a user without privilege tries everything that it can reach. It holds a lock
//! on all that it may open, and sends forged reports. No command waits, no tunnel leaves use, and nothing changes.

use std::fs::{self, File};
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::maps::MapData;
use aya::programs::{ProgramInfo, loaded_programs};
use lab::dump::{PINS, RUN_DIR};
use lab::hostile::{Flood, allow_ping, as_nobody, expose_configurations, lock, ping_socket, reachable, walk};
use lab::kind::Kind;
use lab::sites::{Lab, Running};
use rustix::process::{Pid, Signal, kill_process, setpriority_process};

use super::stage::lab;

/// Forged reports a second and gateway.
const RATE: u32 = 500;
/// How long everything is looked at before the first command.
const WATCHED: Duration = Duration::from_secs(2);
/// How long a command may take. With nobody around it takes less than a second; the emulated CPUs are slow.
const COMMAND: Duration = Duration::from_secs(20);
/// The same for `rotate`, which changes one tunnel after the other, and for a whole start.
const ROTATION: Duration = Duration::from_secs(60);

/// What the user without privilege could do that it must not.
fn trespasses(lab: &Lab, site: usize, pid: Pid) -> Vec<String> {
    let mut could = Vec::new();
    let signals = [Signal::HUP, Signal::INT, Signal::TERM, Signal::KILL, Signal::STOP, Signal::USR1];
    could.extend(signals.iter().filter(|signal| kill_process(pid, **signal).is_ok()).map(|one| format!("{one:?}")));
    if setpriority_process(Some(pid), 19).is_ok() {
        could.push("priority".to_owned());
    }
    let memory = format!("/proc/{}/mem", pid.as_raw_nonzero());
    if File::open(memory).is_ok() {
        could.push("memory".to_owned());
    }
    let mut pins = Vec::new();
    let dir = ecmpvpn::dataplane::Pins::of(&lab.sites[site].name).dir().to_owned();
    walk(&dir, &mut pins);
    // Nobody finds nothing below: these are the names that there are.
    pins.extend(pin_names().map(|name| dir.join(name)));
    let opened = pins.iter().filter(|pin| MapData::from_pin(pin).is_ok() || ProgramInfo::from_pin(pin).is_ok());
    could.extend(opened.map(|pin| format!("opening {}", pin.display())));
    if loaded_programs().next().is_some_and(|found| found.is_ok()) {
        could.push("programs by number".to_owned());
    }
    for words in ["link set ecmp0 down", "link delete wg0", "route flush proto 236", "address flush dev wg0"] {
        let mut ip = Command::new("ip");
        ip.args(words.split(' ')).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // `ip` must have been started, and refused.
        if !ip.status().is_ok_and(|status| !status.success()) {
            could.push(format!("ip {words}"));
        }
    }
    could
}

fn pin_names() -> impl Iterator<Item = &'static str> {
    use ecmpvpn_common::layout::{maps, programs};
    maps::ALL.into_iter().chain(programs::ALL).chain(["link_steering"])
}

/// As the user without privilege on one gateway: tries everything, says what it holds and could do, and then forges
/// reports to the other gateway until `stop`.
fn trouble(
    lab: &Lab,
    site: usize,
    pid: Pid,
    said: &Sender<(Vec<PathBuf>, Vec<String>)>,
    stop: &AtomicBool,
) -> Result<u32> {
    let paths = reachable(&lab.sites[site])?;
    as_nobody(&lab.sites[site].gateway, || {
        let held: Vec<(PathBuf, Vec<File>)> = paths.iter().map(|path| (path.clone(), lock(path))).collect();
        let opened = held.iter().filter(|(_, files)| !files.is_empty()).map(|(path, _)| path.clone());
        said.send((opened.collect(), trespasses(lab, site, pid)))?;
        let sockets = lab.tunnels.iter().map(|t| ping_socket([t.addresses[site], t.addresses[1 - site]], 0));
        let sockets = sockets.collect::<Result<Vec<UdpSocket>>>()?;
        let (sent, _) = Flood::Reports.send(&sockets, RATE, Duration::MAX, stop);
        drop(held);
        Ok(sent)
    })
}

/// Checks that `run` has no socket to which somebody can connect.
fn listens_nowhere(lab: &Lab, site: usize, run: &Running) -> Result<()> {
    let mut sockets = Vec::new();
    for fd in fs::read_dir(format!("/proc/{}/fd", run.pid()))? {
        // A descriptor may have been closed since.
        let Ok(target) = fs::read_link(fd?.path()) else { continue };
        let inode = target.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']'));
        sockets.extend(inode.map(str::to_owned));
    }
    ensure!(sockets.len() >= lab.tunnels.len(), "`run` has only the sockets {sockets:?}");
    let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
    let (unix, tcp) = lab.sites[site].gateway.run(|| (read("unix"), read("tcp") + &read("tcp6")));
    for line in unix.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        // Number, references, protocol, flags, type, state, inode, path.
        let is_own = words.get(6).is_some_and(|inode| sockets.iter().any(|one| one == inode));
        ensure!(!is_own || words.len() == 7 && words[3] == "00000000", "`run` has a unix socket with a name: {line}");
    }
    for line in tcp.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_own = words.get(9).is_some_and(|inode| sockets.iter().any(|one| one == inode));
        ensure!(!is_own || words[3] != "0A", "`run` listens by TCP: {line}");
    }
    Ok(())
}

/// Runs a command at A, which must succeed within `bound`.
fn done(lab: &Lab, bound: Duration, arguments: &[&str]) -> Result<String> {
    let start = Instant::now();
    let (exit, output, complaint) = lab.ecmpvpn(0, arguments)?;
    ensure!(exit == 0, "{arguments:?} ended with {exit}: {output}{complaint}");
    ensure!(start.elapsed() < bound, "{arguments:?} took {:?}", start.elapsed());
    Ok(output)
}

/// All that an operator does at A, with a new start in the middle.
fn operate(lab: &Lab, a: Running, b: Running) -> Result<()> {
    let start = Instant::now();
    let views = [0, 1].map(|site| ecmpvpn::dataplane::View::open(&ecmpvpn::dataplane::Pins::of(&lab.sites[site].name)));
    let [near, far] = views;
    let (near, far) = (near?, far?);
    while start.elapsed() < WATCHED {
        let live = [near.peers()[0].live, far.peers()[0].live];
        ensure!(live == [3, 3], "only {live:?} in use:\n{}\n{}", a.output(), b.output());
        sleep(Duration::from_millis(5));
    }
    let (src, dst) = (lab.sites[0].host_v4().to_string(), lab.sites[1].host_v4().to_string());
    for arguments in [
        &["stats"][..],
        &["explain", &src, &dst, "--sport", "40000", "--dport", "443"],
        &["policy", "drain", "wg1"],
        &["policy", "undrain", "wg1"],
        &["policy", "show"],
        &["reload"],
    ] {
        done(lab, COMMAND, arguments)?;
    }
    let file = lab.dir().join("for-b");
    let name = file.display().to_string();
    done(lab, COMMAND, &["rotate", "--prepare", "--output", &name])?;
    let (exit, _, complaint) = lab.ecmpvpn(1, &["rotate", "--apply", &name])?;
    ensure!(exit == 0, "`rotate --apply` ended with {exit}: {complaint}");
    fs::remove_file(file)?;
    done(lab, ROTATION, &["rotate"])?;
    // Nobody has the lock of the site for a moment now.
    a.stop(Signal::KILL)?;
    let held = as_nobody(&lab.sites[0].gateway, || {
        let root = Path::new(RUN_DIR);
        Ok([root.to_owned(), root.join(&lab.sites[0].name)].iter().flat_map(|path| lock(path)).count())
    })?;
    ensure!(held == 0, "the run directory can be opened");
    let start = Instant::now();
    let mut a = lab.start(0)?;
    a.wait_until_up()?;
    ensure!(start.elapsed() < ROTATION, "`run` took {:?}", start.elapsed());
    done(lab, COMMAND, &["reload"])?;
    done(lab, COMMAND, &["down"])?;
    drop((a, b));
    Ok(())
}

pub fn another_user_stops_nothing(kind: Kind) -> Result<()> {
    let lab = lab(kind, 2)?;
    for site in &lab.sites {
        allow_ping(&site.gateway)?;
    }
    let before = lab.sites[0].dump()?;
    let [a, b] = lab.run()?;
    expose_configurations(&lab)?;
    listens_nowhere(&lab, 0, &a)?;
    listens_nowhere(&lab, 1, &b)?;
    let pids = [&a, &b].map(|run| i32::try_from(run.pid()).ok().and_then(Pid::from_raw));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let mut troubles = Vec::new();
        let mut result = Ok(());
        for (site, pid) in pids.into_iter().enumerate() {
            let pid = pid.context("no pid")?;
            let (said, says) = channel();
            let (lab, stop) = (&lab, &stop);
            troubles.push(scope.spawn(move || trouble(lab, site, pid, &said, stop)));
            result = result.and_then(|()| is_harmless(lab, site, says.recv()?));
        }
        let operated = result.and_then(|()| operate(&lab, a, b));
        stop.store(true, Ordering::Relaxed);
        let ended: Vec<_> = troubles.into_iter().map(thread::ScopedJoinHandle::join).collect();
        // First of all: what the user did ends early if that failed.
        operated?;
        for trouble in ended {
            let sent = trouble.map_err(|_| anyhow!("the user panicked"))??;
            ensure!(sent > RATE, "only {sent} forged reports");
        }
        Ok(())
    })?;
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    Ok(())
}

/// Checks what the user without privilege has opened and could do at a site.
fn is_harmless(lab: &Lab, site: usize, (opened, could): (Vec<PathBuf>, Vec<String>)) -> Result<()> {
    ensure!(could.is_empty(), "a user without privilege could do this: {could:?}");
    let config = &lab.sites[site].config;
    let folder = config.parent().context("no folder")?;
    ensure!(opened.iter().any(|path| path == folder) && opened.contains(config), "only these are open: {opened:?}");
    let harmless = |path: &&PathBuf| path.as_path() == folder || *path == config || path.as_path() == Path::new(PINS);
    let others: Vec<&PathBuf> = opened.iter().filter(|path| !harmless(path)).collect();
    ensure!(others.is_empty(), "these can be opened: {others:?}");
    Ok(())
}

/// Before the first `run`, somebody without privilege makes the directory of the pins, as anybody can in a BPF file
/// system that was mounted without a mode.
pub fn a_directory_in_the_pins_place_stops_nothing(kind: Kind) -> Result<()> {
    let lab = lab(kind, 2)?;
    let root = Path::new("/sys/fs/bpf/ecmpvpn");
    let before = lab.sites[0].dump()?;
    as_nobody(&lab.sites[0].gateway, || {
        fs::create_dir_all(root.join(&lab.sites[0].name).join("v0")).context("the user without privilege")
    })?;
    let [a, b] = lab.run()?;
    let owner = fs::metadata(root)?.uid();
    ensure!(owner == 0 && a.output().contains("another user had made"), "{owner}: {}", a.output());
    ensure!(a.stop(Signal::TERM)?.success() && b.stop(Signal::TERM)?.success());
    let aside = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("not-of-ecmpvpn-");
    let aside = fs::read_dir(PINS)?.filter_map(Result::ok).find(aside).context("it was not moved away")?;
    fs::remove_dir_all(aside.path())?;
    let left = before.wait_for_same(Duration::from_secs(5), || lab.sites[0].dump())?;
    ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
    Ok(())
}
