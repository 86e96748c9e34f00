//! Numbered traffic between the LAN hosts, both ways. The same thread watches which tunnel each datagram takes, which
//! tunnels are up, and what is on the wires.
//!
//! One thread does everything, 50 times a second, because every process and every wake-up costs time in the simulation.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ecmpvpn::dataplane::{Pins, View};
use ecmpvpn_common::flow::{FlowKey, IPV4, IPV6};
use ecmpvpn_common::layout::{TunnelId, settings_flags};
use lab::netns::Netns;
use lab::sites::Lab;

use crate::ledger::{Arrival, Counts, Ledger};
use lab::clear::Watch;

/// Number of flows in each direction. Every fourth is IPv6.
pub const FLOWS: usize = 16;
/// How many of them send in each tick.
const AT_ONCE: usize = 4;
/// Time between two ticks.
const TICK: Duration = Duration::from_millis(20);
/// UDP payload, bytes.
const PAYLOAD: usize = 64;
/// Destination port of all datagrams.
const PORT: u16 = 9_000;

/// A broken invariant.
#[derive(Clone, Debug)]
pub struct Broken {
    /// When the breakage was seen, counted from the first datagram.
    pub at: Duration,
    pub invariant: Invariant,
    pub description: String,
}

/// What must always hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invariant {
    /// Nothing leaves in the clear.
    Clear,
    /// Packets are reordered only by moves that are counted.
    Order,
    /// Traffic flows again in time.
    Recovery,
    /// `down` leaves the host as it was.
    Restored,
}

impl Invariant {
    pub fn name(self) -> &'static str {
        match self {
            Self::Clear => "nothing in the clear",
            Self::Order => "nothing reordered but by counted moves",
            Self::Recovery => "recovery within bounds",
            Self::Restored => "host restored",
        }
    }
}

/// The maps of a site that is up.
struct Maps {
    view: View,
    /// Index of each flow's bucket among the buckets of the site.
    buckets: [u32; FLOWS],
    live: u32,
}

/// State that the thread of the traffic and the thread of the faults share.
pub struct State {
    pub ledgers: [Ledger; 2],
    maps: [Option<Maps>; 2],
    /// Broken invariants that are not yet reported.
    pub broken: Vec<Broken>,
    /// Changes of the set of tunnels that are up: when, at which site, and a bit for each tunnel that is up.
    pub lives: Vec<(Duration, usize, u32)>,
    /// Until then the links have different delays. A bond that moves a tunnel to another link may then reorder its
    /// packets.
    pub unequal_until: Duration,
    /// Datagrams that were overtaken for that reason.
    pub by_bond: u64,
    /// Number of frames in the clear.
    pub in_the_clear: u64,
}

/// One direction's sockets.
struct Direction {
    senders: Vec<UdpSocket>,
    receivers: [UdpSocket; 2],
    /// Source and destination of each flow.
    ends: Vec<(SocketAddr, SocketAddr)>,
}

/// Traffic that flows until [`Exchange::stop`].
pub struct Exchange {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    began: Instant,
    thread: JoinHandle<Result<()>>,
}

impl Exchange {
    /// Starts the traffic. The source ports of each direction count up from its entry in `first_ports`.
    pub fn begin(lab: &Lab, first_ports: [u16; 2], watch: Arc<Watch>) -> Result<Self> {
        let directions = [Direction::open(lab, 0, first_ports[0])?, Direction::open(lab, 1, first_ports[1])?];
        let state = State {
            ledgers: [Ledger::new(0, FLOWS), Ledger::new(1, FLOWS)],
            maps: [None, None],
            broken: Vec::new(),
            lives: Vec::new(),
            unequal_until: Duration::ZERO,
            by_bond: 0,
            in_the_clear: 0,
        };
        let (state, stop) = (Arc::new(Mutex::new(state)), Arc::new(AtomicBool::new(false)));
        let ends = [directions[0].ends.clone(), directions[1].ends.clone()];
        let began = Instant::now();
        let thread = {
            let (state, stop) = (Arc::clone(&state), Arc::clone(&stop));
            thread::spawn(move || run(&directions, &watch, &state, &stop, began))
        };
        let exchange = Self { state, stop, began, thread };
        for (site, ends) in ends.iter().enumerate() {
            exchange.up(site, &lab.sites[site].name, ends)?;
        }
        Ok(exchange)
    }

