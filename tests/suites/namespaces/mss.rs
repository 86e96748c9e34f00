//! TCP connections begin with segments that fit through a tunnel.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::kind::Kind;
use lab::netns::Netns;
use lab::sites::{Lab, Options, Overrides, binary};
use lab::traffic::Path;

/// The tunnels' MTU of the labs, and that of the hosts' own links, bytes.
const TUNNELS: u32 = 1420;
const HOSTS: u32 = 1500;
/// Of each segment, and not counted by the MSS that is announced: timestamps.
const TIMESTAMPS: u32 = 12;
const PATIENCE: Duration = Duration::from_secs(10);

/// Both ends of a connection send segments that fit, without a message that says so; and larger ones if that is turned
/// off.
pub fn connections_begin_with_segments_that_fit(kind: Kind) -> Result<()> {
    for clamps in [true, false] {
        let keys = vec![("mss_clamp".to_owned(), clamps.to_string())];
        let overrides = Overrides { keys, ..Overrides::default() };
        let lab = Lab::new(Options { overrides, ..kind.options() }, &binary()?)?;
        let _sites = lab.run()?;
        for (path, headers) in [(lab.path_v4(), 40), (lab.path_v6(), 60)] {
            let expected = if clamps { TUNNELS } else { HOSTS } - headers - TIMESTAMPS;
            for path in [path, path.reversed()] {
                let found = at_both_ends(path)?;
                ensure!(found == [expected; 2], "{path:?}: {found:?}, not {expected}; mss_clamp = {clamps}");
            }
        }
    }
    Ok(())
}

/// The greatest segments that the two ends of a new connection send, bytes.
fn at_both_ends(path: Path<'_>) -> Result<[u32; 2]> {
    let listener = path.to.run(|| TcpListener::bind(SocketAddr::new(path.destination, 0)))?;
    let to = listener.local_addr()?;
    let mut near = path.from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    let (mut far, _) = listener.accept()?;
    far.set_read_timeout(Some(PATIENCE))?;
    near.write_all(b"x")?;
    far.read_exact(&mut [0])?;
    let port = to.port();
    Ok([greatest(path.from, &format!("dport = :{port}"))?, greatest(path.to, &format!("sport = :{port}"))?])
}

fn greatest(ns: &Netns, filter: &str) -> Result<u32> {
    let sockets = ns.query("ss", &format!("-tinH state established {filter}"))?;
    let mss = sockets.split_whitespace().find_map(|word| word.strip_prefix("mss:"));
    mss.with_context(|| format!("no mss in {sockets:?}"))?.parse().context("mss")
}
