//! `explain`: shows where a flow goes and why.

use std::net::IpAddr;

use anyhow::{Context as _, anyhow};
use ecmpvpn_common::layout::{Policy, Reason, TunnelId};

use crate::cli::policy::ExplainArgs;
use crate::commands::{Failure, Invocation, print};
use crate::config::{self, Config, has_ports, protocol_name};
use crate::dataplane::{Pins, TunnelView};
use crate::host::Netlink;
use crate::host::links::Links;
use crate::live::explain::{Answer, Flow, Found, Probe, Why, ask};
use crate::live::policy::Live;
use crate::live::stats;
use crate::report::explain::Report;
use crate::report::policy::Rule;

/// Explains where the site sends the flow.
pub async fn run(invocation: Invocation<'_>, args: &ExplainArgs) -> Result<(), Failure> {
    let flow = flow(args)?;
    let site = invocation.find()?;
    let config = site.config();
    let pins = Pins::of(&site.name);
    let report = {
        let live = Live::open(&site.name, &pins)?;
        site.warn("bond members are left out");
        let answer = ask(&pins, &live.view, &live.rule_maps, &Probe::of(&flow))?;
        let rules = live.rules()?;
        let rule = rules.iter().zip(1..).find(|(placed, _)| Some(placed.bit) == answer.rule);
        let is_saved = |rule| config.is_some_and(|config| config.rules.contains(rule));
        let rule = rule.map(|(placed, number)| Rule::of(number, &placed.rule, is_saved(&placed.rule)));
        let peer = answer.peer.and_then(|peer| live.view.peers().into_iter().nth(peer as usize)).map(|peer| peer.name);
        let tunnels = live.view.tunnels()?;
        drop(live);
        report(config, &answer, &flow, rule, peer, &tunnels).await?
    };
    if args.json {
        return print(serde_json::to_string_pretty(&report).context("writing JSON")?);
    }
    print(report)
}

fn flow(args: &ExplainArgs) -> Result<Flow, Failure> {
    if args.src.is_ipv4() != args.dst.is_ipv4() {
        let (src, dst) = (args.src, args.dst);
        return Err(Failure::usage(anyhow!("{src} and {dst} are of different families: no packet has both")));
    }
    let protocol = protocol_name(args.proto);
    let ports = match (has_ports(args.proto), args.sport, args.dport) {
        (true, Some(sport), Some(dport)) => (sport, dport),
        (false, None | Some(0), None | Some(0)) => (0, 0),
        (true, ..) => {
            return Err(Failure::usage(anyhow!(
                "a flow of {protocol} has ports, and they decide its tunnel: give both --sport and --dport, or another --proto"
            )));
        }
        (false, ..) => {
            return Err(Failure::usage(anyhow!("protocol {protocol} has no ports: leave --sport and --dport out")));
        }
    };
    let (src, dst, proto) = (args.src, args.dst, args.proto);
    Ok(Flow { src, dst, proto, ports, id: args.id, dscp: args.dscp, mark: args.mark })
}

async fn report(
    config: Option<&Config>,
    answer: &Answer,
    flow: &Flow,
    rule: Option<Rule>,
    peer: Option<String>,
    tunnels: &[TunnelView],
) -> Result<Report, Failure> {
    let netlink = Netlink::open().map_err(anyhow::Error::new)?;
    let links = netlink.links().await.context("reading the host's links")?;
    let tunnel = |id: TunnelId| tunnels.iter().find(|tunnel| tunnel.id == id);
    let name = |id: TunnelId| tunnel(id).map(|tunnel| tunnel.name.clone());
    let mut report = Report {
        flow: written(flow),
        key: key(answer),
        peer,
        rule,
        policy: answer.peer.map(|_| config::Policy::from(answer.policy).as_str().to_owned()),
        hash: format!("{:#018x}", answer.hash),
        bucket: None,
        idle_ms: None,
        current_tunnel: None,
        tunnel: None,
        why: String::new(),
        why_text: String::new(),
        not_sprayed: not_sprayed(answer, flow.proto),
        restored: answer.stamped,
        member: None,
        next_tunnel: None,
        next_member: None,
    };
    match &answer.verdict {
        Err(reason) => {
            reason.name().clone_into(&mut report.why);
            refused(*reason).clone_into(&mut report.why_text);
        }
        Ok(found) => {
            report.bucket = Some(found.bucket);
            #[expect(clippy::cast_precision_loss, reason = "for people")]
            let idle = found.idle_ns.map(|idle| idle as f64 / 1e6);
            report.idle_ms = idle;
            report.current_tunnel = name(found.current);
            report.tunnel = name(found.tunnel);
            (report.why, report.why_text) = why(found);
            report.member = member(config, &links, &netlink, tunnel(found.tunnel)).await;
            report.next_tunnel = found.next.and_then(name);
            report.next_member = member(config, &links, &netlink, found.next.and_then(tunnel)).await;
        }
    }
    Ok(report)
}

