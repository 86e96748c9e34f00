//! A lab whose far site stays up, and whose near site is disturbed.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lab::dump::Dump;
use lab::kind::Kind;
use lab::sites::{Lab, Options, Running, binary};
use lab::traffic::wait_for_reply;
use rustix::process::Signal;
use serde_json::Value;

use crate::choice::Choice;

/// `ecmpvpn/src/fault.rs` says what it does.
pub const FAULT: &str = "ECMPVPN_FAULT";
/// How long a dump may take to settle.
const SETTLE: Duration = Duration::from_secs(10);
/// How long tunnels may take to answer.
const ANSWER: Duration = Duration::from_secs(40);
/// How many faults are reported before a run of all points ends.
const ENOUGH: usize = 15;

/// What happens after the kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    Down,
    Run,
}

impl fmt::Display for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Down { "down" } else { "run" })
    }
}

/// The site as the configuration wants it, for comparison.
#[derive(Debug)]
pub struct State {
    policy: Value,
    dump: Dump,
}

pub struct Rig {
    pub kind: Kind,
    pub lab: Lab,
    far: Option<Running>,
    /// The near gateway before anything is up.
    before: Dump,
    faults: PathBuf,
}

impl Rig {
    /// `prepare` changes the configurations before anything starts.
    pub fn new(kind: Kind, tunnels: usize, prepare: fn(&Lab) -> Result<()>) -> Result<Self> {
        let lab = Lab::new(Options { tunnels, ..kind.options() }, &binary()?)?;
        prepare(&lab)?;
        let mut far = lab.start(1)?;
        far.wait_until_said("is up:")?;
        let before = lab.sites[0].dump()?;
        let faults = lab.dir().join("faults");
        fs::create_dir(&faults)?;
        Ok(Self { kind, lab, far: Some(far), before, faults })
    }

    pub fn far_output(&self) -> String {
        self.far.as_ref().map(Running::output).unwrap_or_default()
    }

    /// Gives an order to the processes that were started with [`Rig::env`].
    pub fn order(&self, order: &str) -> Result<()> {
        let _ = fs::remove_file(self.faults.join("points"));
        let draft = self.faults.join("draft");
        fs::write(&draft, order)?;
        Ok(fs::rename(draft, self.faults.join("order"))?)
    }

    /// Takes the order back. Returns the points that were passed since.
    pub fn disarm(&self) -> Vec<String> {
        let _ = fs::remove_file(self.faults.join("order"));
        let points = fs::read_to_string(self.faults.join("points")).unwrap_or_default();
        points.lines().map(str::to_owned).collect()
    }

    fn env(&self) -> (&'static str, String) {
        (FAULT, self.faults.display().to_string())
    }

    /// Starts `run`, which obeys orders, and does not wait.
    pub fn start(&self) -> Result<Running> {
        let (key, value) = self.env();
        self.lab.start_in(0, &[], &[(key, &value)])
    }

    /// Starts `run` and waits until it is up.
    pub fn up(&self) -> Result<Running> {
        let mut running = self.start()?;
        self.is_up_or_ended(&mut running)?;
        ensure!(running.ended()?.is_none(), "`run` has ended:\n{}", running.output());
        Ok(running)
    }

