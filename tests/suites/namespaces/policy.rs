//! `policy` and `explain` under traffic. The tunnels' counters must show what was requested.

use std::fs;
use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lab::changes::{make_changes, policy, show};
use lab::kind::Kind;
use lab::sites::Lab;
use lab::traffic::{TcpLoad, UdpLoad};
use serde_json::Value;

use super::stage::{lab, of_tunnels};

/// Packets that each tunnel carries while `load` is sent. Health probes do not count.
fn gained(lab: &Lab, load: UdpLoad) -> Result<Vec<u64>> {
    let before = of_tunnels(&lab.stats(0)?, "tx_packets");
    let report = load.run(lab.path_v4())?;
    ensure!(report.received() == report.sent(), "{:.1}% lost", report.loss() * 100.0);
    let after = of_tunnels(&lab.stats(0)?, "tx_packets");
    Ok(after.iter().zip(before).map(|(after, before)| after - before).collect())
}

/// 1,280 packets of 128 flows.
const FLOWS: UdpLoad = UdpLoad { flows: 128, packets: 10, payload: 200, rate: 8.0 };
/// Number of packets of [`FLOWS`].
const PACKETS: u64 = 1280;
/// Most packets of other origin: neighbour discovery, and connections of earlier tests that are closing.
const OTHERS: u64 = 20;

pub fn policy_changes_steer_at_once(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let _running = lab.run()?;
    let sent = gained(&lab, FLOWS)?;
    ensure!(
        sent.iter().all(|packets| *packets > PACKETS / 6),
        "with equal weights: {sent:?}\n{}{}",
        lab.ecmpvpn(0, &["stats"])?.1,
        lab.ecmpvpn(0, &["policy", "show"])?.1
    );

    policy(&lab, &["weight", "wg0", "8", "--save"])?;
    let sent = gained(&lab, FLOWS)?;
    ensure!(sent[0] > PACKETS * 65 / 100 && sent[1].min(sent[2]) > 20, "with weights 8, 1, 1: {sent:?}");
    let text = fs::read_to_string(&lab.sites[0].config)?;
    ensure!(text.contains("weight = 8\n") && text.contains("# where outer packets leave from"), "saved:\n{text}");
    ensure!(show(&lab)?["peers"][0]["tunnels"][0]["saved"] == true);
    policy(&lab, &["weight", "wg0", "1", "--save"])?;

    let there = lab.sites[1].host_v4().to_string();
    policy(&lab, &["pin", "wg2", "--dst", &there])?;
    let sent = gained(&lab, FLOWS)?;
    ensure!(sent[2] >= PACKETS && sent[0].max(sent[1]) <= OTHERS, "pinned to wg2: {sent:?}");
    let description = explain(&lab, 40_000, 443)?;
    ensure!(
        description["why"] == "pinned" && description["tunnel"] == "wg2" && description["next_tunnel"] != "wg2",
        "{description:#}"
    );
    policy(&lab, &["unpin", "--dst", &there])?;

    policy(&lab, &["drain", "wg1", "--deadline", "20"])?;
    let shown = &show(&lab)?["peers"][0]["tunnels"][1];
    ensure!(shown["open"] == false && shown["buckets"] == 0, "drained: {shown:#}");
    let sent = gained(&lab, FLOWS)?;
    ensure!(sent[1] <= OTHERS && sent[0].min(sent[2]) > PACKETS / 4, "wg1 drained: {sent:?}");
    policy(&lab, &["drain", "wg0"])?;
    let (code, _, complaint) = lab.ecmpvpn(0, &["policy", "drain", "wg2"])?;
    ensure!(code == 1 && complaint.contains("only tunnel"), "draining the last one ended with {code}: {complaint}");
    policy(&lab, &["undrain", "wg0"])?;
    policy(&lab, &["undrain", "wg1"])?;

    policy(&lab, &["rule", "add", "--proto", "udp", "--tunnels", "wg0", "--policy", "hash"])?;
    let sent = gained(&lab, FLOWS)?;
    ensure!(sent[0] >= PACKETS && sent[1].max(sent[2]) <= OTHERS, "UDP by wg0 only: {sent:?}");
    policy(&lab, &["rule", "del", "1"])?;
    policy(&lab, &["set", "spray"])?;
    sprayed_if_a_rule_names_it(&lab)?;
    policy(&lab, &["set", "hash"])?;
    one_process_makes_many_changes(&lab)?;
    explained_is_where_it_goes(&lab)?;
    bad_names_are_wrong_usage(&lab)
}

/// Under policy `spray` a UDP flow stays whole, until a rule names UDP.
fn sprayed_if_a_rule_names_it(lab: &Lab) -> Result<()> {
    let one = UdpLoad { flows: 1, packets: 600, payload: 1000, rate: 10.0 };
    // Where order is restored it would be sprayed too. `run` agrees on that with the far end within some probes.
    policy(lab, &["order", "off"])?;
    thread::sleep(Duration::from_secs(1));
    // On a busy machine the flow may pause, and then moves.
    let mut sent = gained(lab, one)?;
    for _ in 0..2 {
        if sent.iter().all(|packets| *packets < 500) {
            sent = gained(lab, one)?;
        }
    }
    let description = explain(lab, 40_000, 443)?;
    ensure!(
        sent.iter().any(|packets| *packets >= 500)
            && description["why"] != "sprayed"
            && description["not_sprayed"] == "UDP does not tolerate reordering",
        "one flow, whole: {sent:?}, {description:#}"
    );
    policy(lab, &["rule", "add", "--proto", "udp", "--policy", "spray"])?;
    let sent = gained(lab, one)?;
    // The delays of the paths decide how many each tunnel gets. Of so few packets, one tunnel may get nearly all.
    let description = explain(lab, 40_000, 443)?;
    ensure!(
        sent.iter().sum::<u64>() >= 600 && description["why"] == "sprayed" && description["not_sprayed"].is_null(),
        "one flow, sprayed: {sent:?}, {description:#}"
    );
    policy(lab, &["rule", "del", "1"]).map(drop)
}

