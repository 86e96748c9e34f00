//! The far site sends packets with source addresses that are not its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lab::kind::Kind;
use lab::sites::Lab;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

use super::stage::lab;

const PORT: u16 = 9_999;
/// Packets for each source address.
const EACH: u16 = 20;
/// How long the last packet may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// A UDP datagram with its IPv4 header. The kernel fills in the header's checksum and length; without a checksum, UDP is
/// taken as it is.
fn datagram(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let header = [&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0][..], &source.octets(), &destination.octets()].concat();
    let ports = [PORT.to_be_bytes(), PORT.to_be_bytes()].concat();
    [&header[..], &ports, &[0, 12, 0, 0], &source.octets()].concat()
}

/// Receives for a while. Returns how many datagrams came that name `source` as their sender, and how many others.
fn received(socket: &UdpSocket, source: Ipv4Addr) -> (u16, u16) {
    let (mut own, mut others, mut buffer) = (0, 0, [0; 64]);
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let is_own = from.ip() == IpAddr::V4(source) && buffer[..length] == source.octets();
        *(if is_own { &mut own } else { &mut others }) += 1;
    }
    (own, others)
}

/// Packets that came out of A's tunnels and were refused for their source, as the kernel's WireGuard counts them.
fn refused(lab: &Lab) -> Result<u64> {
    let mut sum = 0;
    for tunnel in &lab.tunnels {
        let text = lab.sites[0].gateway.query("ip", &format!("-s -j link show {}", tunnel.name))?;
        let links: serde_json::Value = serde_json::from_str(&text)?;
        sum += links[0]["stats64"]["rx"]["errors"].as_u64().context("no count of errors")?;
    }
    Ok(sum)
}

/// WireGuard takes from a peer only what its allowed addresses cover: the peer's prefixes and the far tunnel address.
pub fn spoofed_sources_do_not_arrive(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let _running = lab.run()?;
    let [a, b] = &lab.sites;
    let (IpAddr::V4(near), IpAddr::V4(far)) = (a.host_v4(), b.host_v4()) else { bail!("the hosts have no IPv4") };
    // B's gateway forwards whatever its hosts send.
    for name in ["all", "lan0"] {
        b.gateway.sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0")?;
    }
    let receiver = a.host.run(|| UdpSocket::bind((near, PORT)))?;
    receiver.set_read_timeout(Some(PATIENCE))?;
    let sender = b.host.run(|| -> Result<UdpSocket> {
        // Sends whole packets, with any source address.
        let fd: OwnedFd = socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
        Ok(UdpSocket::from(fd))
    })?;
    let send = |source: Ipv4Addr| -> Result<()> {
        for _ in 0..EACH {
            sender.send_to(&datagram(source, near), SocketAddr::new(near.into(), 0))?;
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    };
    let others = [
        Ipv4Addr::new(10, 30, 0, 5),
        Ipv4Addr::new(192, 0, 2, 1),
        Ipv4Addr::new(10, 10, 0, 99),
        near,
        a.endpoint,
        lab.tunnels[0].addresses[0],
    ];
    send(far)?;
    ensure!(received(&receiver, far) == (EACH, 0), "packets with the true source do not arrive");
    let steered = || -> Result<u64> {
        let stats = lab.stats(1)?;
        Ok(stats["tunnels"].as_array().context("no tunnels")?.iter().filter_map(|one| one["tx_packets"].as_u64()).sum())
    };
    for source in others {
        let before = (steered()?, refused(&lab)?);
        send(source)?;
        let came = received(&receiver, source);
        ensure!(came == (0, 0), "{came:?} packets from {source} arrived");
        let (steered, refused) = (steered()? - before.0, refused(&lab)? - before.1);
        ensure!(
            steered >= u64::from(EACH),
            "B's gateway sent only {steered} packets from {source} through its tunnels"
        );
        // The userspace backend does not count them.
        let counted = kind == Kind::Userspace || refused >= u64::from(EACH);
        ensure!(counted, "A's WireGuard refused only {refused} packets from {source}");
    }
    send(far)?;
    ensure!(received(&receiver, far) == (EACH, 0), "packets with the true source do not arrive any more");
    Ok(())
}
