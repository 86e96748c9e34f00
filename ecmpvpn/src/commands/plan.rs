//! `plan`: shows each tunnel's bond member in both directions, and ports that spread better. Changes nothing.

use std::io::{self, Write as _};
use std::path::Path;

use crate::cli::plan::{Nat, PlanArgs};
use crate::commands::{Failure, print, warn};
use crate::config::{Config, MAX_TUNNELS_PER_PEER};
use crate::host::run_dir::Holder;
use crate::host::{self, HostError, Journal, Owned, RUN_ROOT, RunDir};
use crate::live::arrivals;
use crate::live::ports::{Count, Judged, judge};
use crate::plan::Plan;
use crate::plan::ports::{self, End, LOWEST_PORT, Request};
use crate::report::plan::{Peer, Report};

/// Lowest port unless the user gives another: the customary port of WireGuard.
const DEFAULT_BASE_PORT: u16 = 51820;

/// Prints the plan for the given endpoints; without endpoints, for the configuration at `path`.
pub async fn run(path: &Path, args: &PlanArgs) -> Result<(), Failure> {
    let report = if let Some((a, b)) = given_ends(args) {
        Report { peers: vec![plan_without_site(args, a, b).map_err(Failure::usage)?], changes: None }
    } else {
        let config = crate::commands::load(path)?;
        let Judged { mut report, degraded } = judge(&config, Count::Usable).await.map_err(Failure::usage)?;
        for degraded in degraded {
            warn(format_args!("{degraded}: choose ports when all are back"));
        }
        report.changes = changes(&config).await;
        if args.measured || args.replan_rx {
            arrivals::add(&config, &mut report, args.replan_rx).await?;
        }
        report
    };
    if args.json {
        let text = serde_json::to_string_pretty(&report.json()).map_err(anyhow::Error::new)?;
        print(text)
    } else {
        print(report)
    }
}

/// What `run` would change. If this cannot be determined, the report on ports is still valid, so the reason only goes
/// to standard error.
async fn changes(config: &Config) -> Option<Vec<String>> {
    let site = &config.site.name;
    // A user without privilege may not look, and gets the reason below.
    if let Ok(Some(Holder { pid, .. })) = RunDir::holder(Path::new(RUN_ROOT), site) {
        let _ = writeln!(
            io::stderr(),
            "ecmpvpn: {site} is running (pid {pid}): `ecmpvpn reload` applies what the configuration changes"
        );
        return None;
    }
    match needed(config).await {
        Ok(changes) => Some(changes),
        Err(error) => {
            let error = anyhow::Error::new(error).context("what `run` would change cannot be determined");
            warn(format_args!("{error:#}"));
            None
        }
    }
}

/// The changes that the host needs, given what an earlier run left up.
async fn needed(config: &Config) -> Result<Vec<String>, HostError> {
    let site = &config.site.name;
    let plan = Plan::new(config, host::detect_backend(config.steering.backend));
    let journal = Journal::open(&RunDir::journal_path_of(Path::new(RUN_ROOT), site), site)?;
    let changes = host::changes_since(&plan, Owned { journal: Some(&journal), ..Owned::default() }).await?;
    Ok(changes.iter().filter(|change| change.is_needed()).map(ToString::to_string).collect())
}

/// The two ends on the command line. `None`: they are not given.
fn given_ends(args: &PlanArgs) -> Option<(End, End)> {
    let members = args.members?;
    let mut a = End::new(args.endpoint_a?, members, args.xmit_hash_policy);
    let policy_b = args.xmit_hash_policy_b.unwrap_or(args.xmit_hash_policy);
    let mut b = End::new(args.endpoint_b?, args.members_b.unwrap_or(members), policy_b);
    a.excluded = args.exclude_a.iter().copied().collect();
    b.excluded = args.exclude_b.iter().copied().collect();
    a.rewritten = matches!(args.nat, Some(Nat::A | Nat::Both));
    b.rewritten = matches!(args.nat, Some(Nat::B | Nat::Both));
    Some((a, b))
}