fn explain(lab: &Lab, sport: u16, dport: u16) -> Result<Value> {
    let (src, dst) = (lab.sites[0].host_v4().to_string(), lab.sites[1].host_v4().to_string());
    let ports = [sport.to_string(), dport.to_string()];
    let (code, output, complaint) = lab
        .ecmpvpn(0, &["explain", &src, &dst, "--proto", "udp", "--sport", &ports[0], "--dport", &ports[1], "--json"])?;
    ensure!(code == 0, "`explain` ended with {code}: {complaint}");
    serde_json::from_str(&output).with_context(|| format!("reading `explain --json`: {output}"))
}

fn one_process_makes_many_changes(lab: &Lab) -> Result<()> {
    let mut batch = lab.batch(0)?;
    let shown = batch.change("weight wg0 7")?;
    ensure!(shown["peers"][0]["tunnels"][0]["weight"] == 7, "{shown:#}");
    let shown = batch.change("# nothing\n\nrule add --proto tcp --policy spray")?;
    ensure!(shown["rules"][0]["policy"] == "spray" && shown["peers"][0]["tunnels"][0]["weight"] == 7, "{shown:#}");
    let shown = batch.change("rule del 1\nweight wg0 1")?;
    ensure!(shown == show(lab)?, "{shown:#}");
    let Err(error) = batch.change("weight wg0 2\nweight wg9 1") else { bail!("wg9 has a weight") };
    ensure!(
        format!("{error:#}").contains("line 11 of standard input; the earlier lines are in force: wg9"),
        "{error:#}"
    );
    ensure!(show(lab)?["peers"][0]["tunnels"][0]["weight"] == 2);
    policy(lab, &["weight", "wg0", "1"])?;
    Ok(())
}

fn explained_is_where_it_goes(lab: &Lab) -> Result<()> {
    const DATAGRAMS: u64 = 60;
    let [a, b] = &lab.sites;
    for port in 41_000..41_006 {
        let description = explain(lab, port, 9)?;
        ensure!(
            description == explain(lab, port, 9)? || description["idle_ms"].is_number(),
            "it changed by being explained: {description:#}"
        );
        let before = of_tunnels(&lab.stats(0)?, "tx_packets");
        let socket = a.host.run(|| UdpSocket::bind((a.host_v4(), port)))?;
        for _ in 0..DATAGRAMS {
            socket.send_to(&[0; 100], (b.host_v4(), 9)).or_else(|error| match error.kind() {
                // The far host answers port unreachable, because nobody listens.
                std::io::ErrorKind::ConnectionRefused => Ok(0),
                _ => Err(error),
            })?;
        }
        std::thread::sleep(Duration::from_millis(300));
        let after = of_tunnels(&lab.stats(0)?, "tx_packets");
        let carrier =
            lab.tunnels.iter().zip(after.iter().zip(before)).find(|(_, (after, before))| **after - before >= DATAGRAMS);
        let carrier = carrier.map(|(tunnel, _)| tunnel.name.as_str());
        ensure!(
            carrier.is_some() && description["tunnel"].as_str() == carrier,
            "{carrier:?} carried it: {description:#}"
        );
        ensure!(
            description["next_tunnel"].is_string() && description["next_tunnel"] != description["tunnel"],
            "{description:#}"
        );
    }
    Ok(())
}

fn bad_names_are_wrong_usage(lab: &Lab) -> Result<()> {
    for (arguments, word) in [
        (&["weight", "wg9", "1"][..], "no tunnel"),
        (&["drain", "wg9"], "no tunnel"),
        (&["set", "hash", "--peer", "nobody"], "no peer"),
        (&["rule", "add", "--policy", "hash", "--tunnels", "wg9"], "no tunnel"),
        (&["rule", "del", "1"], "no rule 1"),
        (&["unpin", "--proto", "tcp"], "no pin"),
    ] {
        let (code, _, complaint) = lab.ecmpvpn(0, &[&["policy"], arguments].concat())?;
        ensure!(code == 2 && complaint.contains(word), "{arguments:?} ended with {code}: {complaint}");
    }
    Ok(())
}

/// Makes as many changes as fit into a few seconds. `cargo xtask bench goodput --case changes` makes 100 in 10 s.
pub fn no_packet_is_lost_by_policy_changes(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let _running = lab.run()?;
    let (udp, changes) = std::thread::scope(|scope| -> Result<_> {
        let udp = scope.spawn(|| UdpLoad { flows: 16, packets: 250, payload: 1000, rate: 5.0 }.run(lab.path_v4()));
        let tcp = scope.spawn(|| TcpLoad::bytes(4, 500_000).run(lab.path_v4()));
        let changes = make_changes(&lab, 28, Duration::from_secs(5));
        let tcp = tcp.join().expect("it does not panic")?;
        ensure!(tcp.received() == 2_000_000, "{} of 2,000,000 bytes came by TCP", tcp.received());
        Ok((udp.join().expect("it does not panic")?, changes?))
    })?;
    println!("{changes:?}; {} of {} datagrams came", udp.received(), udp.sent());
    ensure!(udp.received() == udp.sent(), "{} of {} datagrams were lost", udp.sent() - udp.received(), udp.sent());
    let dropped = &lab.stats(0)?["dropped"];
    let counts = dropped.as_object().context("stats count what was dropped")?;
    ensure!(counts.values().all(|count| count == 0), "dropped: {dropped}");
    Ok(())
}
