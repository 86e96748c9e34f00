//! The output of `ecmpvpn explain`. The JSON is a contract: fields are only ever added.

use std::fmt;

use serde::Serialize;

use super::policy::Rule;

/// Where a flow goes and why.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The flow as given on the command line.
    pub flow: String,
    /// The flow key: the fields that the steering program hashes.
    pub key: String,
    /// The remote site behind its destination address.
    pub peer: Option<String>,
    /// The first rule that matches it.
    pub rule: Option<Rule>,
    /// The policy in force for it.
    pub policy: Option<String>,
    /// The flow hash, hexadecimal.
    pub hash: String,
    /// Index of the bucket among all peers' buckets.
    pub bucket: Option<u32>,
    /// Milliseconds since the last packet of the bucket. `null`: there was none.
    pub idle_ms: Option<f64>,
    /// The tunnel of the bucket's last packet.
    pub current_tunnel: Option<String>,
    /// The tunnel of the flow's next packet.
    pub tunnel: Option<String>,
    /// One word: `home`, `pinned`, `sprayed`, `rule`, `failover`, `drained`, `stays` or `flowlet`. Or the reason why no
    /// tunnel takes it.
    pub why: String,
    /// `why` as a sentence.
    pub why_text: String,
    /// Why the flow is never sprayed, although its policy sprays flows; `null` if it may be.
    pub not_sprayed: Option<String>,
    /// Whether the other site restores the order of the flow's packets if they are sprayed, as long as they must not be
    /// fragmented.
    pub restored: bool,
    /// The port that the tunnel's outer packets leave by, as predicted. Empty if it cannot be predicted.
    pub member: Option<String>,
    /// The tunnel that would be chosen if `tunnel` failed.
    pub next_tunnel: Option<String>,
    /// The port that the next tunnel's outer packets leave by.
    pub next_member: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &str| writeln!(f, "{name:<8} {value}");
        line("flow", &self.flow)?;
        line("key", &self.key)?;
        if let Some(peer) = &self.peer {
            line("peer", peer)?;
            let rule = self.rule.as_ref().map_or_else(
                || "none".to_owned(),
                |rule| format!("{}: {}: {}", rule.number, rule.flows(), rule.action()),
            );
            line("rule", &rule)?;
        }
        if let Some(policy) = &self.policy {
            line("policy", policy)?;
        }
        line("hash", &self.hash)?;
        if let (Some(bucket), Some(current)) = (self.bucket, &self.current_tunnel) {
            let idle =
                self.idle_ms.map_or_else(|| "no packet yet".to_owned(), |ms| format!("last packet {ms:.1} ms ago"));
            line("bucket", &format!("{bucket}, on {current}, {idle}"))?;
        }
        let member = |member: &Option<String>| match member.as_deref() {
            None | Some("") => String::new(),
            Some(member) => format!(", which leaves by {member}"),
        };
        let Some(tunnel) = &self.tunnel else {
            return write!(f, "{:<8} none: {}", "tunnel", self.why_text);
        };
        line("tunnel", &format!("{tunnel}{}", member(&self.member)))?;
        line("why", &self.why_text)?;
        if let Some(reason) = &self.not_sprayed {
            line("spray", &format!("not sprayed: {reason}"))?;
        }
        if self.restored {
            line("order", "the other site restores it if the flow is sprayed")?;
        }
        match &self.next_tunnel {
            Some(next) => write!(f, "{:<8} {next}{}", "if down", member(&self.next_member)),
            None => write!(f, "{:<8} no tunnel is left for it: its packets would be dropped", "if down"),
        }
    }
}
