//! Resolves remote endpoints that are host names: when a command starts, and again while `run` runs.
//!
//! Resolving blocks, and may take half a minute if no name server answers. A running site therefore resolves on a
//! separate thread, and keeps using the known address meanwhile.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use super::health::Health;
use super::log_once::LogOnce;
use super::reconcile::{self, Silence};
use super::site::{SessionError, Site};
use crate::config::{Config, Peer};
use crate::dataplane::View;
use crate::error::chain;
use crate::host::wireguard::kernel;

/// Interval between resolutions of a name while its tunnels are up.
const EVERY: Duration = Duration::from_secs(60);
/// The same while one of them is down.
const WHILE_DOWN: Duration = Duration::from_secs(5);
/// How long one address of a name is tried before the next one, if the site does not answer there. WireGuard repeats a
/// handshake every 5 s.
const EACH: Duration = Duration::from_secs(15);
/// How often the state of the tunnels is read.
const LOOK: Duration = Duration::from_secs(1);

/// Why a name gives no usable address.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// The resolver failed, or gave no address.
    #[error(
        "resolving remote_endpoint {name} of {peer}: correct the name, or see whether this host's name servers answer"
    )]
    Unresolved {
        name: String,
        peer: String,
        #[source]
        source: io::Error,
    },
    /// All answers are of the other address family.
    #[error("remote_endpoint {name} of {peer} has no {family} address, but local_endpoint is {family}: it has {}", found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    OtherFamily {
        name: String,
        peer: String,
        /// The family that is needed, `IPv4` or `IPv6`.
        family: &'static str,
        found: Vec<IpAddr>,
    },
    /// The answer must not be used as a remote endpoint.
    #[error("remote_endpoint {name} of {peer} is {address}, {why}")]
    Unfit {
        name: String,
        peer: String,
        address: IpAddr,
        /// Why not, and what to do about it.
        why: String,
    },
}

/// Resolves the endpoints that `config` gives by name. A name that `known` has keeps its address. If a name cannot be
/// resolved, uses the address that existing tunnels to this peer use, if there are any. Blocks.
///
/// # Errors
/// A name cannot be resolved, or has no usable address.
pub fn resolve(config: &mut Config, known: Option<&Config>) -> Result<(), NameError> {
    for at in 0..config.peers.len() {
        let peer = &config.peers[at];
        let Some(name) = peer.remote_name.clone() else { continue };
        let same = |other: &&Peer| other.remote_name.as_ref() == Some(&name) && is_family(other.remote_endpoint, peer);
        let known = known.and_then(|known| known.peers.iter().find(same)).map(|other| other.remote_endpoint);
        let address = match known {
            Some(address) => address,
            None => match addresses(&name, peer) {
                Ok(answers) => preferred(config, at, &answers),
                Err(error) => {
                    let Some(address) = in_use(peer) else { return Err(error) };
                    tracing::warn!("{}; its tunnels keep using {address}", chain(&error));
                    address
                }
            },
        };
        config.set_remote(at, address).map_err(|why| NameError::Unfit {
            name,
            peer: config.peers[at].name.clone(),
            address,
            why,
        })?;
    }
    Ok(())
}

/// The first answer that may be used; if none may, the first of all. `answers` must not be empty.
fn preferred(config: &Config, at: usize, answers: &[IpAddr]) -> IpAddr {
    let fit = answers.iter().find(|answer| config.against_remote(at, **answer).is_none());
    *fit.unwrap_or(&answers[0])
}

/// The remote address that the peer's existing tunnels use.
fn in_use(peer: &Peer) -> Option<IpAddr> {
    let mut seen = peer.tunnels.iter().filter_map(|tunnel| kernel::peers(tunnel.name.as_str()).ok()).flatten();
    seen.find_map(|seen| seen.endpoint).map(|endpoint| endpoint.ip()).filter(|address| is_family(*address, peer))
}

fn is_family(address: IpAddr, peer: &Peer) -> bool {
    address.is_ipv4() == peer.local_endpoint.is_ipv4()
}

/// The addresses of a name that are of `peer`'s family, in the resolver's order. At least one.
fn addresses(name: &str, peer: &Peer) -> Result<Vec<IpAddr>, NameError> {
    let found = (name, 0).to_socket_addrs().map_err(|source| NameError::Unresolved {
        name: name.to_owned(),
        peer: peer.name.clone(),
        source,
    })?;
    fitting(name, peer, found.map(|found| found.ip()).collect())
}

fn fitting(name: &str, peer: &Peer, found: Vec<IpAddr>) -> Result<Vec<IpAddr>, NameError> {
    let mut fit: Vec<IpAddr> = found.iter().copied().filter(|address| is_family(*address, peer)).collect();
    fit.dedup();
    if fit.is_empty() {
        let family = if peer.local_endpoint.is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(NameError::OtherFamily { name: name.to_owned(), peer: peer.name.clone(), family, found });
    }
    Ok(fit)
}

