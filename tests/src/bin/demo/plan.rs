//! The settings of the labs and of the transfers.

use std::path::PathBuf;
use std::time::Duration;

use lab::sites::{Options, Underlay};
use lab::skip::Feature;
use lab::topology::Quality;
use lab::traffic::{LOOK, TcpLoad, Until};

use crate::measured::Way;
use crate::say;

/// Number of links between the sites, and of tunnels.
pub const MEMBERS: u8 = 3;
/// Numbers of TCP connections at once, one transfer for each.
pub const FLOWS: [usize; 3] = [1, 3, 12];
/// How long ecmpvpn carries a lone flow before it is measured. It needs two seconds to detect that a flow fills its
/// link, and the flow then needs some time to grow. The other ways do not change with time.
const LONE: Duration = Duration::from_secs(3);
/// The size to which a receiver's window grows by itself soon enough, bytes.
const SMALL_WINDOW: f64 = 500_000.0;
/// Factor on the bytes that arrive between two looks. The sender must also learn of what was read.
const HEADROOM: f64 = 1.3;
/// The usual recipe's ports, the same at both ends.
const EQUAL_PORTS: [u16; MEMBERS as usize] = [5_000, 5_001, 5_002];

/// Settings that are the same for all ways.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The program under test.
    pub program: PathBuf,
    /// Each link's rate in each direction, Mbit/s. `None`: not known yet.
    pub rate: Option<f64>,
    /// Each link's delay in each direction, ms.
    pub delay: Option<f64>,
    /// How long a transfer is measured, seconds.
    pub seconds: f64,
    underlay: Underlay,
    backend: &'static str,
}

impl Plan {
    /// Finds out which features this kernel has, and prints them.
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

    /// Options of a lab with the ports of the usual recipe.
    pub fn with_equal_ports(&self) -> Options {
        Options { ports: Some(EQUAL_PORTS.map(|port| [port; 2]).into()), ..self.with_planned_ports() }
    }

    /// Options of a lab with the ports that `ecmpvpn init` plans.
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

    /// A transfer of `flows` flows. It is not measured at first, for as long as it is measured afterwards, because new
    /// connections overshoot and lose many packets.
    pub fn transfer(&self, way: Way, flows: usize) -> TcpLoad {
        let measured = Duration::from_secs_f64(self.seconds);
        let warm_up = if way == Way::Ecmpvpn && flows == 1 { measured.max(LONE) } else { measured };
        TcpLoad { flows, until: Until::Time(warm_up + measured), warm_up }
    }

    /// The buffer that receivers of `flows` flows need, bytes. `None`: the system's default is enough. A receiver reads
    /// a hundred times a second, and the buffer must hold what arrives in between: from all links for a lone flow,
    /// otherwise from one link, because a flow fills one link.
    pub fn receive_buffer(&self, flows: usize) -> Option<u32> {
        let links = if flows == 1 { f64::from(MEMBERS) } else { 1.0 };
        let between_looks = self.rate? * links * 1e6 / 8.0 * LOOK.as_secs_f64();
        // The kernel itself needs half of a buffer for its data around each segment.
        let buffer = 2.0 * HEADROOM * between_looks;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive, and bounded")]
        (between_looks > SMALL_WINDOW).then_some(buffer as u32)
    }

    /// Whether the packets are carried in user space, by processes that this one starts.
    pub fn is_userspace(&self) -> bool {
        self.underlay == Underlay::Routed
    }

    /// Describes the links in words.
    pub fn links(&self) -> String {
        let rate = self.rate.map_or_else(String::new, |rate| format!(" of {rate} Mbit/s"));
        let delay = self.delay.map_or_else(String::new, |ms| format!(", {ms} ms each way"));
        format!("{MEMBERS} links{rate}{delay}")
    }
}
