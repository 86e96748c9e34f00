//! Drops the outer packets of some tunnels, in one direction.

use std::io::Write as _;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::lab::Lab;

/// Preference of the rules that match the packets to drop.
const PREFERENCE: u32 = 10;
/// Preference of the rule for the table `local` while a hole exists. It is 0 otherwise, but the rules of the hole must
/// come first.
const LOCAL: u32 = 20;
/// The routing table that holds the blackhole route.
const TABLE: u32 = 4_094;

/// Drops outer packets silently while it is open. The receiving gateway routes them to a blackhole before any socket
/// sees them. For WireGuard at both ends, this is the same as a loss on the wire. A hole opens and closes for all its
/// tunnels at once.
#[derive(Debug)]
pub struct Hole<'a> {
    lab: &'a Lab,
    receiver: usize,
    rules: Vec<String>,
    /// `ip -batch -`, which waits for a line. On an emulated CPU, starting a process takes longer than a hole may last.
    ip: Child,
}

impl<'a> Hole<'a> {
    /// Drops what `sender` (0: A, 1: B) sends through `tunnels`, counted from 0. There can be only one hole at a time.
    pub fn dig(lab: &'a Lab, sender: usize, tunnels: &[usize]) -> Result<Self> {
        let mut hole = Self::prepare(lab, sender, tunnels)?;
        hole.open()?;
        Ok(hole)
    }

    /// As [`Hole::dig`], but the hole drops nothing before [`Hole::open`].
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

    pub fn open(&mut self) -> Result<()> {
        self.turn("add")
    }

    fn close(&mut self) -> Result<()> {
        self.turn("del")
    }

    fn turn(&mut self, how: &str) -> Result<()> {
        let mut lines = self.ip.stdin.as_ref().context("the hole is being removed")?;
        writeln!(lines, "route {how} blackhole default table {TABLE}").context("ip has ended")
    }

    /// Lets packets pass again and removes the rules.
    pub fn fill(mut self) -> Result<()> {
        self.close()?;
        // The process ends at the end of its input.
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
        // After `fill` this does nothing. Otherwise the namespaces are removed soon, so that errors do not matter.
        self.ip.stdin = None;
        let _ = self.ip.wait();
        let _ = self.remove();
    }
}