/// A remote site whose address has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressChange {
    peer: usize,
    address: IpAddr,
}

/// Follows the host names of a running site.
#[derive(Debug, Default)]
pub struct NameWatcher {
    looked: BTreeMap<usize, Instant>,
    /// Since when nothing is heard from a site at the address in use.
    lost: BTreeMap<usize, Instant>,
    /// The last warning about each peer.
    logged: BTreeMap<usize, LogOnce>,
}

impl NameWatcher {
    /// Waits until a name has another address.
    pub async fn address_change(&mut self, site: &Site) -> AddressChange {
        if site.config.peers.iter().all(|peer| peer.remote_name.is_none()) {
            return std::future::pending().await;
        }
        let Ok(view) = View::open(&site.paths.pins) else { return std::future::pending().await };
        loop {
            tokio::time::sleep(LOOK).await;
            for (at, peer) in site.config.peers.iter().enumerate() {
                let Some(name) = peer.remote_name.clone() else { continue };
                let live = view.peers().get(at).map_or(0, |peer| peer.live);
                let mut tunnels = site.plan.tunnels.iter().filter(|tunnel| tunnel.peer == at);
                let is_down = tunnels.any(|tunnel| live >> tunnel.slot & 1 == 0);
                if is_lost(&view, site, at, live) {
                    self.lost.entry(at).or_insert_with(Instant::now);
                } else {
                    self.lost.remove(&at);
                }
                let pause = if is_down || self.lost.contains_key(&at) { WHILE_DOWN } else { EVERY };
                let next = self.lost.get(&at).is_some_and(|since| since.elapsed() >= EACH);
                let looked = *self.looked.entry(at).or_insert_with(Instant::now);
                if looked.elapsed() < pause {
                    continue;
                }
                let asked = peer.clone();
                let answer = tokio::task::spawn_blocking(move || addresses(&name, &asked)).await;
                self.looked.insert(at, Instant::now());
                match answer {
                    Ok(Ok(answers)) => {
                        let may = |answer: &IpAddr| site.config.against_remote(at, *answer).is_none();
                        let fit: Vec<IpAddr> = answers.iter().copied().filter(may).collect();
                        let lost = self.lost.contains_key(&at);
                        match (other_address(peer.remote_endpoint, &fit, lost, next), fit.first().or(answers.first())) {
                            (Some(address), _) => return AddressChange { peer: at, address },
                            (None, Some(answer)) if fit.is_empty() => {
                                let why = site.config.against_remote(at, *answer).unwrap_or_default();
                                self.warn_keeping_address(at, &format!("{} is at {answer} now, {why}", peer.name));
                            }
                            (None, Some(answer)) if !fit.contains(&peer.remote_endpoint) => {
                                let (name, now) = (&peer.name, peer.remote_endpoint);
                                let text = format!("{name} is at {answer} now, but still answers at {now}");
                                self.warn_keeping_address(at, &text);
                            }
                            _ => {
                                self.logged.remove(&at);
                            }
                        }
                    }
                    Ok(Err(error)) => self.warn_keeping_address(at, &chain(&error)),
                    Err(error) => self.warn_keeping_address(at, &error.to_string()),
                }
            }
        }
    }

    fn warn_keeping_address(&mut self, peer: usize, text: &str) {
        let log = self.logged.entry(peer).or_default();
        log.warn(format!("{text}; the address known so far stays in use"));
    }

    /// Changes a site's tunnels to its new address, one at a time.
    pub async fn follow(&mut self, moved: AddressChange, site: &mut Site, health: &mut Health) {
        let AddressChange { peer, address } = moved;
        self.lost.remove(&peer);
        let mut config = site.config.clone();
        if let Err(why) = config.set_remote(peer, address) {
            self.warn_keeping_address(peer, &format!("{} is {address} now, {why}", site.config.peers[peer].name));
            return;
        }
        match move_endpoint(&config, moved, site, health).await {
            Ok(()) => {
                let name = config.peers[peer].remote_name.as_deref().unwrap_or_default();
                tracing::info!("{name} of {} is {address} now", config.peers[peer].name);
                site.config = config;
            }
            Err(error) => self.warn_keeping_address(peer, &chain(&error)),
        }
    }
}

