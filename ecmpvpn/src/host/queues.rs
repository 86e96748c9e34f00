//! Reads what the interfaces' queues have sent and what waits in them, many times a second.
//!
//! Each reading is one dump over a separate socket, without tokio: the kernel answers within the call, so the figures
//! are as old as the call. Most of the data about other interfaces is skipped without parsing.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage, TcStats2};
use rtnetlink::packet_core::{
    ErrorBuffer, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ALIGNTO, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage,
    Parseable as _,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with, sockopt};

/// Upper bound of one part of a dump, bytes. Source: `netlink_dump()`, `net/netlink/af_netlink.c`.
const LONGEST: usize = 32 << 10;
/// Receive timeout. The kernel answers at once, but no wait may be endless.
const PATIENCE: Duration = Duration::from_secs(1);

/// Queueing disciplines with a queue for each flow.
const FAIR: [&str; 5] = ["fq_codel", "fq", "cake", "fq_pie", "sfq"];

/// The counters of an interface's root queueing discipline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes sent, with link-layer headers.
    pub sent: u64,
    /// Bytes that wait in the queue.
    pub waiting: u32,
    /// Packets that wait in the queue.
    pub packets_waiting: u32,
    /// Packets dropped, modulo 2^32.
    pub dropped: u32,
    /// Whether packets of one flow may overtake those of another: it, or a discipline below it, has a queue for each.
    pub is_fair: bool,
}

/// A netlink socket with its buffers.
#[derive(Debug)]
pub struct Queues {
    socket: OwnedFd,
    request: Vec<u8>,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Queues {
    /// Opens the socket in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { socket, request: Vec::new(), buffer: vec![0; LONGEST], sequence: 0 })
    }

    /// Reads the root queueing disciplines of the interfaces whose index is `desired`. Interfaces without one are left
    /// out.
    pub fn read(&mut self, desired: impl Fn(u32) -> bool) -> io::Result<BTreeMap<u32, Reading>> {
        self.ask()?;
        let mut readings = BTreeMap::new();
        loop {
            let (length, _) = recv(&self.socket, &mut self.buffer[..], RecvFlags::empty())?;
            if parse_readings(&self.buffer[..length], self.sequence, &desired, &mut readings)? {
                return Ok(readings);
            }
        }
    }

    fn ask(&mut self) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        request.header.sequence_number = self.sequence;
        request.finalize();
        self.request.resize(request.buffer_len(), 0);
        request.serialize(&mut self.request);
        send(&self.socket, &self.request, SendFlags::empty())?;
        Ok(())
    }
}

/// Takes the readings from a datagram that answers the request with this sequence number. Returns whether the answer is
/// complete.
fn parse_readings(
    datagram: &[u8],
    sequence: u32,
    desired: impl Fn(u32) -> bool,
    readings: &mut BTreeMap<u32, Reading>,
) -> io::Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
        // Another number: a late answer to an earlier request.
        if message.sequence_number() == sequence {
            match message.message_type() {
                NLMSG_DONE => return Ok(true),
                NLMSG_ERROR => return Err(error(message.payload())),
                _ => queue(message.payload(), &desired, readings)?,
            }
        }
        rest = rest.get((message.length() as usize).next_multiple_of(NLMSG_ALIGNTO.into())..).unwrap_or_default();
    }
    Ok(false)
}

fn error(payload: &[u8]) -> io::Error {
    let code = ErrorBuffer::new_checked(payload).ok().and_then(|error| error.code());
    code.map_or(io::ErrorKind::InvalidData.into(), |code| io::Error::from_raw_os_error(code.get().wrapping_neg()))
}

