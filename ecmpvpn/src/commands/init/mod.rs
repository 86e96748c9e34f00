//! `init`: writes both sites' configurations and keys in one go, ports planned.

mod files;
mod sites;
#[cfg(test)]
mod tests;

use crate::cli::InitArgs;
use crate::commands::{Failure, counted, print};
use crate::config::Config;
use crate::plan::ports::PortPlan;
use sites::Sites;

/// Makes both sites and writes them below the output folder.
pub fn run(args: &InitArgs) -> Result<(), Failure> {
    let sites = sites::make(args)?;
    files::write(&args.output, [&sites.a, &sites.b])?;
    print(summary(args, &sites))
}

fn summary(args: &InitArgs, sites: &Sites) -> String {
    let Sites { a, b, ports } = sites;
    let folder = |site: &Config| args.output.join(&site.site.name).display().to_string();
    let mut lines = vec![
        format!(
            "Wrote {} and {}: configurations and keys of {}.",
            folder(a),
            folder(b),
            counted(usize::from(args.tunnels), "tunnel", "tunnels")
        ),
        String::new(),
    ];
    let [width, left] = [
        a.peers[0].tunnels.iter().map(|tunnel| tunnel.name.as_str().len()).max().unwrap_or_default(),
        args.a_endpoint.to_string().len() + 6,
    ];
    for tunnel in &a.peers[0].tunnels {
        let near = std::net::SocketAddr::new(args.a_endpoint, tunnel.listen_port).to_string();
        let far = std::net::SocketAddr::new(args.b_endpoint, tunnel.remote_port);
        lines.push(format!("  {:width$}  {near:>left$} <-> {far}", tunnel.name.as_str()));
    }
    lines.push(verdict(ports));
    lines.push(String::new());
    lines.push("Next: take each folder to its gateway, whole and unread by others, and start there:".to_owned());
    for site in [a, b] {
        let (name, endpoint) = (&site.site.name, site.peers[0].local_endpoint);
        let at = if endpoint.is_ipv6() { format!("[{endpoint}]") } else { endpoint.to_string() };
        lines.push(format!("  scp -pr {} {at}:", folder(site)));
        lines.push(format!("  sudo ecmpvpn run -c {name}/ecmpvpn.toml     (on {name})"));
    }
    lines.join("\n")
}

fn verdict(ports: &PortPlan) -> String {
    match ports.misses() {
        0 if ports.is_perfect() => {
            "  These ports spread evenly over the bond members, both ways, and with one member down.".to_owned()
        }
        0 => "  These ports spread evenly over the bond members as far as can be known beforehand.".to_owned(),
        misses => format!(
            "  These ports are the best found: {} not where an even spread would have them.",
            counted(misses, "tunnel is", "tunnels are")
        ),
    }
}
