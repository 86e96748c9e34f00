//! Messages of the probes that somebody has recorded and sends again.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::hostile::{allow_ping, as_nobody, echo_request, ping_socket};
use lab::kind::Kind;
use lab::sites::{Hole, Lab};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

use super::stage::{ALL, describe, lab, live, views, wait_until_live, wait_until_settled};

/// How many messages are recorded before they are sent again.
const RECORDED: usize = 20;
/// Time between two rounds. Each sends every recorded message.
const GAP: Duration = Duration::from_millis(20);
/// How long the tunnel must stay out of use.
const STAYS: Duration = Duration::from_secs(2);
const MARK: &[u8] = b"ecm\x03";
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// Records messages of this ICMP type with the mark of the probes that come to A from the far end of its first tunnel,
/// each from the IPv4 header on. Root may do that, and whoever holds a captured packet.
fn record(lab: &Lab, kind: u8) -> Result<Vec<Vec<u8>>> {
    let far = lab.tunnels[0].addresses[1];
    lab.sites[0].gateway.run(|| {
        let fd: OwnedFd = socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::ICMP))?;
        let socket = UdpSocket::from(fd);
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let (mut recorded, mut buffer, start) = (Vec::new(), [0; 256], Instant::now());
        while recorded.len() < RECORDED {
            ensure!(start.elapsed() < Duration::from_secs(20), "only {} messages were recorded", recorded.len());
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            let packet = &buffer[..length];
            if from.ip() == far && packet.get(20) == Some(&kind) && packet.get(28..32) == Some(MARK) {
                recorded.push(packet.to_vec());
            }
        }
        Ok(recorded)
    })
}

/// Sends the packets again and again from a host in A's LAN, as if they came from the far end of the tunnel. Returns
/// how often.
fn replay_from_lan(lab: &Lab, packets: &[Vec<u8>], stop: &AtomicBool) -> Result<u64> {
    let near = SocketAddr::new(lab.tunnels[0].addresses[0].into(), 0);
    let mut rounds = 0;
    lab.sites[0].host.run(|| {
        // Sends whole packets, with any source address.
        let fd: OwnedFd = socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
        let socket = UdpSocket::from(fd);
        while !stop.load(Ordering::Relaxed) {
            for packet in packets {
                socket.send_to(packet, near)?;
            }
            rounds += 1;
            thread::sleep(GAP);
        }
        Ok(rounds)
    })
}

/// Sends the content of the packets again and again through the tunnel, as a user without privilege on B's gateway,
/// with the identifier that they have. Returns how often.
fn replay_as_nobody(lab: &Lab, packets: &[Vec<u8>], stop: &AtomicBool) -> Result<u64> {
    let [a, b] = lab.tunnels[0].addresses;
    let gateway = &lab.sites[1].gateway;
    allow_ping(gateway)?;
    let identifier = packets.first().map_or(0, |packet| u16::from_be_bytes([packet[24], packet[25]]));
    as_nobody(gateway, || {
        let socket = ping_socket([b, a], identifier)?;
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            for packet in packets {
                let mut message = echo_request(&packet[28..]);
                message[6..8].copy_from_slice(&packet[26..28]);
                socket.send(&message)?;
            }
            rounds += 1;
            thread::sleep(GAP);
        }
        Ok(rounds)
    })
}

/// Packets of A's first tunnel are lost on their way to B. Somebody sends what was recorded before: A leaves the tunnel
/// nevertheless, does not return to it, and takes it again when packets arrive.
pub fn recorded_messages_keep_no_dead_tunnel_in_use(kind: Kind) -> Result<()> {
    type Replay = fn(&Lab, &[Vec<u8>], &AtomicBool) -> Result<u64>;
    let replays: [(u8, Replay); 3] =
        [(ECHO_REPLY, replay_from_lan), (ECHO_REQUEST, replay_from_lan), (ECHO_REQUEST, replay_as_nobody)];
    let lab = lab(kind)?;
    let mut running = lab.run()?;
    let views = views(&lab)?;
    wait_until_settled(&lab, &views, &mut running)?;
    for (message, replay) in replays {
        let recorded = record(&lab, message)?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let replaying = scope.spawn(|| replay(&lab, &recorded, &stop));
            let hole = Hole::dig(&lab, 0, &[0])?;
            let result = (|| {
                wait_until_live(&lab, &views, [ALL & !1; 2], &mut running)?;
                let left = Instant::now();
                while left.elapsed() < STAYS {
                    let now = [live(&views[0]), live(&views[1])];
                    ensure!(now == [ALL & !1; 2], "type {message}: {now:?} in use:{}", describe(&running));
                    thread::sleep(Duration::from_millis(5));
                }
                Ok(())
            })();
            stop.store(true, Ordering::Relaxed);
            let rounds = replaying.join().expect("it does not panic")?;
            result?;
            ensure!(rounds >= 20, "the messages were sent again only {rounds} times");
            hole.fill()
        })?;
        wait_until_live(&lab, &views, [ALL; 2], &mut running)?;
    }
    Ok(())
}