    /// Time since the first datagram.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Locks the state. The traffic stands still until the guard is dropped.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panicked")
    }

    fn up(&self, site: usize, name: &str, ends: &[(SocketAddr, SocketAddr)]) -> Result<()> {
        let maps = Maps::open(name, ends)?;
        self.state().maps[site] = Some(maps);
        Ok(())
    }

    /// Opens the maps of a site that has come up. They may be new ones.
    pub fn site_is_up(&self, lab: &Lab, site: usize, first_port: u16) -> Result<()> {
        let ends = ends(lab, site, first_port);
        self.up(site, &lab.sites[site].name, &ends)
    }

    /// Closes the maps of a site that will be taken down.
    pub fn site_goes_down(&self, site: usize) {
        let mut state = self.state();
        state.maps[site] = None;
        state.ledgers[site].forget_tunnels();
    }

    /// Ends the traffic and returns its counts by sender.
    pub fn stop(self) -> Result<[Counts; 2]> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("traffic does not panic").context("numbered traffic")?;
        let state = self.state.lock().expect("nobody panicked");
        Ok([state.ledgers[0].counts(), state.ledgers[1].counts()])
    }
}

impl State {
    /// Moves onto each tunnel that a site's programs have counted, because another tunnel went down, or back to the
    /// home tunnel. `None` while the site is down.
    pub fn counted_moves(&self, site: usize) -> Result<Option<Vec<u64>>> {
        let Some(maps) = &self.maps[site] else { return Ok(None) };
        let slots = maps.view.peers().first().map_or(0, |peer| peer.tunnels);
        let moves = |slot| {
            let counters = maps.view.tunnel_counters(TunnelId::new(0, slot))?;
            anyhow::Ok(counters.failover_moves + counters.flowlet_moves)
        };
        (0..slots).map(moves).collect::<Result<_>>().map(Some)
    }
}

impl Maps {
    fn open(site: &str, ends: &[(SocketAddr, SocketAddr)]) -> Result<Self> {
        let view = View::open(&Pins::of(site))?;
        let settings = view.settings();
        let symmetric = settings.flags & settings_flags::SYMMETRIC != 0;
        let peer = view.peer(0).context("a site without a peer")?;
        let bucket = |(source, destination): &(SocketAddr, SocketAddr)| {
            let hash = key(*source, *destination).hash(settings.seed, settings.hash_fields, symmetric);
            // The lower half of the hash chooses the bucket, as in `decide::choose`.
            let low = u32::try_from(hash & u64::from(u32::MAX)).expect("32 bits");
            peer.bucket_base + (low & peer.bucket_mask)
        };
        let mut buckets = [0; FLOWS];
        for (place, ends) in buckets.iter_mut().zip(ends) {
            *place = bucket(ends);
        }
        let live = peer.live.get();
        Ok(Self { view, buckets, live })
    }
}

/// The flow key as the steering program builds it.
fn key(source: SocketAddr, destination: SocketAddr) -> FlowKey {
    let words = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => [u32::from_ne_bytes(ip.octets()), 0, 0, 0],
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            [0, 4, 8, 12].map(|at| u32::from_ne_bytes(octets[at..at + 4].try_into().expect("four bytes")))
        }
    };
    FlowKey {
        src: words(source.ip()),
        dst: words(destination.ip()),
        sport: source.port().to_be(),
        dport: destination.port().to_be(),
        protocol: 17,
        family: if source.is_ipv4() { IPV4 } else { IPV6 },
        ..FlowKey::default()
    }
}

/// Source and destination of each flow of a site.
fn ends(lab: &Lab, site: usize, first_port: u16) -> Vec<(SocketAddr, SocketAddr)> {
    let (here, there) = (&lab.sites[site], &lab.sites[1 - site]);
    let flow = |number: u16| {
        let (from, to) =
            if number % 4 == 3 { (here.host_v6(), there.host_v6()) } else { (here.host_v4(), there.host_v4()) };
        (SocketAddr::new(from, first_port + number), SocketAddr::new(to, PORT))
    };
    (0..u16::try_from(FLOWS).expect("few")).map(flow).collect()
}

