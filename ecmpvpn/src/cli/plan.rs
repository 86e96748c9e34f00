//! The flags of `plan`.

use std::net::IpAddr;

use clap::{Args, ValueEnum};

use crate::config::XmitHashPolicy;
use crate::plan::ports::{HIGHEST_BASE_PORT, LOWEST_PORT, PortPair};

/// `plan`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example: ecmpvpn plan --endpoint-a 10.2.3.4 --endpoint-b 10.2.3.5 --members 3 --ports 5000:5000,5001:5001,5002:5002",
    after_long_help = "Example, why a set-up does not scale, and which ports would:\n  \
        ecmpvpn plan --endpoint-a 10.2.3.4 --endpoint-b 10.2.3.5 --members 3 \\\n    \
        --ports 5000:5000,5001:5001,5002:5002\n\n\
        Example, ports for four tunnels between bonds of 4 and of 2 members:\n  \
        ecmpvpn plan --endpoint-a 10.2.3.4 --endpoint-b 10.5.6.7 --members 4 --members-b 2 --tunnels 4\n\n\
        Neither needs a configuration or a privilege.\n\n\
        Example, where the tunnels of a running site really arrive, and what the other site should change:\n  \
        sudo ecmpvpn plan --replan-rx -c site-a/ecmpvpn.toml"
)]
pub struct PlanArgs {
    /// Address of the outer packets at end A; with it no configuration is read.
    #[arg(long, value_name = "ADDRESS", requires_all = ["endpoint_b", "members"])]
    pub endpoint_a: Option<IpAddr>,

    /// Address of the outer packets at end B.
    #[arg(long, value_name = "ADDRESS", requires = "endpoint_a")]
    pub endpoint_b: Option<IpAddr>,

    /// Number of bond members at both ends, or at A.
    #[arg(long, value_name = "N", requires = "endpoint_a")]
    pub members: Option<u8>,

    /// Number of bond members at B, if it differs; 1 for no bond.
    #[arg(long, value_name = "N", requires = "endpoint_a")]
    pub members_b: Option<u8>,

    /// `xmit_hash_policy` of the bond at both ends, or at A.
    #[arg(long, value_name = "POLICY", requires = "endpoint_a", default_value = "layer3+4", value_parser = policy)]
    pub xmit_hash_policy: XmitHashPolicy,

    /// `xmit_hash_policy` of the bond at B, if it differs.
    #[arg(long, value_name = "POLICY", requires = "endpoint_a", value_parser = policy)]
    pub xmit_hash_policy_b: Option<XmitHashPolicy>,

    /// Judge these ports: the listen ports of each tunnel at A and at B.
    #[arg(long, value_name = "A:B", requires = "endpoint_a", conflicts_with = "tunnels", value_delimiter = ',', value_parser = pair)]
    pub ports: Vec<PortPair>,

    /// Plan ports for this many tunnels; without this and --ports, for one tunnel per member.
    #[arg(long, value_name = "K", requires = "endpoint_a")]
    pub tunnels: Option<usize>,

    /// Plan ports from here upwards [default: 51820, or the lowest of --ports].
    #[arg(long, value_name = "PORT", requires = "endpoint_a", value_parser = clap::value_parser!(u16).range(i64::from(LOWEST_PORT)..=i64::from(HIGHEST_BASE_PORT)))]
    pub base_port: Option<u16>,

    /// Ports that are in use at A.
    #[arg(long, value_name = "PORT", requires = "endpoint_a", value_delimiter = ',')]
    pub exclude_a: Vec<u16>,

    /// Ports that are in use at B.
    #[arg(long, value_name = "PORT", requires = "endpoint_a", value_delimiter = ',')]
    pub exclude_b: Vec<u16>,

    /// End behind NAT; the bond member that the other end sends on cannot be predicted.
    #[arg(long, value_name = "END", requires = "endpoint_a")]
    pub nat: Option<Nat>,

    /// Also show which member each tunnel really arrives on, as counted by the running site.
    ///
    /// For the incoming direction only the sender's bond can be predicted: the switch in front of this site hashes by
    /// its own policy. Needs the same privilege as `stats`.
    #[arg(long, conflicts_with = "endpoint_a")]
    pub measured: bool,

    /// Measure, and propose listen ports for the other site if tunnels arrive on fewer members than they could.
    #[arg(long, conflicts_with = "endpoint_a")]
    pub replan_rx: bool,

    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Which end is behind address translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Nat {
    A,
    B,
    Both,
}

fn policy(text: &str) -> Result<XmitHashPolicy, String> {
    let names = XmitHashPolicy::ALL.map(XmitHashPolicy::as_str).join(", ");
    let found = XmitHashPolicy::ALL.into_iter().find(|policy| policy.as_str() == text);
    found.ok_or_else(|| format!("choose one of {names}"))
}

fn pair(text: &str) -> Result<PortPair, String> {
    let ports = text.split_once(':').and_then(|(a, b)| Some(PortPair { a: a.parse().ok()?, b: b.parse().ok()? }));
    ports.ok_or_else(|| "give a tunnel's listen ports at A and at B, such as 51820:51822".to_owned())
}
