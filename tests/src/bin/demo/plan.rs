//! What is built and for how long it is measured.

use std::path::PathBuf;
use std::time::Duration;

use lab::sites::{Options, Underlay};
use lab::skip::Feature;
use lab::topology::Quality;
use lab::traffic::{LOOK, TcpLoad, Until};

use crate::say;
use crate::seen::Way;

/// Links between the sites, and tunnels.
pub const MEMBERS: u8 = 3;
/// TCP connections at once, in turn.
pub const FLOWS: [usize; 3] = [1, 3, 12];
/// How long ecmpvpn carries a lone flow before it is measured: it needs two seconds to tell that a flow fills its link, and
/// that flow then needs some time to grow. The other ways do not change with time.
const LONE: Duration = Duration::from_secs(3);
/// What a receiver's window grows to by itself soon enough, bytes.
const SMALL_WINDOW: f64 = 500_000.0;
/// More than is needed between two looks, since the sender has to be told of what was taken.
const HEADROOM: f64 = 1.3;
/// The usual recipe's ports, the same at both ends.
const EQUAL_PORTS: [u16; MEMBERS as usize] = [5_000, 5_001, 5_002];

/// The same for all that compete.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The program under test.
    pub program: PathBuf,
    /// Each link's rate in each direction, Mbit/s; `None`: not found out yet.
    pub rate: Option<f64>,
    /// Each link's delay in each direction, ms.
    pub delay: Option<f64>,
    /// How long a transfer is measured, seconds.
    pub seconds: f64,
    underlay: Underlay,
    backend: &'static str,
}

impl Plan {
    /// Finds out what this kernel has, and says it.
    pub fn new(program: PathBuf, rate: Option<f64>, delay: Option<f64>, seconds: f64) -> Self {
        let missing: Vec<String> = [Feature::WireGuard, Feature::Bonding]
            .into_iter()
            .filter(|feature| feature.missing().is_some())
            .map(|feature| feature.to_string())
            .collect();
        let (underlay, backend) = if missing.is_empty() {
            say::step("this kernel has WireGuard and bonding: using both, with a real LACP bond at each site");
            (Underlay::Bonded, "kernel")
        } else {
            say::step(&format!("this kernel has no {}:", missing.join(" and no ")));
            say::note("tunnels are WireGuard in ecmpvpn's own process, on TUN devices;");
            say::note(
                "the bond is emulated: routing rules put each tunnel on the link that the bond's hash would choose.",
            );
            say::note("`cargo xtask demo --sim` shows the same with kernel WireGuard and a real bond.");
            (Underlay::Routed, "userspace")
        };
        Self { program, rate, delay, seconds, underlay, backend }
    }

    /// A lab with the usual recipe's ports.
    pub fn with_equal_ports(&self) -> Options {
        Options { ports: Some(EQUAL_PORTS.map(|port| [port; 2]).into()), ..self.with_planned_ports() }
    }

    /// A lab with the ports that `ecmpvpn init` plans.
    pub fn with_planned_ports(&self) -> Options {
        Options {
            underlay: self.underlay,
            backend: self.backend,
            policy: "adaptive",
            members: MEMBERS,
            tunnels: usize::from(MEMBERS),
            rate: self.rate,
            wires: self.delay.map(|ms| Quality::delayed(Duration::from_secs_f64(ms / 1_000.0))),
            ..Options::default()
        }
    }

    /// A transfer of so many flows. What comes first, as long as what is measured, is left out: new connections
    /// overshoot, and lose much.
    pub fn transfer(&self, way: Way, flows: usize) -> TcpLoad {
        let measured = Duration::from_secs_f64(self.seconds);
        let warm_up = if way == Way::Ecmpvpn && flows == 1 { measured.max(LONE) } else { measured };
        TcpLoad { flows, until: Until::Time(warm_up + measured), warm_up }
    }

    /// What receivers of so many flows need as buffer, bytes; `None`: what the system has is enough. They look a hundred
    /// times a second, and what the links bring meanwhile must fit: all links to a lone flow, else one link, as that is
    /// what a flow fills.
    pub fn receive_buffer(&self, flows: usize) -> Option<u32> {
        let links = if flows == 1 { f64::from(MEMBERS) } else { 1.0 };
        let between_looks = self.rate? * links * 1e6 / 8.0 * LOOK.as_secs_f64();
        // Half of a buffer is for what the kernel itself needs around each segment.
        let buffer = 2.0 * HEADROOM * between_looks;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive, and bounded")]
        (between_looks > SMALL_WINDOW).then_some(buffer as u32)
    }

    /// Whether processes that this one starts carry the packets.
    pub fn is_userspace(&self) -> bool {
        self.underlay == Underlay::Routed
    }

    /// The links in words.
    pub fn links(&self) -> String {
        let rate = self.rate.map_or_else(String::new, |rate| format!(" of {rate} Mbit/s"));
        let delay = self.delay.map_or_else(String::new, |ms| format!(", {ms} ms each way"));
        format!("{MEMBERS} links{rate}{delay}")
    }
}