/// Adds what a message says of an interface's queueing discipline, if the interface is requested.
fn queue(payload: &[u8], desired: impl Fn(u32) -> bool, readings: &mut BTreeMap<u32, Reading>) -> io::Result<()> {
    let header = TcHeader::parse(payload).map_err(io::Error::other)?;
    let Some(interface) = u32::try_from(header.index).ok().filter(|interface| desired(*interface)) else {
        return Ok(());
    };
    let is_root = header.parent == TcHandle::ROOT;
    // The kernel names the root first. Ingress has no root.
    if !is_root && !readings.contains_key(&interface) {
        return Ok(());
    }
    let reading = readings.entry(interface).or_default();
    for attribute in TcMessage::parse(payload).map_err(io::Error::other)?.attributes {
        match attribute {
            TcAttribute::Kind(kind) => reading.is_fair |= FAIR.contains(&kind.as_str()),
            TcAttribute::Stats2(stats) if is_root => {
                for stat in stats {
                    match stat {
                        TcStats2::Basic(basic) => reading.sent = basic.bytes,
                        TcStats2::Queue(queue) => {
                            (reading.waiting, reading.packets_waiting) = (queue.backlog, queue.qlen);
                            reading.dropped = queue.drops;
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::tc::{TcStatsBasic, TcStatsQueue};
    use rtnetlink::packet_core::Emitable as _;

    use super::*;

    fn message(interface: i32, parent: TcHandle, kind: &str) -> Vec<u8> {
        let (mut basic, mut waiting) = (TcStatsBasic::default(), TcStatsQueue::default());
        (basic.bytes, waiting.backlog, waiting.qlen, waiting.drops) = (1 << 40, 3_000, 2, 7);
        let mut message = TcMessage::with_index(interface);
        message.header.parent = parent;
        message.attributes.push(TcAttribute::Kind(kind.to_owned()));
        message.attributes.push(TcAttribute::Stats2(vec![TcStats2::Basic(basic), TcStats2::Queue(waiting)]));
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    fn root_queues_of_the_named_interfaces_are_read() {
        let mut readings = BTreeMap::new();
        let (root, child) = (TcHandle::ROOT, TcHandle::from(0x0001_0001));
        // One of the queues of a multi-queue card, and an interface's ingress, count for nothing alone.
        for (interface, parent, kind) in
            [(7, child, "fq"), (8, root, "tbf"), (-1, root, "tbf"), (7, root, "tbf"), (7, child, "bfifo")]
        {
            queue(&message(interface, parent, kind), |desired| desired == 7, &mut readings).unwrap();
        }
        let only = Reading { sent: 1 << 40, waiting: 3_000, packets_waiting: 2, dropped: 7, is_fair: false };
        assert_eq!(readings, BTreeMap::from([(7, only)]));
        queue(&message(7, child, "fq_codel"), |_| true, &mut readings).unwrap();
        assert_eq!(readings, BTreeMap::from([(7, Reading { is_fair: true, ..only })]));
        assert!(queue(&[0; 7], |_| true, &mut readings).is_err());
        let cut = message(7, TcHandle::ROOT, "tbf");
        assert!(queue(&cut[..cut.len() - 8], |_| true, &mut readings).is_err());
    }

    /// A netlink message of this type and number.
    fn numbered(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes =
            [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 2], &sequence.to_ne_bytes(), &[0; 4]].concat();
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn what_came_too_late_for_an_earlier_question_is_no_answer() {
        let taken = |datagram: &[Vec<u8>]| {
            let mut readings = BTreeMap::new();
            parse_readings(&datagram.concat(), 5, |_| true, &mut readings)
                .map(|last| (last, readings.into_keys().collect::<Vec<_>>()))
        };
        let of =
            |interface, sequence| numbered(libc::RTM_NEWQDISC, sequence, &message(interface, TcHandle::ROOT, "tbf"));
        let end = |sequence| numbered(NLMSG_DONE, sequence, &[0; 4]);
        assert_eq!(taken(&[of(1, 4), end(4), of(2, 5)]).unwrap(), (false, vec![2]));
        assert_eq!(taken(&[of(2, 5), of(3, 5), end(5), of(4, 5)]).unwrap(), (true, vec![2, 3]));
        let refused = (-libc::EPERM).to_ne_bytes();
        assert!(taken(&[numbered(NLMSG_ERROR, 4, &refused)]).is_ok());
        assert!(taken(&[numbered(NLMSG_ERROR, 5, &refused)]).is_err());
        assert!(taken(&[vec![0; 7]]).is_err());
    }

    #[test]
    fn the_kernel_answers_again_and_again() {
        let mut queues = Queues::open().unwrap();
        let all: Vec<u32> = queues.read(|_| true).unwrap().into_keys().collect();
        for _ in 0..3 {
            assert_eq!(queues.read(|_| true).unwrap().into_keys().collect::<Vec<_>>(), all);
        }
        assert!(queues.read(|_| false).unwrap().is_empty());
    }

    #[test]
    fn an_error_is_the_kernels() {
        let refused = (-libc::EPERM).to_ne_bytes();
        assert_eq!(error(&refused).raw_os_error(), Some(libc::EPERM));
        assert_eq!(error(&[]).kind(), io::ErrorKind::InvalidData);
    }
}
