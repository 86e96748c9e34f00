//! `init`: writes the configurations and keys of both sites, with planned ports; or those of one site, from its
//! wg-quick files.

mod files;
#[cfg(test)]
mod from_tests;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::anyhow;
use zeroize::Zeroizing;

use crate::cli::InitArgs;
use crate::commands::{Failure, count_of, print, warn};
use crate::config::{Config, InterfaceName, wg_quick};
use crate::plan::init::from_wg_quick as from;
use crate::plan::init::sites::{self, Sites};
use crate::plan::ports::PortPlan;
use crate::report::init as report;
use files::Folder;

/// Maximum file size, bytes. Far above any wg-quick file.
const MAX_LEN: u64 = 1 << 20;

/// Makes both sites, or one site from the files of `--from`, and writes them into the output folder.
pub fn run(args: &InitArgs) -> Result<(), Failure> {
    if !args.from.is_empty() {
        return run_from(args);
    }
    let sites = sites::make(&args.request())?;
    files::write(&args.output, &[&sites.a, &sites.b].map(|site| Folder { site, texts: Vec::new() }))?;
    print(summary(args, &sites))
}

fn run_from(args: &InitArgs) -> Result<(), Failure> {
    let files = args.from.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
    let taken = from::take_over(&args.request(), &files)?;
    let texts = vec![(report::OTHER_SITE, report::other_site(&args.request(), &taken))];
    files::write(&args.output, &[Folder { site: &taken.config, texts }])?;
    for line in report::changes(&taken) {
        let _ = writeln!(io::stderr(), "ecmpvpn: {line}");
    }
    print(summary_from(args, &taken))
}

/// Reads a wg-quick file. The interface has the name of the file, as with wg-quick.
fn read(path: &Path) -> Result<from::File, Failure> {
    let shown = path.display().to_string();
    let failed = |error: io::Error| Failure::usage(anyhow::Error::new(error).context(format!("reading {shown}")));
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    // The file holds a private key. Reserve the whole size at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_LEN + 2).unwrap_or_default()));
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(Failure::usage(anyhow!("{shown} is too large for a wg-quick file: name one such as wg0.conf")));
    }
    let text = std::str::from_utf8(&bytes)
        .map_err(|_| Failure::usage(anyhow!("{shown} is not UTF-8 text: name a wg-quick file such as wg0.conf")))?;
    // Some editors begin a file with this mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mode = metadata.mode() & 0o7777;
    if metadata.is_file() && mode & 0o077 != 0 {
        warn(format_args!(
            "{shown} holds a private key, and others than its owner can use it (mode {mode:04o}): run `chmod 600 {shown}`"
        ));
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = InterfaceName::new(&stem)
        .map_err(|why| Failure::usage(anyhow!("{shown}: the tunnel's name {stem:?} {why}: rename the file")))?;
    let content = wg_quick::parse(text, &shown).map_err(|problems| Failure::usage(anyhow!("{problems}")))?;
    Ok(from::File { path: shown, name, content })
}

fn summary_from(args: &InitArgs, taken: &from::Taken) -> String {
    let (site, peer) = (&taken.config.site.name, &taken.config.peers[0]);
    let folder = args.output.join(site).display().to_string();
    let names: Vec<&str> = peer.tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect();
    let stopping: Vec<String> = names.iter().map(|name| format!("sudo wg-quick down {name}")).collect();
    [
        format!("Wrote {folder}: configuration and keys of {}.", count_of(names.len(), "tunnel", "tunnels")),
        verdict(&taken.ports),
        String::new(),
        format!("Next: set {} as {folder}/{} says, and switch over here:", peer.name, report::OTHER_SITE),
        format!("  {}", stopping.join("; ")),
        format!("  sudo ecmpvpn run -c {folder}/ecmpvpn.toml"),
    ]
    .join("\n")
}

fn summary(args: &InitArgs, sites: &Sites) -> String {
    let Sites { a, b, ports } = sites;
    let folder = |site: &Config| args.output.join(&site.site.name).display().to_string();
    let mut lines = vec![
        format!(
            "Wrote {} and {}: configurations and keys of {}.",
            folder(a),
            folder(b),
            count_of(usize::from(args.tunnels), "tunnel", "tunnels")
        ),
        String::new(),
    ];
    let [width, left] = [
        a.peers[0].tunnels.iter().map(|tunnel| tunnel.name.as_str().len()).max().unwrap_or_default(),
        args.a_endpoint.to_string().len() + 6,
    ];
    for tunnel in &a.peers[0].tunnels {
        let near = std::net::SocketAddr::new(a.peers[0].local_endpoint, tunnel.listen_port).to_string();
        let far = std::net::SocketAddr::new(a.peers[0].remote_endpoint, tunnel.remote_port);
        lines.push(format!("  {:width$}  {near:>left$} <-> {far}", tunnel.name.as_str()));
    }
    lines.push(verdict(ports));
    lines.push(String::new());
    lines.push("Next: copy each folder to its gateway, readable by nobody else, and start there:".to_owned());
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
            count_of(misses, "tunnel is", "tunnels are")
        ),
    }
}
