//! A reload with a key, port or endpoint that the other site does not have. It is taken back at the first tunnel that
//! does not answer, while the others carry the traffic.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ecmpvpn::config::PrivateKey;
use lab::kind::Kind;
use lab::sites::{Lab, Running};
use lab::traffic::{Path, Stream};

use super::stage::{lab, rewrite, stream};

/// An address that no host has.
const NOBODY: &str = "10.2.3.99";

/// Replaces the value of `key` in its first line.
fn with(lab: &Lab, site: usize, key: &str, value: &str) -> Result<()> {
    rewrite(lab, site, |text| {
        let mut done = false;
        let line = |line: &str| {
            let is_it = !done && line.split_once('=').is_some_and(|(name, _)| name.trim() == key);
            done |= is_it;
            if is_it { format!("{key} = {value}\n") } else { format!("{line}\n") }
        };
        text.lines().map(line).collect()
    })
}

/// Reloads A, which must succeed.
fn reload(lab: &Lab) -> Result<()> {
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(code == 0, "it ended with {code}: {complaint}");
    Ok(())
}

/// Waits until every tunnel of both sites is up and answers probes.
fn wait_until_all_answer(lab: &Lab) -> Result<()> {
    let start = Instant::now();
    loop {
        let all = [lab.stats(0)?, lab.stats(1)?];
        let answers = |tunnel: &serde_json::Value| {
            tunnel["state"] == "up" && tunnel["rtt_us"].as_u64().is_some_and(|time| time > 0)
        };
        if all.iter().all(|stats| stats["tunnels"].as_array().is_some_and(|all| all.iter().all(answers))) {
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_secs(30), "not every tunnel answers: {} {}", all[0], all[1]);
        thread::sleep(Duration::from_millis(50));
    }
}

/// Runs `meanwhile` while numbered packets flow in both directions. A few packets inside the changed tunnel may be lost.
fn with_traffic(lab: &Lab, running: &[Running; 2], meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let there = lab.path_v4();
    let back = Path { from: there.to, source: there.destination, to: there.from, destination: there.source };
    let backwards = Stream::start(back, 32, 1_000)?;
    let done = stream(lab, 2, meanwhile);
    let report = backwards.stop()?;
    let output = || format!("{}\n{}", running[0].output(), running[1].output());
    done.inspect_err(|_| eprintln!("{}", output()))?;
    eprintln!("{} of {} packets were lost on the way back", report.lost(), report.sent());
    ensure!(report.lost() <= 2, "{} packets were lost on the way back\n{}", report.lost(), output());
    Ok(())
}

/// How many tunnels of A were changed, as its log says; a tunnel that is changed back counts twice.
fn changes(a: &Running) -> usize {
    a.output().matches("change wg").count()
}

pub fn a_wrong_key_is_taken_back_at_the_first_tunnel(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let running = lab.run()?;
    wait_until_all_answer(&lab)?;
    // Leaves its result in the run directory.
    reload(&lab)?;
    let before = lab.sites[0].dump()?;
    let sound = fs::read_to_string(&lab.sites[0].config)?;
    with_traffic(&lab, &running, || {
        with(&lab, 0, "public_key", &format!("\"{}\"", PrivateKey::generate().public_key()))?;
        let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
        ensure!(code == 1, "it ended with {code}: {complaint}");
        for words in
            ["wg0 does not answer with its new public key of the peer", "the former configuration is in force again"]
        {
            ensure!(complaint.contains(words), "{complaint}");
        }
        wait_until_all_answer(&lab)
    })?;
    ensure!(changes(&running[0]) == 2, "{}", running[0].output());
    let changed = before.wait_for_same(Duration::from_secs(3), || lab.sites[0].dump())?;
    ensure!(changed.is_none(), "it changed\n{}", changed.unwrap_or_default());
    // What is in force is what the former file says.
    fs::write(&lab.sites[0].config, sound)?;
    reload(&lab)?;
    ensure!(changes(&running[0]) == 2, "{}", running[0].output());
    Ok(())
}

/// WireGuard follows a far end to the address and port that its packets come from. So one end with another port or
/// endpoint may answer, and then the reload has succeeded.
fn is_answered_or_taken_back(kind: Kind, key: &str, value: &str, changed: &str) -> Result<()> {
    let lab = lab(kind, 3)?;
    let running = lab.run()?;
    wait_until_all_answer(&lab)?;
    // Leaves its result in the run directory.
    reload(&lab)?;
    let before = lab.sites[0].dump()?;
    with_traffic(&lab, &running, || {
        with(&lab, 0, key, value)?;
        let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
        eprintln!("{key} = {value}: exit status {code}: {complaint}");
        match code {
            0 => {}
            1 => {
                let words = format!("wg0 does not answer with its new {changed}");
                ensure!(complaint.contains(&words) && complaint.contains("in force again"), "{complaint}");
                ensure!(changes(&running[0]) == 2, "{}", running[0].output());
                let differs = before.wait_for_same(Duration::from_secs(3), || lab.sites[0].dump())?;
                ensure!(differs.is_none(), "it changed\n{}", differs.unwrap_or_default());
            }
            code => anyhow::bail!("it ended with {code}: {complaint}"),
        }
        // Either way, nothing is out of use.
        wait_until_all_answer(&lab)
    })
}

