//! Tests attaching, steering of live packets, failover, reading and removing, all through pins.
//!
//! ```text
//! ecmp0 (TUN) 10.100.0.1, fd00:100::1; 10.20.0.0/16 and fd00:20::/48 are routed to it
//!   | egress program
//! wg0, wg1, wg2 (TUN): the test reads their packets from their descriptors
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use ecmpvpn::config::InterfaceName;
use ecmpvpn::dataplane::{self, DataplaneError, Device, Hook, Loaded, Options, Pins, View};
use ecmpvpn::plan::SteeringTable;
use ecmpvpn_common::layout::{BUCKETS_PER_PEER, TunnelId, programs};
use lab::bpffs::Bpffs;
use lab::netns::Netns;

use super::build::{UDP, udp, v4};
use super::rig::{ifindexes, table};

const TUNNELS: [&str; 3] = ["wg0", "wg1", "wg2"];
const FLOWS: u16 = 60;

/// The tunnel that each source port uses.
type Flows = BTreeMap<u16, usize>;

/// A TUN device. The test reads the packets that the kernel sends to it.
struct Tun(File);

impl Tun {
    fn open(name: &str) -> Result<Self> {
        // SAFETY: an ifreq consists of integers, for which zero is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: the kernel reads and writes one ifreq, which lives until the call returns.
        let status = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        ensure!(status == 0, "making TUN device {name}: {}", io::Error::last_os_error());
        Ok(Self(file))
    }