impl Direction {
    fn open(lab: &Lab, site: usize, first_port: u16) -> Result<Self> {
        let socket = |ns: &Netns, address: SocketAddr| {
            let opened = ns.run(|| {
                let socket = UdpSocket::bind(address)?;
                socket.set_nonblocking(true)?;
                Ok::<_, std::io::Error>(socket)
            });
            opened.with_context(|| format!("binding a socket to {address} in {}", ns.name()))
        };
        let (here, there) = (&lab.sites[site], &lab.sites[1 - site]);
        let ends = ends(lab, site, first_port);
        let senders = ends.iter().map(|(source, _)| socket(&here.host, *source)).collect::<Result<_>>()?;
        let receiver = |ip| socket(&there.host, SocketAddr::new(ip, PORT));
        Ok(Self { senders, receivers: [receiver(there.host_v4())?, receiver(there.host_v6())?], ends })
    }
}

fn run(
    directions: &[Direction; 2],
    watch: &Watch,
    state: &Mutex<State>,
    stop: &AtomicBool,
    began: Instant,
) -> Result<()> {
    let mut due = began;
    for round in 0.. {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        due += TICK;
        let mut state = state.lock().expect("nobody panicked");
        state.look(watch, began.elapsed())?;
        for (site, direction) in directions.iter().enumerate() {
            state.receive(site, direction, began.elapsed())?;
        }
        if stop.load(Ordering::Acquire) {
            return Ok(());
        }
        for (site, direction) in directions.iter().enumerate() {
            for flow in (0..AT_ONCE).map(|which| (round * AT_ONCE + which) % FLOWS) {
                state.send(site, direction, flow, began.elapsed());
            }
        }
    }
    Ok(())
}

impl State {
    /// Checks what is on the wires and which tunnels are up.
    fn look(&mut self, watch: &Watch, now: Duration) -> Result<()> {
        while let Some(description) = watch.next()? {
            self.in_the_clear += 1;
            if self.in_the_clear == 1 {
                self.broken.push(Broken {
                    at: now,
                    invariant: Invariant::Clear,
                    description: format!("on a wire: {description}"),
                });
            }
        }
        for (site, maps) in self.maps.iter_mut().enumerate() {
            let Some(maps) = maps else { continue };
            let live = maps.view.peer(0).map_or(0, |peer| peer.live.get());
            if live != maps.live {
                maps.live = live;
                self.lives.push((now, site, live));
            }
        }
        Ok(())
    }

    fn send(&mut self, site: usize, direction: &Direction, flow: usize, now: Duration) {
        let number = self.ledgers[site].next_number(flow);
        let mut datagram = [0x5a; PAYLOAD];
        datagram[..4].copy_from_slice(&u32::try_from(flow).expect("few").to_be_bytes());
        datagram[4..8].copy_from_slice(&number.to_be_bytes());
        let (_, destination) = direction.ends[flow];
        // A datagram that cannot be sent counts as lost.
        let _ = direction.senders[flow].send_to(&datagram, destination);
        // When the call returns, the packet has passed the steering program.
        let taken = self.maps[site].as_ref().and_then(|maps| Some(maps.view.bucket(maps.buckets[flow])?.0));
        self.ledgers[site].sent(flow, now, taken);
    }

    fn receive(&mut self, site: usize, direction: &Direction, now: Duration) -> Result<()> {
        let mut buffer = [0; PAYLOAD + 1];
        for receiver in &direction.receivers {
            loop {
                match receiver.recv(&mut buffer) {
                    Ok(PAYLOAD) => self.on_arrival(site, &buffer, now),
                    Ok(length) => anyhow::bail!("a datagram of {PAYLOAD} bytes came as {length}"),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error).context("receiving datagrams"),
                }
            }
        }
        Ok(())
    }

    fn on_arrival(&mut self, site: usize, datagram: &[u8], now: Duration) {
        let word = |at: usize| u32::from_be_bytes(datagram[at..at + 4].try_into().expect("four bytes"));
        let (flow, number) = (word(0), word(4));
        let description = match self.ledgers[site].on_arrival(flow as usize, number, now) {
            Arrival::InOrder | Arrival::OvertakenElsewhere => return,
            Arrival::Overtaken { .. } if now < self.unequal_until => {
                self.by_bond += 1;
                return;
            }
            Arrival::Overtaken { by, tunnel } => {
                format!("datagram {number} came after {by}, both sent to tunnel {tunnel}")
            }
            Arrival::Repeated => format!("datagram {number} came twice"),
            Arrival::Unknown => format!("datagram {number} was never sent, or long ago"),
        };
        let description = format!("flow {flow} from {}: {description}", crate::event::SITES[site]);
        self.broken.push(Broken { at: now, invariant: Invariant::Order, description });
    }
}
