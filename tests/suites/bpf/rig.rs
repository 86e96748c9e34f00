//! Programs loaded for test runs, and their maps.

use std::collections::BTreeMap;

use anyhow::ensure;
use aya::programs::{TestRun as _, TestRunOptions};
use ecmpvpn::config::{InterfaceName, Policy};
use ecmpvpn::dataplane::{Loaded, Options, Pins, TestRun, View};
use ecmpvpn::plan::{PeerTable, SteeringTable};
use ecmpvpn_common::layout::{programs, test_run};
use lab::bpffs::Bpffs;

/// The result of a test run, from `skb->cb` and the return value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Redirected to a tunnel.
    Steered { tunnel: u32, bucket: u32, how: u32 },
    /// Left to the steering device, for the reason with this number.
    Refused(u32),
}

/// What a test run returns, the words of `skb->cb`, and the packet from its network header on.
type Run = (u32, [u32; 5], Vec<u8>);

/// Interface index of the first tunnel. The others follow. No such devices are needed, because test runs do not carry
/// out redirects.
pub const FIRST_IFINDEX: u32 = 101;

/// Two peers: site-b with three tunnels of weights 1, 2 and 1, and site-c with two equal ones.
pub fn table(seed: u64) -> SteeringTable {
    let name = |text: &str| InterfaceName::new(text).expect("a valid name");
    let prefixes = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a prefix")).collect();
    SteeringTable {
        seed,
        flowlet_gap_us: None,
        mss_clamp: true,
        rules: Vec::new(),
        peers: vec![
            PeerTable {
                name: "site-b".into(),
                policy: Policy::Hash,
                restore_order: true,
                prefixes: prefixes(&["10.20.0.0/16", "fd00:20::/48"]),
                tunnels: vec![(name("wg0"), Some(1)), (name("wg1"), Some(2)), (name("wg2"), None)],
            },
            PeerTable {
                name: "site-c".into(),
                policy: Policy::Hash,
                restore_order: true,
                prefixes: prefixes(&["10.20.30.0/24", "10.30.0.0/16", "fd00:30::/48", "fd00:20:0:9::/64"]),
                tunnels: vec![(name("wgc0"), Some(1)), (name("wgc1"), Some(1))],
            },
        ],
    }
}

/// Interface indexes of a table's tunnels, in order.
pub fn ifindexes(table: &SteeringTable) -> BTreeMap<InterfaceName, u32> {
    let names = table.peers.iter().flat_map(|peer| peer.tunnels.iter().map(|(name, _)| name.clone()));
    names.zip(FIRST_IFINDEX..).collect()
}

/// `TC_ACT_REDIRECT`, `include/uapi/linux/pkt_cls.h`.
const REDIRECT: u32 = 7;

/// Programs loaded for test runs.
pub struct Rig {
    loaded: Loaded,
    pub view: View,
    /// The site's pins, for code under test that opens them itself.
    pub pins: Pins,
    /// Firewall mark of the packets.
    pub mark: u32,
    /// Packets that the fast path steered: those whose bucket chose a tunnel, and those whose bucket kept its tunnel.
    pub fast: [u32; 2],
    /// The clock that the egress program reads, nanoseconds. 0: the kernel's clock.
    pub now: u64,
    _bpffs: Bpffs,
}

impl Rig {
    pub fn new(table: &SteeringTable, options: &Options) -> anyhow::Result<Self> {
        Self::with_ifindexes(table, &ifindexes(table), options)
    }

    pub fn with_ifindexes(
        table: &SteeringTable,
        ifindexes: &BTreeMap<InterfaceName, u32>,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let bpffs = Bpffs::new()?;
        let mut loaded =
            Loaded::new(table, 100, ifindexes, &Options { test_run: TestRun::Described, ..options.clone() })?;
        let pins = Pins::below(&bpffs.root(), "rig");
        std::fs::create_dir_all(pins.dir())?;
        loaded.pin(&pins)?;
        let view = View::open(&pins)?;
        Ok(Self { loaded, view, pins, mark: 0, fast: [0, 0], now: 0, _bpffs: bpffs })
    }

