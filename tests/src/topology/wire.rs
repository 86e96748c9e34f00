//! What lies between two ports: a namespace through which every frame passes, so that it can be delayed or lost. Frames
//! are redirected and not bridged: LACP's are link-local, and a bridge would keep them.

use anyhow::Result;

use super::Quality;
use crate::netns::Netns;

/// The wires of several links, all in one namespace.
#[derive(Debug)]
pub struct Wires {
    ns: Netns,
    count: u8,
}

/// Which end of a wire: 0 or 1.
type End = usize;

impl Wires {
    /// No wires yet.
    pub fn new(name: &str) -> Result<Self> {
        Ok(Self { ns: Netns::new(name)?, count: 0 })
    }

    /// Where the wires are: what crosses them can be looked at there.
    pub fn namespace(&self) -> &Netns {
        &self.ns
    }

    /// Joins two ports, which are made: a name and a namespace each. The number of the wire, counted from 0.
    pub fn join(&mut self, ports: [(&str, &Netns); 2], qualities: [Quality; 2]) -> Result<u8> {
        let wire = self.count;
        let mut links = Vec::new();
        for (end, (port, ns)) in ports.iter().enumerate() {
            let inner = name(wire, end);
            links.push(format!("link add {inner} type veth peer name {port} netns {}", ns.name()));
            links.push(format!("link set {inner} addrgenmode none up"));
        }
        self.ns.apply("ip", &links)?;
        let mut disciplines = Vec::new();
        for end in [0, 1] {
            let (here, there) = (name(wire, end), name(wire, 1 - end));
            disciplines.push(format!("qdisc add dev {here} clsact"));
            disciplines
                .push(format!("filter add dev {here} ingress matchall action mirred egress redirect dev {there}"));
        }
        self.ns.apply("tc", &disciplines)?;
        self.count += 1;
        for (sender, quality) in qualities.into_iter().enumerate() {
            self.set(wire, sender, quality)?;
        }
        Ok(wire)
    }

    /// What happens from now on to what end `sender` sends.
    pub fn set(&self, wire: u8, sender: End, quality: Quality) -> Result<()> {
        self.set_all(&[(wire, sender, quality)])
    }

    /// The same of several, at the same moment.
    pub fn set_all(&self, changes: &[(u8, End, Quality)]) -> Result<()> {
        let command = |(wire, sender, quality): &(u8, End, Quality)| {
            format!("qdisc replace dev {} root {}", name(*wire, 1 - sender), quality.discipline())
        };
        self.ns.apply("tc", &changes.iter().map(command).collect::<Vec<_>>())
    }

    /// Takes the plugs out, or puts them in again: both ports lose their carrier.
    pub fn plug(&self, wire: u8, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        let command = |end| format!("link set {} {state}", name(wire, end));
        self.ns.apply("ip", &[command(0), command(1)])
    }
}

/// The device of a wire's end in the wires' namespace.
fn name(wire: u8, end: End) -> String {
    format!("{}{wire}", ['a', 'b'][end])
}