/// The report without a configuration.
fn plan_without_site(args: &PlanArgs, a: End, b: End) -> Result<Peer, ports::PortError> {
    if a.address == b.address {
        return Err(ports::PortError::SameAddress(a.address));
    }
    let lowest = args.ports.iter().map(|pair| pair.a.min(pair.b)).min().filter(|port| *port >= LOWEST_PORT);
    let tunnels = match args.tunnels {
        Some(tunnels) => tunnels,
        None if args.ports.is_empty() => usize::from(a.members.max(b.members)).min(MAX_TUNNELS_PER_PEER),
        None => args.ports.len(),
    };
    let request = Request { a, b, tunnels, base_port: args.base_port.or(lowest).unwrap_or(DEFAULT_BASE_PORT) };
    let planned = args.ports.is_empty();
    let plan = if planned { ports::plan(&request)? } else { ports::judge(&request, &args.ports)? };
    let better = if planned { None } else { ports::better(&request, &plan)? };
    let names = (0..plan.pairs.len()).map(|at| format!("wg{at}")).collect();
    Ok(Peer { here: "A".to_owned(), there: "B".to_owned(), request, names, plan, better, arrivals: None })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::config::XmitHashPolicy;

    fn parse(line: &str) -> Result<PlanArgs, String> {
        let words = ["ecmpvpn", "plan"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Plan(args) => Ok(args),
            other => Err(format!("{other:?}")),
        }
    }

    fn peer(line: &str) -> Peer {
        let args = parse(line).unwrap();
        let (a, b) = given_ends(&args).expect("endpoints are given");
        plan_without_site(&args, a, b).unwrap()
    }

    const ENDPOINTS: &str = "--endpoint-a 10.2.3.4 --endpoint-b 10.2.3.5 --members 3";

    #[test]
    fn given_ports_are_judged_and_better_ones_lie_near_them() {
        let peer = peer(&format!("{ENDPOINTS} --ports 5000:5000,5001:5001,5002:5002"));
        assert_eq!(peer.plan.misses(), 6);
        let better = peer.better.expect("equal ports are easily bettered").plan;
        assert_eq!((better.misses(), better.pairs.len()), (0, 3));
        assert!(better.pairs.iter().all(|pair| (5000..5016).contains(&pair.a) && (5000..5016).contains(&pair.b)));
    }

    #[test]
    fn without_ports_there_is_a_tunnel_a_member() {
        let peer =
            peer(&format!("{ENDPOINTS} --members-b 4 --xmit-hash-policy-b layer2 --exclude-b 51820,51821 --nat b"));
        assert_eq!(peer.names, ["wg0", "wg1", "wg2", "wg3"]);
        assert!(peer.plan.pairs.iter().all(|pair| pair.a >= 51820 && pair.b >= 51822), "{:?}", peer.plan.pairs);
        let (a, b) = (&peer.request.a, &peer.request.b);
        assert_eq!((a.members, a.policy, a.rewritten), (3, Some(XmitHashPolicy::Layer34), false));
        assert_eq!((b.members, b.policy, b.rewritten), (4, Some(XmitHashPolicy::Layer2), true));
        assert_eq!(super::tests::peer(&format!("{ENDPOINTS} --tunnels 2 --base-port 6000")).request.base_port, 6000);
    }

    #[test]
    fn one_address_is_no_pair_of_ends() {
        let args = parse("--endpoint-a 10.2.3.4 --endpoint-b 10.2.3.4 --members 3").unwrap();
        let (a, b) = given_ends(&args).expect("endpoints are given");
        let error = plan_without_site(&args, a, b).unwrap_err();
        assert_eq!(error.to_string(), "planning between 10.2.3.4 and itself: give the addresses of two gateways");
    }

    #[test]
    fn wrong_usage_is_reported() {
        for (line, expected) in [
            ("--endpoint-a 10.2.3.4", "--endpoint-b <ADDRESS>"),
            ("--members 3", "--endpoint-a <ADDRESS>"),
            ("--ports 1:2", "--endpoint-a <ADDRESS>"),
            (&format!("{ENDPOINTS} --ports 5000"), "such as 51820:51822"),
            (&format!("{ENDPOINTS} --ports 5000:5000 --tunnels 3"), "cannot be used with"),
            (&format!("{ENDPOINTS} --xmit-hash-policy layer4"), "choose one of layer2, layer3+4"),
            (&format!("{ENDPOINTS} --base-port 80"), "1024"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