async fn member(
    config: Option<&Config>,
    links: &Links,
    netlink: &Netlink,
    tunnel: Option<&TunnelView>,
) -> Option<String> {
    stats::member(config?, links, netlink, tunnel?).await
}

fn why(found: &Found) -> (String, String) {
    let (word, text) = match found.why {
        Why::Pinned => ("pinned", "a pin keeps it there"),
        Why::Sprayed => ("sprayed", "chosen for each packet: the tunnel that would deliver it first now"),
        Why::Home => ("home", "its bucket's home, by hash and weights"),
        Why::Rule => ("rule", "the rule does not allow its bucket's home; the best of the tunnels that it allows"),
        Why::Failover => {
            ("failover", "the tunnel that its bucket was on is down; the bucket returns when that tunnel is up again")
        }
        Why::Drained => ("drained", "its bucket's home is being drained"),
        Why::Stays => ("stays", "an earlier choice put its bucket there; it stays until the flow pauses"),
        Why::Flowlet => ("flowlet", "the flow pauses, and this is the least loaded link"),
    };
    (word.to_owned(), text.to_owned())
}

/// Why the flow is never sprayed; `None` if it may be, or if its policy sprays nothing.
fn not_sprayed(answer: &Answer, proto: u8) -> Option<String> {
    let sprays = match answer.policy {
        Policy::Spray | Policy::Adaptive => answer.ordered,
        Policy::Hash | Policy::Flowlet => false,
    };
    let name = protocol_name(proto);
    let name =
        if name.starts_with(|c: char| c.is_ascii_digit()) { format!("protocol {name}") } else { name.to_uppercase() };
    sprays.then(|| format!("{name} does not tolerate reordering"))
}

fn refused(reason: Reason) -> &'static str {
    match reason {
        Reason::NotIp => "it is neither IPv4 nor IPv6",
        Reason::Truncated => "the packet is cut off",
        Reason::Multicast => "its destination is multicast or broadcast, which stays on its own link",
        Reason::LinkLocal => "its destination is link-local, which stays on its own link",
        Reason::NoPeer => "its destination is in no peer's prefixes",
        Reason::NoLiveTunnel => "none of the tunnels that it may take is up: its packets are dropped",
        Reason::BadTable => "the maps contradict each other: its packets are dropped; start `ecmpvpn run` again",
    }
}

/// The flow as given on the command line.
fn written(flow: &Flow) -> String {
    let end = |address: IpAddr, port: u16| match (address, flow.ports) {
        (address, (0, 0)) => address.to_string(),
        (IpAddr::V4(address), _) => format!("{address}:{port}"),
        (IpAddr::V6(address), _) => format!("[{address}]:{port}"),
    };
    let mut text =
        format!("{} {} -> {}", protocol_name(flow.proto), end(flow.src, flow.ports.0), end(flow.dst, flow.ports.1));
    for (name, value) in [("dscp", u32::from(flow.dscp)), ("fwmark", flow.mark)] {
        if value != 0 {
            text.extend([" ", name, " ", &value.to_string()]);
        }
    }
    text
}

/// The flow key that the steering program uses.
fn key(answer: &Answer) -> String {
    let key = &answer.key;
    let address = |words: [u32; 4]| -> IpAddr {
        let octets: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        match key.family {
            4 => <[u8; 4]>::try_from(&octets[..4]).unwrap_or_default().into(),
            _ => <[u8; 16]>::try_from(octets).unwrap_or_default().into(),
        }
    };
    format!(
        "src {} dst {} proto {} sport {} dport {} id {:#x}",
        address(key.src),
        address(key.dst),
        key.protocol,
        u16::from_be(key.sport),
        u16::from_be(key.dport),
        u32::from_be(key.id)
    )
}