    /// Runs the egress program on a packet that begins with its network header.
    pub fn egress(&mut self, packet: &[u8], gso: (u32, u32)) -> anyhow::Result<Outcome> {
        Ok(self.sent(packet, gso)?.0)
    }

    /// As [`Self::egress`]; also returns the packet as it leaves.
    pub fn sent(&mut self, packet: &[u8], gso: (u32, u32)) -> anyhow::Result<(Outcome, Vec<u8>)> {
        const UNSPEC: u32 = u32::MAX;
        let (returned, cb, out) = self.run(programs::EGRESS, packet, gso)?;
        let outcome = self.outcome(returned, cb)?;
        ensure!(returned != UNSPEC || out == packet, "a packet that is not steered was changed");
        Ok((outcome, out))
    }

    fn outcome(&mut self, returned: u32, cb: [u32; 5]) -> anyhow::Result<Outcome> {
        const UNSPEC: u32 = u32::MAX;
        match (returned, cb[test_run::TUNNEL]) {
            (REDIRECT, tunnel @ 1..) => {
                match cb[test_run::FAST_PATH] {
                    0 => {}
                    how => self.fast[how as usize - 1] += 1,
                }
                Ok(Outcome::Steered { tunnel: tunnel - 1, bucket: cb[test_run::BUCKET], how: cb[test_run::HOW] })
            }
            (UNSPEC, 0) => Ok(Outcome::Refused(cb[test_run::REASON])),
            other => anyhow::bail!("returned {other:?}"),
        }
    }

    /// Runs the ingress program on a packet that may be stamped. Returns what [`test_run::RELEASE`] and
    /// [`test_run::HELD`] say, whether it was redirected, and the packet as it goes on.
    pub fn arrived(&mut self, packet: &[u8]) -> anyhow::Result<(u32, u32, bool, Vec<u8>)> {
        let (returned, cb, out) = self.run(programs::INGRESS, packet, (0, 0))?;
        Ok((cb[test_run::RELEASE], cb[test_run::HELD], returned == REDIRECT, out))
    }

    /// Runs the ingress program. The device is loopback, whose index is 1.
    pub fn ingress(&mut self, packet: &[u8], gso: (u32, u32)) -> anyhow::Result<u32> {
        Ok(self.run(programs::INGRESS, packet, gso)?.0)
    }

    fn run(&mut self, program: &str, packet: &[u8], (size, segs): (u32, u32)) -> anyhow::Result<Run> {
        /// Size of `struct __sk_buff`, and offsets of its fields. Source: linux/bpf.h.
        const CONTEXT: usize = 192;
        const MARK: usize = 8;
        const CB: usize = 48;
        const TSTAMP: usize = 152;
        const GSO_SEGS: usize = 164;
        const GSO_SIZE: usize = 176;
        let mut frame = vec![0; test_run::ETHERNET_HEADER as usize];
        // An Ethernet type for experiments. Newer kernels refuse test runs on truncated packets whose Ethernet type is
        // IP.
        frame[12..].copy_from_slice(&[0x88, 0xb5]);
        frame.extend(packet);
        let mut context = [0; CONTEXT];
        context[MARK..][..4].copy_from_slice(&self.mark.to_ne_bytes());
        context[TSTAMP..][..8].copy_from_slice(&self.now.to_ne_bytes());
        context[GSO_SEGS..][..4].copy_from_slice(&segs.to_ne_bytes());
        context[GSO_SIZE..][..4].copy_from_slice(&size.to_ne_bytes());
        let mut out = [0; CONTEXT];
        let mut changed = vec![0; frame.len() + 64];
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut out),
            data_out: Some(&mut changed),
            ..TestRunOptions::default()
        };
        let result = self.loaded.program_mut(program)?.test_run(options)?;
        let word = |i: usize| u32::from_ne_bytes(out[CB + 4 * i..][..4].try_into().expect("four bytes"));
        changed.truncate(result.data_size_out as usize);
        changed.drain(..test_run::ETHERNET_HEADER as usize);
        Ok((result.return_value, [word(0), word(1), word(2), word(3), word(4)], changed))
    }
}
