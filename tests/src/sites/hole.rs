//! Outer packets that get lost: of some tunnels, in one direction.

use std::io::Write as _;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::lab::Lab;

/// Of the rules that find what is to be dropped.
const PREFERENCE: u32 = 10;
/// Of the rule that finds this host's own addresses, while another one has to come before it; else it is 0.
const LOCAL: u32 = 20;
/// The table that holds the black hole.
const TABLE: u32 = 4_094;

/// Drops outer packets while it is open, without a word: the receiving gateway's routing puts them into a black hole
/// before any socket sees them. To WireGuard at both ends that is no different from a loss on the wire. It opens and
/// closes for all its tunnels at once.
#[derive(Debug)]
pub struct Hole<'a> {
    lab: &'a Lab,
    receiver: usize,
    rules: Vec<String>,
    /// `ip -batch -`, which waits for a line: to start it takes longer on an emulated CPU than a hole may last.
    ip: Child,
}

impl<'a> Hole<'a> {
    /// Drops what `sender` (0: A, 1: B) sends through `tunnels`, counted from 0. One at a time.
    pub fn dig(lab: &'a Lab, sender: usize, tunnels: &[usize]) -> Result<Self> {
        let mut hole = Self::prepare(lab, sender, tunnels)?;
        hole.open()?;
        Ok(hole)
    }

    /// The same, but drops nothing before it is opened.
    pub fn prepare(lab: &'a Lab, sender: usize, tunnels: &[usize]) -> Result<Self> {
        let receiver = 1 - sender;
        let rule = |tunnel: &usize| {
            let ports = lab.tunnels[*tunnel].ports;
            format!(
                "pref {PREFERENCE} from {} ipproto udp sport {} dport {} lookup {TABLE}",
                lab.sites[sender].endpoint, ports[sender], ports[receiver]
            )
        };
        let gateway = &lab.sites[receiver].gateway;
        let ip = gateway.command("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().context("starting ip")?;
        let hole = Self { lab, receiver, rules: tunnels.iter().map(rule).collect(), ip };
        let mut commands =
            vec![format!("rule add pref {LOCAL} lookup local"), "rule del pref 0 lookup local".to_owned()];
        commands.extend(hole.rules.iter().map(|rule| format!("rule add {rule}")));
        gateway.apply("ip", &commands)?;
        Ok(hole)
    }

    /// Drops packets from now on.
    pub fn open(&mut self) -> Result<()> {
        self.turn("add")
    }

    /// Lets packets pass again.
    fn close(&mut self) -> Result<()> {
        self.turn("del")
    }

    fn turn(&mut self, how: &str) -> Result<()> {
        let mut lines = self.ip.stdin.as_ref().context("it is being filled")?;
        writeln!(lines, "route {how} blackhole default table {TABLE}").context("ip has ended")
    }

    /// Lets packets pass, and is gone.
    pub fn fill(mut self) -> Result<()> {
        self.close()?;
        // The end of its input is the end of its work.
        self.ip.stdin = None;
        ensure!(self.ip.wait()?.success(), "a hole could not be opened and closed");
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        if self.rules.is_empty() {
            return Ok(());
        }
        let mut commands: Vec<String> = self.rules.drain(..).map(|rule| format!("rule del {rule}")).collect();
        commands.extend([
            "rule add pref 0 lookup local protocol kernel".to_owned(),
            format!("rule del pref {LOCAL} lookup local"),
        ]);
        self.lab.sites[self.receiver].gateway.apply("ip", &commands)
    }
}

impl Drop for Hole<'_> {
    fn drop(&mut self) {
        // After `fill` there is nothing left; else the namespaces go soon.
        self.ip.stdin = None;
        let _ = self.ip.wait();
        let _ = self.remove();
    }
}