pub fn a_wrong_port_is_answered_or_taken_back(kind: Kind) -> Result<()> {
    is_answered_or_taken_back(kind, "remote_port", "51999", "remote endpoint")?;
    is_answered_or_taken_back(kind, "listen_port", "51999", "UDP port")
}

pub fn a_wrong_endpoint_is_answered_or_taken_back(kind: Kind) -> Result<()> {
    is_answered_or_taken_back(kind, "remote_endpoint", &format!("\"{NOBODY}\""), "remote endpoint")
}

/// New keys by hand: both sites reload at the same time, and wait for each other.
pub fn two_reloads_at_once_change_the_keys_of_both(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let running = lab.run()?;
    wait_until_all_answer(&lab)?;
    let key = PrivateKey::generate();
    let file = lab.sites[0].config.with_file_name(format!("{}.key", lab.sites[0].name));
    fs::write(file, key.to_base64().as_str())?;
    with(&lab, 1, "public_key", &format!("\"{}\"", key.public_key()))?;
    let results = thread::scope(|scope| {
        let reload = |site| {
            let lab = &lab;
            scope.spawn(move || lab.ecmpvpn(site, &["reload"]))
        };
        [reload(0), reload(1)].map(|reload| reload.join().expect("a reload does not panic"))
    });
    for result in results {
        let (code, _, complaint) = result?;
        let outputs = || format!("{}\n{}", running[0].output(), running[1].output());
        ensure!(code == 0, "it ended with {code}: {complaint}\n{}", outputs());
    }
    wait_until_all_answer(&lab)
}

/// Reloads that are requested at the same time report their own results. A process that is stopped is reported, and not
/// waited for.
pub fn a_reload_reports_its_own_result(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, _b] = lab.run()?;
    wait_until_all_answer(&lab)?;
    let sound = fs::read_to_string(&lab.sites[0].config)?;
    let ask = |code: i32| -> Result<()> {
        let (ended, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
        ensure!(ended == code, "it ended with {ended} instead of {code}: {complaint}\n{}", a.output());
        Ok(())
    };
    thread::scope(|scope| -> Result<()> {
        // Waits 8 s for its tunnel, and fails.
        with(&lab, 0, "public_key", &format!("\"{}\"", PrivateKey::generate().public_key()))?;
        let first = scope.spawn(|| ask(1));
        let start = Instant::now();
        while changes(&a) == 0 {
            ensure!(start.elapsed() < Duration::from_secs(10), "{}", a.output());
            thread::sleep(Duration::from_millis(20));
        }
        fs::write(&lab.sites[0].config, &sound)?;
        let others = [(); 2].map(|()| scope.spawn(|| ask(0)));
        first.join().expect("it does not panic")?;
        others.into_iter().try_for_each(|other| other.join().expect("it does not panic"))
    })?;
    a.signal(rustix::process::Signal::STOP)?;
    let start = Instant::now();
    let (code, _, complaint) = lab.ecmpvpn(0, &["reload"])?;
    a.signal(rustix::process::Signal::CONT)?;
    ensure!(code == 1 && complaint.contains("is stopped"), "it ended with {code}: {complaint}");
    ensure!(start.elapsed() < Duration::from_secs(10), "after {:?}", start.elapsed());
    ask(0)
}

/// A site that dies before a reload is not forgotten by it: its tunnels count as dead as quickly as without a reload.
pub fn a_site_that_dies_before_a_reload_counts_as_dead(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let [a, b] = lab.run()?;
    wait_until_all_answer(&lab)?;
    b.stop(rustix::process::Signal::KILL)?;
    if kind == Kind::Kernel {
        // Its tunnels would go on without the process.
        lab.sites[1].gateway.ip("link set wg0 down")?;
        lab.sites[1].gateway.ip("link set wg1 down")?;
        lab.sites[1].gateway.ip("link set wg2 down")?;
    }
    with(&lab, 0, "weight", "3")?;
    reload(&lab)?;
    let start = Instant::now();
    while lab.stats(0)?["tunnels"].as_array().is_none_or(|all| all.iter().any(|tunnel| tunnel["state"] != "down")) {
        ensure!(start.elapsed() < Duration::from_secs(5), "{}\n{}", lab.stats(0)?, a.output());
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