    /// Waits until `run` is up, or has ended.
    pub fn is_up_or_ended(&self, running: &mut Running) -> Result<()> {
        let words: &[&str] = match self.kind {
            Kind::Userspace => &["is up:"],
            Kind::Kernel => &["is up:", "counting arrivals on u2"],
        };
        let since = Instant::now();
        while running.ended()?.is_none() && !words.iter().all(|words| running.output().contains(words)) {
            // After an adoption it counts already.
            if running.output().contains("adopting it") && running.output().contains("is up:") {
                break;
            }
            ensure!(since.elapsed() < Duration::from_secs(90), "`run` does not come up:\n{}", running.output());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// A command of the near site that obeys orders.
    pub fn command(&self, words: &[&str]) -> Command {
        let (key, value) = self.env();
        let mut command = self.lab.command(0, words);
        command.env(key, value).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end, or until it is killed.
    pub fn output(&self, words: &[&str]) -> Result<Output> {
        self.command(words).output().with_context(|| format!("starting {words:?}"))
    }

    pub fn down(&self) -> Result<()> {
        let (code, _, complaint) = self.lab.ecmpvpn(0, &["down"])?;
        ensure!(code == 0, "`down` ended with {code}: {complaint}");
        Ok(())
    }

    /// Checks that the host is as before.
    pub fn assert_before(&self) -> Result<()> {
        let left = self.before.wait_for_same(SETTLE, || self.lab.sites[0].dump())?;
        ensure!(left.is_none(), "left at A:\n{}", left.unwrap_or_default());
        Ok(())
    }

    /// Checks that the configuration's folder has no half files.
    pub fn assert_no_drafts(&self) -> Result<()> {
        let folder = self.lab.sites[0].config.parent().context("no folder")?;
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            ensure!(!name.to_string_lossy().starts_with(".ecmpvpn-"), "{} was left", name.display());
        }
        Ok(())
    }

    /// The names of the near site's tunnels in its configuration.
    fn configured(&self) -> Result<Vec<String>> {
        let config = ecmpvpn::config::load(&self.lab.sites[0].config).map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(config.peers[0].tunnels.iter().map(|tunnel| tunnel.name.to_string()).collect())
    }

    /// Waits until every configured tunnel answers, and the LANs reach each other.
    pub fn answers(&self) -> Result<()> {
        let lab = &self.lab;
        let names = self.configured()?;
        for tunnel in lab.tunnels.iter().filter(|tunnel| names.contains(&tunnel.name)) {
            let [a, b] = tunnel.addresses;
            wait_for_reply(&lab.sites[0].gateway, a.into(), b.into(), ANSWER)
                .with_context(|| format!("{} does not answer", tunnel.name))?;
        }
        for path in [lab.path_v4(), lab.path_v6()] {
            wait_for_reply(path.from, path.source, path.destination, ANSWER).context("from LAN to LAN")?;
        }
        let since = Instant::now();
        loop {
            let stats = lab.stats(0)?;
            let tunnels = stats["tunnels"].as_array().context("no tunnels")?;
            let mut shown: Vec<&str> = tunnels.iter().filter_map(|tunnel| tunnel["name"].as_str()).collect();
            shown.sort_unstable();
            if shown == names && tunnels.iter().all(|tunnel| tunnel["state"] == "up") {
                return Ok(());
            }
            ensure!(since.elapsed() < ANSWER, "the tunnels are {names:?}, and stats show {stats}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn dump(&self) -> Result<Dump> {
        Ok(self.lab.sites[0].dump()?.without_numbers())
    }

    fn policy(&self) -> Result<Value> {
        let (code, text, complaint) = self.lab.ecmpvpn(0, &["policy", "show", "--json"])?;
        ensure!(code == 0, "`policy show` ended with {code}: {complaint}");
        let mut policy: Value = serde_json::from_str(&text)?;
        for tunnel in policy["peers"].as_array_mut().into_iter().flatten() {
            for tunnel in tunnel["tunnels"].as_array_mut().into_iter().flatten() {
                // Flows move buckets. The link depends on the members that the bond uses just then.
                for field in ["buckets", "link"] {
                    tunnel.as_object_mut().map(|tunnel| tunnel.remove(field));
                }
            }
        }
        Ok(policy)
    }

    /// The state of the site, once every tunnel answers.
    pub fn state(&self) -> Result<State> {
        self.answers()?;
        // The link watch and duplicate address detection have ended then.
        std::thread::sleep(Duration::from_secs(2));
        // A tunnel whose handshake crosses with the far end's may be down for a moment.
        let since = Instant::now();
        loop {
            let policy = self.policy()?;
            let mut tunnels =
                policy["peers"].as_array().into_iter().flatten().filter_map(|peer| peer["tunnels"].as_array());
            if tunnels.all(|tunnels| tunnels.iter().all(|tunnel| tunnel["live"] == true)) {
                return Ok(State { policy, dump: self.dump()? });
            }
            ensure!(since.elapsed() < ANSWER, "not all tunnels are up: {policy}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Checks that the running site is the one of an undisturbed `run`.
    pub fn assert_state(&self, state: &State) -> Result<()> {
        self.answers()?;
        let difference = state.dump.wait_for_same(SETTLE, || self.dump())?;
        ensure!(difference.is_none(), "not as without the kill:\n{}", difference.unwrap_or_default());
        let since = Instant::now();
        loop {
            let policy = self.policy()?;
            // As in `state`, a tunnel may be down for a moment.
            if policy == state.policy {
                return Ok(());
            }
            ensure!(since.elapsed() < ANSWER, "the policy is {policy}, and without the kill {}", state.policy);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What must hold after a kill.
    pub fn recover(&self, state: &State, after: After) -> Result<()> {
        if after == After::Down {
            self.down()?;
            return self.assert_before();
        }
        let running = self.up().context("`run` after the kill")?;
        let held = self.assert_state(state);
        held.with_context(|| format!("A:\n{}", running.output()))?;
        stop(running)?;
        self.assert_no_drafts()?;
        self.assert_before()
    }
}

/// Stops `run`, which must succeed.
pub fn stop(running: Running) -> Result<()> {
    let mut running = running;
    running.signal(Signal::TERM)?;
    let status = running.wait()?;
    ensure!(status.success(), "`run` ended with {status}:\n{}", running.output());
    Ok(())
}

/// An operation that is cut off.
#[derive(Clone, Copy)]
pub struct Operation {
    pub name: &'static str,
    pub tunnels: usize,
    /// Changes the configurations before anything starts.
    pub configure: fn(&Lab) -> Result<()>,
    /// What comes before. Returns the process that runs then.
    pub prepare: fn(&Rig) -> Result<Option<Running>>,
    /// Does it, and returns when it is done or the process has been killed. Returns the process if that still runs.
    pub act: fn(&Rig, Option<Running>) -> Result<Option<Running>>,
    /// Checks what must hold afterwards, and cleans up.
    pub recover: fn(&Rig, &State, After) -> Result<()>,
}

impl Operation {
    /// Does it under `order`, then kills the process if it still runs. Returns the points that were passed.
    fn once(&self, rig: &Rig, order: &str) -> Result<Vec<String>> {
        let running = (self.prepare)(rig).context("before")?;
        rig.order(order)?;
        let acted = (self.act)(rig, running);
        let points = rig.disarm();
        if let Some(mut running) = acted?
            && running.ended()?.is_none()
        {
            running.stop(Signal::KILL)?;
        }
        Ok(points)
    }

    /// The state that `run` must give afterwards, and the number of points.
    fn measured(&self, rig: &Rig) -> Result<(State, Vec<String>)> {
        let points = self.once(rig, "count")?;
        ensure!(!points.is_empty(), "this build of ecmpvpn has no fault points: build it with debug assertions");
        let running = rig.up()?;
        let state = rig.state().with_context(|| running.output())?;
        stop(running)?;
        rig.assert_before().context("without a kill")?;
        Ok((state, points))
    }

    fn kill(&self, rig: &Rig, state: &State, number: usize, after: After) -> Result<()> {
        let points = self.once(rig, &format!("kill {number}"))?;
        let last = points.last().cloned().unwrap_or_default();
        let context = || format!("{}: killed at point {number} ({last}), then `{after}`", self.name);
        (self.recover)(rig, state, after).with_context(context)
    }

    /// Kills it at each chosen point, with both outcomes.
    pub fn at_each_point(&self, kind: Kind) -> Result<()> {
        let mut rig = Rig::new(kind, self.tunnels, self.configure)?;
        let (mut state, points) = self.measured(&rig)?;
        let choice = Choice::among(points.len())?;
        let (all, since) = (choice.is_all(), Instant::now());
        if all {
            eprintln!("  {}, {}: {} points", self.name, kind.name(), points.len());
        }
        let (mut failures, mut tried) = (Vec::new(), 0);
        for number in choice {
            for after in [After::Down, After::Run] {
                tried += 1;
                let Err(error) = self.kill(&rig, &state, number, after) else { continue };
                if !all {
                    bail!("{error:#}\nB:\n{}", rig.far_output());
                }
                eprintln!("  FAILED {error:#}");
                failures.push(format!("{error:#}"));
                if failures.len() >= ENOUGH {
                    bail!("{} of {tried} kills, among them:\n{}", failures.len(), failures.join("\n"));
                }
                drop(rig);
                rig = Rig::new(kind, self.tunnels, self.configure)?;
                state = self.measured(&rig)?.0;
            }
            if all && number % 20 == 0 {
                eprintln!("  point {number} of {}, {:.0?}", points.len(), since.elapsed());
            }
        }
        eprintln!("  {}, {}: {tried} kills in {:.0?}", self.name, kind.name(), since.elapsed());
        ensure!(failures.is_empty(), "{} of {tried} kills:\n{}", failures.len(), failures.join("\n"));
        Ok(())
    }
}