/// The address to use instead of `now`, if any. An address at which the site answers stays, also if it is no answer of
/// the name any more; it is `lost` when nothing is heard from there. An address that is still among the answers stays too,
/// because a name may have several. With `next`, returns the next one of them.
fn other_address(now: IpAddr, answers: &[IpAddr], lost: bool, next: bool) -> Option<IpAddr> {
    if !answers.contains(&now) {
        return answers.first().copied().filter(|_| lost);
    }
    // Name servers rotate the order of answers, so go by value.
    let least =
        |above: bool| answers.iter().copied().filter(|answer| *answer != now && (!above || *answer > now)).min();
    if next { least(true).or_else(|| least(false)) } else { None }
}

/// Whether nothing is heard from a site: none of its tunnels is up, or none has ever had an answer or a handshake.
fn is_lost(view: &View, site: &Site, peer: usize, live: u32) -> bool {
    let mut tunnels = site.plan.tunnels.iter().filter(|tunnel| tunnel.peer == peer);
    live == 0
        || tunnels.all(|tunnel| {
            let health = || view.health(tunnel.id());
            health().is_some_and(|health| health.rtt_us.get() == 0 && health.last_handshake_ns.get() == 0)
                && kernel::last_handshake(tunnel.name.as_str()).is_none()
        })
}

async fn move_endpoint(
    config: &Config,
    moved: AddressChange,
    site: &mut Site,
    health: &mut Health,
) -> Result<(), SessionError> {
    // Changes the plan in force instead of planning again: tunnels may have keys that the configuration does not name
    // yet.
    let mut plan = site.plan.clone();
    for tunnel in plan.tunnels.iter_mut().filter(|tunnel| tunnel.peer == moved.peer) {
        tunnel.remote_endpoint.set_ip(moved.address);
    }
    reconcile::reconcile(site, config, &mut plan, health, Silence::Allowed).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::config;

    fn named(name: &str) -> Config {
        let mut config = config(1);
        config.peers[0].remote_name = Some(name.to_owned());
        config
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_that_is_still_an_answer_stays() {
        assert_eq!(other_address(ip("10.5.6.7"), &[ip("10.5.6.8"), ip("10.5.6.7")], true, false), None);
        assert_eq!(other_address(ip("10.5.6.7"), &[ip("10.5.6.8"), ip("10.5.6.9")], true, false), Some(ip("10.5.6.8")));
        assert_eq!(other_address(ip("10.5.6.7"), &[], true, true), None);
    }

    #[test]
    fn an_address_at_which_the_site_answers_stays_without_being_an_answer() {
        assert_eq!(other_address(ip("10.5.6.7"), &[ip("10.5.6.8")], false, false), None);
        assert_eq!(other_address(ip("10.5.6.7"), &[ip("10.5.6.8")], true, false), Some(ip("10.5.6.8")));
    }

    #[test]
    fn where_nothing_answers_each_address_gets_its_turn() {
        let mut answers = ["10.5.6.9", "10.5.6.7", "10.5.6.8"].map(ip);
        let mut now = ip("10.5.6.7");
        for expected in ["10.5.6.8", "10.5.6.9", "10.5.6.7", "10.5.6.8"] {
            now = other_address(now, &answers, true, true).unwrap();
            assert_eq!(now, ip(expected));
            answers.rotate_left(1);
        }
        assert_eq!(other_address(now, &[now], true, true), None, "there is no other");
    }

    #[test]
    fn only_addresses_of_the_local_family_will_do() {
        let config = named("site-b.example");
        let peer = &config.peers[0];
        let fit = fitting("site-b.example", peer, vec![ip("fd00::1"), ip("10.5.6.8")]).unwrap();
        assert_eq!(fit, [ip("10.5.6.8")]);
        let refused = fitting("site-b.example", peer, vec![ip("fd00::1")]).unwrap_err().to_string();
        assert!(refused.contains("has no IPv4 address") && refused.contains("fd00::1"), "{refused}");
    }

    #[test]
    fn what_is_known_is_not_asked_for_and_what_does_not_fit_is_reported() {
        let known = named("nobody.invalid");
        let mut config = named("nobody.invalid");
        config.peers[0].remote_endpoint = ip("0.0.0.0");
        resolve(&mut config, Some(&known)).unwrap();
        assert_eq!(config.peers[0].remote_endpoint, ip("10.5.6.7"));
        // Every host resolves its own name to its loopback address, and no name server is asked.
        let refused = resolve(&mut named("localhost"), None).unwrap_err().to_string();
        assert!(refused.contains("127.0.0.1") && refused.contains("never leaves the host"), "{refused}");
        let mut steered = named("site-b.example");
        assert!(steered.set_remote(0, ip("10.20.0.1")).unwrap_err().contains("10.20.0.0/16"));
        assert!(steered.set_remote(0, ip("10.2.3.4")).is_err(), "this site's own");
        assert!(steered.set_remote(0, ip("fd00::1")).is_err(), "another family");
        assert_eq!(steered.set_remote(0, ip("10.5.6.9")), Ok(()));
    }
}
