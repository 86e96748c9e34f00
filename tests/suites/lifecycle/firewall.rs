//! A gateway's own packet filter (nftables) drops the tunnels' packets.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::kind::Kind;
use lab::sites::Lab;
use lab::traffic::{TcpLoad, ping};

use super::stage::lab;

/// A stateless filter that lets neither the tunnels nor the LAN's traffic pass. Neighbour discovery passes.
const CLOSED: &str = "table inet filter {
    chain input {
        type filter hook input priority 0; policy drop;
        iifname lo accept
        meta l4proto ipv6-icmp accept
        tcp dport 22 accept
    }
    chain forward { type filter hook forward priority 0; policy drop; }
}";
const OPEN: &str = "table inet filter {
    chain input { type filter hook input priority 0; policy accept; }
    chain forward { type filter hook forward priority 0; policy accept; }
}";
const INPUT: &str = "chain input of table inet filter (hook input, priority 0, policy drop) could drop UDP to ports ";
const FORWARD: &str = "chain forward of table inet filter (hook forward, priority 0, policy drop) could drop what is \
    forwarded to ecmp0 or comes from wg0, wg1, wg2: ";

/// What `check` writes, both outputs.
fn check(lab: &Lab, site: usize) -> Result<String> {
    let (code, output, complaint) = lab.ecmpvpn(site, &["check"])?;
    ensure!(code == 0, "`check` ended with {code}: {complaint}");
    Ok(output + &complaint)
}

/// The commands between backticks that begin with `nft`.
fn commands(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).filter(|command| command.starts_with("nft ")).collect()
}

pub fn a_closed_firewall_is_named_until_it_lets_the_tunnels_pass(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    for (site, rules) in lab.sites.iter().zip([CLOSED, OPEN]) {
        site.gateway.exec("nft", [rules])?;
    }
    let mut running = [lab.start(0)?, lab.start(1)?];
    for run in &mut running {
        run.wait_until_said("is up:")?;
    }
    let ports: Vec<String> = lab.tunnels.iter().map(|tunnel| tunnel.ports[0].to_string()).collect();
    let named = format!("{INPUT}{} and ICMP echo on wg0, wg1, wg2", ports.join(", "));
    let said = running[0].output();
    ensure!(said.contains(", none of which has answered yet"), "{said}");
    ensure!(said.contains(&format!(" ports {}, ICMP fragmentation-needed", ports.join(", "))), "{said}");
    for words in [named.as_str(), FORWARD] {
        ensure!(said.matches(words).count() == 1, "{words:?} is not said once:\n{said}");
    }
    ensure!(!running[1].output().contains("the firewall's chain"), "{}", running[1].output());
    ensure!(!check(&lab, 1)?.contains("the firewall's chain"), "{}", check(&lab, 1)?);

    // Nothing passes, and the silence is explained.
    running[0].wait_until_said(" has answered a probe yet")?;
    let said = running[0].output();
    ensure!(said.contains(&format!("or ICMP echo (at this one, {named}")), "{said}");
    ensure!(!said.contains(" answers"), "{said}");
    let path = lab.path_v4();
    let pings = ping(path.from, path.source, path.destination, 3, 56, Duration::from_secs(1))?;
    ensure!(pings.answered() == 0, "{pings:?}");
    let (_, table, _) = lab.ecmpvpn(0, &["stats"])?;
    ensure!(table.matches("no answer yet").count() == 3, "{table}");

    // With what `check` advises, everything passes.
    let advice = check(&lab, 0)?;
    let commands = commands(&advice);
    ensure!(commands.len() == 4, "{advice}");
    for command in commands {
        lab.sites[0].gateway.exec("sh", ["-c", command])?;
    }
    lab.warm_up(&mut running)?;
    for path in [lab.path_v4(), lab.path_v6()] {
        for path in [path, path.reversed()] {
            let report = TcpLoad::bytes(8, 50_000).run(path)?;
            ensure!(report.received() == 400_000, "{report:?}");
        }
    }
    for site in [0, 1] {
        for tunnel in lab.stats(site)?["tunnels"].as_array().context("no tunnels")? {
            ensure!(tunnel["rtt_us"].as_u64().is_some_and(|time| time > 0), "no probe was answered: {tunnel}");
        }
    }
    ensure!(!check(&lab, 0)?.contains("the firewall's chain"), "{}", check(&lab, 0)?);
    let said = running[0].output();
    for tunnel in &lab.tunnels {
        ensure!(said.matches(&format!("{} answers", tunnel.name)).count() == 1, "{said}");
    }
    ensure!(!said.contains("is up again"), "{said}");
    ensure!(said.matches("the firewall's chain").count() == 2, "{said}");
    Ok(())
}
