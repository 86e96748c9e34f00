//! A name server of a test, for one gateway. It answers whatever the test wants, or not at all.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::netns::Netns;

/// Where the server listens, in the gateway's namespace.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
const PORT: u16 = 53;
/// How often the server looks whether it has to end.
const LOOK: Duration = Duration::from_millis(50);
/// More than this is answered by TCP only.
const BY_UDP: usize = 512;
const HEADER: usize = 12;
/// `NXDOMAIN`, RFC 1035 section 4.1.1.
const NO_SUCH_NAME: u8 = 3;

/// What the server answers.
#[derive(Clone, Debug)]
pub enum Answers {
    Never,
    NoSuchName,
    /// Each question gets the next of these, and after the last the first.
    Each(Vec<Vec<IpAddr>>),
}

#[derive(Debug)]
struct Shared {
    answers: Mutex<Answers>,
    questions: AtomicUsize,
    /// Answered questions for IPv4 addresses.
    turn: AtomicUsize,
    stop: AtomicBool,
}

/// A running name server. It ends when this value is dropped.
#[derive(Debug)]
pub struct NameServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl NameServer {
    /// Starts a server in `ns`. It never answers until it is told to.
    ///
    /// # Errors
    /// The port is taken.
    pub fn start(ns: &Netns) -> Result<Self> {
        let (udp, tcp) = ns
            .run(|| Ok::<_, std::io::Error>((UdpSocket::bind((ADDRESS, PORT))?, TcpListener::bind((ADDRESS, PORT))?)))
            .context("starting a name server")?;
        udp.set_read_timeout(Some(LOOK))?;
        tcp.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            answers: Mutex::new(Answers::Never),
            questions: AtomicUsize::new(0),
            turn: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let [for_udp, for_tcp] = [(); 2].map(|()| Arc::clone(&shared));
        let threads = vec![thread::spawn(move || for_udp.by_udp(&udp)), thread::spawn(move || for_tcp.by_tcp(&tcp))];
        Ok(Self { shared, threads })
    }

    /// Writes a resolv.conf(5) that names the server.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_config(path: &Path) -> Result<()> {
        Ok(std::fs::write(path, format!("nameserver {ADDRESS}\noptions timeout:3 attempts:2\n"))?)
    }

    /// Answers like this from now on.
    pub fn set(&self, answers: Answers) {
        *self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner) = answers;
    }

    /// The number of questions so far, by UDP.
    pub fn questions(&self) -> usize {
        self.shared.questions.load(Ordering::Relaxed)
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn by_udp(&self, socket: &UdpSocket) {
        let mut buffer = [0; 1500];
        while !self.stop.load(Ordering::Relaxed) {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            self.questions.fetch_add(1, Ordering::Relaxed);
            if let Some(answer) = self.answer(&buffer[..length], BY_UDP) {
                let _ = socket.send_to(&answer, from);
            }
        }
    }

    fn by_tcp(&self, listener: &TcpListener) {
        while !self.stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => drop(self.serve(stream)),
                Err(_) => thread::sleep(LOOK),
            }
        }
    }

    fn serve(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(4 * LOOK))?;
        let mut length = [0; 2];
        while stream.read_exact(&mut length).is_ok() {
            let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut question)?;
            let Some(answer) = self.answer(&question, usize::from(u16::MAX)) else { break };
            stream.write_all(&[&u16::try_from(answer.len())?.to_be_bytes()[..], &answer].concat())?;
        }
        Ok(())
    }

    /// The answer to a question, of at most so many bytes. One that is longer is cut off, and says so.
    fn answer(&self, question: &[u8], most: usize) -> Option<Vec<u8>> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (code, addresses) = match answers {
            Answers::Never => return None,
            Answers::NoSuchName => (NO_SUCH_NAME, Vec::new()),
            Answers::Each(all) => (0, all.get(self.turn.load(Ordering::Relaxed) % all.len().max(1)).cloned()?),
        };
        let end = HEADER + question.get(HEADER..)?.iter().position(|byte| *byte == 0)? + 1;
        let kind = u16::from_be_bytes([*question.get(end)?, *question.get(end + 1)?]);
        let records: Vec<u8> = addresses.iter().filter_map(|address| record(*address, kind)).flatten().collect();
        let count = addresses.iter().filter(|address| record(**address, kind).is_some()).count();
        let is_cut = end + 4 + records.len() > most;
        let (count, records) = if is_cut { (0, Vec::new()) } else { (count, records) };
        if kind == 1 && !is_cut {
            self.turn.fetch_add(1, Ordering::Relaxed);
        }
        // A response, cut off or not, recursion desired and available.
        let flags = [0x81 | u8::from(is_cut) << 1, 0x80 | code];
        let counts = [1_u16, u16::try_from(count).ok()?, 0, 0].map(u16::to_be_bytes).concat();
        Some([&question[..2], &flags, &counts, &question[HEADER..end + 4], &records].concat())
    }
}

/// A resource record of the type of the question: 1 for IPv4, 28 for IPv6. It is not to be kept.
fn record(address: IpAddr, kind: u16) -> Option<Vec<u8>> {
    let data = match (address, kind) {
        (IpAddr::V4(v4), 1) => v4.octets().to_vec(),
        (IpAddr::V6(v6), 28) => v6.octets().to_vec(),
        _ => return None,
    };
    // The name of the question; type, class IN, no time to live, and the length.
    let length = u16::try_from(data.len()).ok()?.to_be_bytes();
    Some([&[0xc0, 12], &kind.to_be_bytes()[..], &[0, 1, 0, 0, 0, 0], &length, &data].concat())
}