    /// All packets that were sent to it since the last call.
    fn packets(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut packets = Vec::new();
        let mut buffer = [0; 8192];
        loop {
            match self.0.read(&mut buffer) {
                Ok(length) => packets.push(buffer[..length].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(packets),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A namespace with the devices, and pins in a separate bpffs.
pub struct Stage {
    steering: Tun,
    tunnels: Vec<Tun>,
    table: SteeringTable,
    device: Device,
    ifindexes: BTreeMap<InterfaceName, u32>,
    pub pins: Pins,
    pub ns: Netns,
    bpffs: Bpffs,
}

impl Stage {
    pub fn new() -> Result<Self> {
        let ns = Netns::new("bpf")?;
        let bpffs = Bpffs::new()?;
        let mut table = table(5);
        table.peers.truncate(1);
        let (steering, tunnels) = ns.run(|| -> Result<_> {
            Ok((Tun::open("ecmp0")?, TUNNELS.iter().map(|name| Tun::open(name)).collect::<Result<Vec<_>>>()?))
        })?;
        for device in ["ecmp0", "wg0", "wg1", "wg2"] {
            // Without a link-local address, the kernel sends no router solicitations that would be among the packets.
            ns.sysctl(&format!("net/ipv6/conf/{device}/addr_gen_mode"), "1")?;
            ns.ip(&format!("link set {device} up"))?;
        }
        ns.ip("address add 10.100.0.1/32 dev ecmp0")?;
        ns.ip("address add fd00:100::1/128 dev ecmp0 nodad")?;
        ns.ip("route add 10.20.0.0/16 dev ecmp0 src 10.100.0.1")?;
        ns.ip("route add fd00:20::/48 dev ecmp0 src fd00:100::1")?;
        let name = |name: &str| InterfaceName::new(name).expect("a valid name");
        let device = Device { name: name("ecmp0"), ifindex: index(&ns, "ecmp0")? };
        let ifindexes: Result<_> = TUNNELS.iter().map(|tunnel| Ok((name(tunnel), index(&ns, tunnel)?))).collect();
        let pins = Pins::below(&bpffs.root(), "site.a");
        Ok(Self { steering, tunnels, table, device, ifindexes: ifindexes?, pins, ns, bpffs })
    }

    pub fn start(&self, hook: Option<Hook>) -> Result<Hook, DataplaneError> {
        let options = Options { hook, ..Options::default() };
        self.ns.run(|| dataplane::start(&self.pins, &self.table, &self.device, &self.ifindexes, &options))
    }

    pub fn remove(&self) -> Result<(), DataplaneError> {
        self.ns.run(|| dataplane::remove(&self.pins))
    }

    /// Sends one datagram of each flow. Returns the tunnel that each source port was seen on, and each tunnel's packets
    /// and bytes.
    fn send(&mut self, to: &str) -> Result<(Flows, [(u64, u64); 3])> {
        self.ns.run(|| -> io::Result<()> {
            let any = if to.starts_with('[') { "[::]" } else { "0.0.0.0" };
            for flow in 0..FLOWS {
                UdpSocket::bind(format!("{any}:{}", 20_000 + flow))?.send_to(&[7; 100], to)?;
            }
            Ok(())
        })?;
        let mut seen = BTreeMap::new();
        let mut counts = [(0, 0); 3];
        for (tunnel, (device, count)) in self.tunnels.iter_mut().zip(&mut counts).enumerate() {
            for packet in device.packets()? {
                let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
                let port = u16::from_be_bytes([packet[header], packet[header + 1]]);
                ensure!(packet.len() == header + 108, "not one of ours: {packet:02x?}");
                ensure!(seen.insert(port, tunnel).is_none(), "a packet of port {port} came twice");
                *count = (count.0 + 1, count.1 + packet.len() as u64);
            }
        }
        Ok((seen, counts))
    }

    /// Number of programs that are attached to the devices by tcx.
    fn tcx_programs(&self) -> Result<usize> {
        self.ns.run(|| {
            let mut count = SchedClassifier::query_tcx("ecmp0", TcAttachType::Egress)?.1.len();
            for tunnel in TUNNELS {
                count += SchedClassifier::query_tcx(tunnel, TcAttachType::Ingress)?.1.len();
            }
            Ok(count)
        })
    }
}

pub fn index(ns: &Netns, device: &str) -> Result<u32> {
    let shown = ns.query("ip", &format!("-o link show dev {device}"))?;
    Ok(shown.split(':').next().context("no index")?.trim().parse()?)
}

pub fn steers_by_tcx() -> Result<()> {
    steers(Hook::Tcx, None)
}

pub fn steers_by_clsact() -> Result<()> {
    steers(Hook::Clsact, Some(Hook::Clsact))
}

fn steers(expected: Hook, asked: Option<Hook>) -> Result<()> {
    let mut stage = Stage::new()?;
    let before = (stage.ns.query("tc", "qdisc show")?, entries(&stage)?);
    ensure!(stage.start(asked)? == expected);

    // Everything that `start` held in this process is closed. What is left works through its pins.
    let view = View::open(&stage.pins)?;
    ensure!(view.hook() == expected);
    ensure!(matches!(stage.start(asked), Err(DataplaneError::AlreadyThere { .. })));

    let (flows, counts) = stage.send("10.20.0.9:4000")?;
    ensure!(flows.len() == usize::from(FLOWS) && counts.iter().all(|(packets, _)| *packets > 3), "{flows:?}");
    let (again, _) = stage.send("10.20.0.9:4000")?;
    ensure!(again == flows, "flows moved by themselves");
    let (flows6, counts6) = stage.send("[fd00:20::9]:4000")?;
    ensure!(flows6.len() == usize::from(FLOWS), "{flows6:?}");
    for (tunnel, (count, count6)) in view.tunnels()?.iter().zip(counts.iter().zip(counts6)) {
        let sent = (2 * count.0 + count6.0, 2 * count.1 + count6.1);
        ensure!((tunnel.counters.tx_packets, tunnel.counters.tx_bytes) == sent, "{tunnel:?} carried {sent:?}");
        ensure!(tunnel.live && tunnel.counters.failover_moves == 0, "{tunnel:?}");
    }

    fails_over(&mut stage, &view, &flows)?;
    receives(&mut stage, &view)?;

    drop(view);
    stage.remove()?;
    ensure!(matches!(View::open(&stage.pins), Err(DataplaneError::NotRunning { .. })));
    let after = (stage.ns.query("tc", "qdisc show")?, entries(&stage)?);
    ensure!(before == after, "before {before:?}, after {after:?}");
    if expected == Hook::Tcx {
        // The kernel frees links a moment after the last pin is removed.
        let since = Instant::now();
        while stage.tcx_programs()? != 0 {
            ensure!(since.elapsed() < Duration::from_secs(30), "programs are still attached");
            sleep(Duration::from_millis(10));
        }
    }
    stage.remove().context("removing twice is no error")?;
    let (flows, _) = stage.send("10.20.0.9:4000")?;
    ensure!(flows.is_empty(), "it still steers: {flows:?}");
    Ok(())
}

/// One write moves the flows of a dead tunnel, and no others. They return when the tunnel is live again.
fn fails_over(stage: &mut Stage, view: &View, flows: &Flows) -> Result<()> {
    let target = "10.20.0.9:4000";
    ensure!(view.set_live(TunnelId::new(0, 1), false) == Some(true));
    let (without, _) = stage.send(target)?;
    ensure!(without.len() == flows.len(), "flows were lost: {without:?}");
    for (port, tunnel) in flows {
        let now = without[port];
        ensure!(if *tunnel == 1 { now != 1 } else { now == *tunnel }, "port {port} went from {tunnel} to {now}");
    }
    let moved = flows.values().filter(|tunnel| **tunnel == 1).count() as u64;
    let count = |view: &View| -> Result<u64> { Ok(view.tunnels()?.iter().map(|t| t.counters.failover_moves).sum()) };
    ensure!(count(view)? == moved, "{} moves of {moved}", count(view)?);
    ensure!(view.set_live(TunnelId::new(0, 1), true) == Some(false));
    // Each flow returns at its next pause, so that no packet is reordered.
    let gap = &view.peer(0).context("the peer")?.gap_ns;
    gap.set(u32::MAX);
    ensure!(stage.send(target)?.0 == without, "flows returned without a pause");
    gap.set(1);
    // A clock that ticks only every few milliseconds measures the pauses.
    sleep(Duration::from_millis(50));
    ensure!(stage.send(target)?.0 == *flows, "flows did not return");
    ensure!(count(view)? == 2 * moved);
    let held: u32 = view.tunnels()?.iter().map(|tunnel| tunnel.buckets).sum();
    ensure!(held == BUCKETS_PER_PEER, "{held} buckets");

    stage.steering.packets()?;
    for slot in 0..3 {
        view.set_live(TunnelId::new(0, slot), false);
    }
    ensure!(stage.send(target)?.0.is_empty());
    ensure!(stage.steering.packets()?.len() == usize::from(FLOWS), "what is not steered is the steering device's");
    let reasons = view.reasons()?;
    ensure!(reasons.dropped.contains(&("no_live_tunnel", u64::from(FLOWS))), "{reasons:?}");
    for slot in 0..3 {
        view.set_live(TunnelId::new(0, slot), true);
    }
    ensure!(
        view.set_live(TunnelId::new(0, 3), true).is_none() && view.set_live(TunnelId::new(1, 0), true).is_none(),
        "no such tunnels"
    );
    Ok(())
}

/// A packet from a tunnel is counted for that tunnel and reaches the host.
fn receives(stage: &mut Stage, view: &View) -> Result<()> {
    let server = stage.ns.run(|| UdpSocket::bind("10.100.0.1:5000"))?;
    server.set_read_timeout(Some(Duration::from_secs(30)))?;
    // The route back leads to the steering device, so the reverse path filter would drop the packets.
    stage.ns.sysctl("net/ipv4/conf/wg2/rp_filter", "0")?;
    stage.ns.sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    let packet = checksummed(v4("10.20.0.9", "10.100.0.1", UDP, &udp(4000, 5000, 50)));
    for _ in 0..5 {
        stage.tunnels[2].0.write_all(&packet)?;
        ensure!(server.recv(&mut [0; 100])? == 50);
    }
    for tunnel in view.tunnels()? {
        let expected = if tunnel.name == "wg2" { (5, 5 * packet.len() as u64) } else { (0, 0) };
        ensure!((tunnel.counters.rx_packets, tunnel.counters.rx_bytes) == expected, "{tunnel:?}");
    }
    Ok(())
}

/// Fills in the checksum of the IPv4 header and the UDP length. UDP needs no checksum.
fn checksummed(mut packet: Vec<u8>) -> Vec<u8> {
    let length = u16::try_from(packet.len() - 20).expect("a short packet");
    packet[24..26].copy_from_slice(&length.to_be_bytes());
    let sum: u32 = packet[..20].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded twice");
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Names of all entries of the bpffs.
fn entries(stage: &Stage) -> Result<Vec<String>> {
    let entries = fs::read_dir(stage.bpffs.path())?;
    Ok(entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<_>>()?)
}

pub fn a_failed_start_leaves_nothing() -> Result<()> {
    for hook in [None, Some(Hook::Clsact)] {
        let mut stage = Stage::new()?;
        let before = (stage.ns.query("tc", "qdisc show")?, entries(&stage)?);
        // The start fails after the maps are filled and the first two tunnels are attached: the third one is missing.
        drop(stage.tunnels.pop());
        let error = stage.start(hook).err().context("it started")?;
        ensure!(error.to_string().contains("wg2"), "{error}");
        let after = (stage.ns.query("tc", "qdisc show")?, entries(&stage)?);
        ensure!(before.1 == after.1, "pins are left: {after:?}");
        ensure!(!after.0.contains("clsact"), "{}", after.0);
    }
    Ok(())
}

pub fn bad_tables_are_refused() -> Result<()> {
    let stage = Stage::new()?;
    let before = entries(&stage)?;
    let start = |table: &SteeringTable, tunnels: &BTreeMap<InterfaceName, u32>| {
        let error = stage.ns.run(|| dataplane::start(&stage.pins, table, &stage.device, tunnels, &Options::default()));
        error.err().map(|error| error.to_string()).context("it started")
    };
    let mut many = stage.table.clone();
    many.peers = vec![many.peers[0].clone(); 65];
    ensure!(start(&many, &stage.ifindexes)?.contains("65 peers"));
    let mut wide = stage.table.clone();
    wide.peers[0].tunnels = vec![wide.peers[0].tunnels[0].clone(); 33];
    ensure!(start(&wide, &stage.ifindexes)?.contains("33 tunnels"));
    ensure!(start(&stage.table, &BTreeMap::new())?.contains("wg0"));
    ensure!(entries(&stage)? == before);
    Ok(())
}

/// A table of the greatest size can be loaded, and the last tunnel of its last peer is found.
pub fn the_largest_table_fits() -> Result<()> {
    use super::rig::{Outcome, Rig};

    let name = |peer: usize, slot: usize| InterfaceName::new(&format!("wg{peer}x{slot}")).expect("a valid name");
    let mut table = table(9);
    let first = table.peers[0].clone();
    table.peers.clear();
    for number in 0..64 {
        let mut peer = first.clone();
        peer.prefixes = vec![format!("10.{number}.0.0/16").parse()?, format!("fd00:{number:x}::/32").parse()?];
        peer.tunnels = (0..32).map(|slot| (name(number, slot), Some(1))).collect();
        table.peers.push(peer);
    }
    let mut rig = Rig::new(&table, &Options::default())?;
    let mut last = 0;
    for port in 0..2_000 {
        match rig.egress(&v4("10.1.0.1", "10.63.0.1", UDP, &udp(port, 1, 0)), (0, 0))? {
            Outcome::Steered { tunnel, bucket, how } => {
                ensure!(tunnel / 32 == 63 && bucket / BUCKETS_PER_PEER == 63 && how == 0, "{tunnel} {bucket}");
                last = last.max(tunnel);
            }
            refused @ Outcome::Refused(_) => anyhow::bail!("{refused:?}"),
        }
    }
    ensure!(last == 64 * 32 - 1, "{last}");
    Ok(())
}

/// Masked log statements cost nothing, because the verifier removes them.
pub fn masked_logging_is_pruned() -> Result<()> {
    let size = |log| -> Result<u32> {
        let table = table(1);
        let mut loaded = Loaded::new(&table, 1, &ifindexes(&table), &Options { log, ..Options::default() })?;
        let info = loaded.program_mut(programs::EGRESS)?.info()?;
        println!("the verifier looked at {} instructions", info.verified_instruction_count().unwrap_or(0));
        info.size_translated().context("the kernel does not say the size")
    };
    let (masked, logging) = (size(false)?, size(true)?);
    println!("egress program: {masked} bytes, with logging {logging}");
    ensure!(masked + 300 < logging, "{masked} bytes masked, {logging} with logging");
    Ok(())
}

/// Headers that are not in the linear part of the packet are read too.
pub fn headers_in_pages_are_read() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.ns.ip("link set ecmp0 mtu 9000")?;
    stage.start(None)?;
    let view = View::open(&stage.pins)?;
    let (flows, _) = stage.send("10.20.0.9:4000")?;
    for (port, tunnel) in flows.into_iter().take(20) {
        // The packet must be longer than a page. Otherwise the kernel makes it linear.
        let packet = v4("10.100.0.1", "10.20.0.9", UDP, &udp(port, 4000, 5_000));
        stage.ns.run(|| send_paged("ecmp0", &packet))?;
        let mut found = Vec::new();
        for (other, device) in stage.tunnels.iter_mut().enumerate() {
            found.extend(device.packets()?.into_iter().map(|packet| (other, packet)));
        }
        let places: Vec<_> = found.iter().map(|(tunnel, packet)| (*tunnel, packet.len())).collect();
        ensure!(found == [(tunnel, packet)], "port {port}: {places:?}, not {tunnel}; {:?}", view.reasons()?);
    }
    let reasons = view.reasons()?;
    ensure!(reasons.not_steered.iter().chain(&reasons.dropped).all(|(_, count)| *count == 0), "{reasons:?}");
    stage.remove()?;
    Ok(())
}

/// Sends a packet that has only its first byte in the linear part. Source: `packet_snd()`, `net/packet/af_packet.c`.
fn send_paged(device: &str, packet: &[u8]) -> io::Result<()> {
    const PACKET_VNET_HDR: libc::c_int = 15;
    /// No flags, no GSO, a header length of 1.
    const VNET_HDR: [u8; 10] = [0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let check = |status: isize| if status < 0 { Err(io::Error::last_os_error()) } else { Ok(status) };
    let device = std::ffi::CString::new(device)?;
    let on: libc::c_int = 1;
    let frame = [&VNET_HDR[..], packet].concat();
    // SAFETY: `socket` takes no pointers. No other code owns the descriptor that it returns.
    let socket = unsafe {
        let descriptor = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        check(descriptor as isize)?;
        OwnedFd::from_raw_fd(descriptor)
    };
    // SAFETY: the option is one integer, which lives until the call returns.
    let status = unsafe {
        let (value, length) = ((&raw const on).cast(), 4);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, value, length)
    };
    check(status as isize)?;
    // SAFETY: a sockaddr_ll consists of integers, for which zero is a valid value. The name ends in NUL.
    let address = unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = 17;
        address.sll_protocol = 0x0800u16.to_be();
        address.sll_ifindex = libc::if_nametoindex(device.as_ptr()).cast_signed();
        address
    };
    // SAFETY: both buffers live until the call returns, and have the given lengths.
    let sent = unsafe {
        let to = (&raw const address).cast();
        let length = libc::socklen_t::try_from(size_of_val(&address)).expect("20");
        libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, to, length)
    };
    check(sent).map(drop)
}
