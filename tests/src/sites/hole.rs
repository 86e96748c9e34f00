//! Outer packets that get lost: of some tunnels, in one direction.

use anyhow::Result;

use super::Lab;

/// Of the rule that drops.
const PREFERENCE: u32 = 10;
/// Of the rule that finds this host's own addresses, while another one has to come before it; else it is 0.
const LOCAL: u32 = 20;

/// Drops outer packets while it exists, without a word: the receiving gateway's routing puts them into a black hole
/// before any socket sees them. To WireGuard at both ends that is no different from a loss on the wire.
#[derive(Debug)]
pub struct Hole<'a> {
    lab: &'a Lab,
    receiver: usize,
    rules: Vec<String>,
}

impl<'a> Hole<'a> {
    /// Drops what `sender` (0: A, 1: B) sends through `tunnels`, counted from 0. One at a time.
    pub fn dig(lab: &'a Lab, sender: usize, tunnels: &[usize]) -> Result<Self> {
        let receiver = 1 - sender;
        let rule = |tunnel: &usize| {
            let ports = lab.tunnels[*tunnel].ports;
            format!(
                "pref {PREFERENCE} from {} ipproto udp sport {} dport {} blackhole",
                lab.sites[sender].endpoint, ports[sender], ports[receiver]
            )
        };
        let hole = Self { lab, receiver, rules: tunnels.iter().map(rule).collect() };
        let mut commands =
            vec![format!("rule add pref {LOCAL} lookup local"), "rule del pref 0 lookup local".to_owned()];
        commands.extend(hole.rules.iter().map(|rule| format!("rule add {rule}")));
        lab.sites[receiver].gateway.apply("ip", &commands)?;
        Ok(hole)
    }

    /// Lets packets pass again.
    pub fn fill(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        if self.rules.is_empty() {
            return Ok(());
        }
        let mut commands: Vec<String> = self.rules.drain(..).map(|rule| format!("rule del {rule}")).collect();
        commands.extend(["rule add pref 0 lookup local".to_owned(), format!("rule del pref {LOCAL} lookup local")]);
        self.lab.sites[self.receiver].gateway.apply("ip", &commands)
    }
}

impl Drop for Hole<'_> {
    fn drop(&mut self) {
        // After `fill` there is nothing left; else the namespaces go soon.
        let _ = self.remove();
    }
}
