//! A namespace between two ports. Every frame passes through it, so that it can be delayed or lost. Frames are
//! redirected and not bridged, because a bridge does not forward the link-local frames of LACP.

use anyhow::Result;

use super::Quality;
use crate::netns::Netns;

/// The wires of several links, all in one namespace.
#[derive(Debug)]
pub struct Wires {
    ns: Netns,
    count: u8,
}

/// Number of a wire's end: 0 or 1.
type End = usize;

impl Wires {
    /// Makes the namespace, without wires.
    pub fn new(name: &str) -> Result<Self> {
        Ok(Self { ns: Netns::new(name)?, count: 0 })
    }

    /// The namespace of the wires. Frames that cross them can be captured there.
    pub fn namespace(&self) -> &Netns {
        &self.ns
    }

    /// Makes two ports, each with a name and a namespace, and joins them. Returns the number of the wire, counted from
    /// 0.
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

    /// Sets what happens to the frames that end `sender` sends.
    pub fn set(&self, wire: u8, sender: End, quality: Quality) -> Result<()> {
        self.set_all(&[(wire, sender, quality)])
    }

    /// As [`Wires::set`] for several wires, in one command.
    pub fn set_all(&self, changes: &[(u8, End, Quality)]) -> Result<()> {
        let command = |(wire, sender, quality): &(u8, End, Quality)| {
            format!("qdisc replace dev {} root {}", name(*wire, 1 - sender), quality.discipline())
        };
        self.ns.apply("tc", &changes.iter().map(command).collect::<Vec<_>>())
    }

    /// Unplugs a wire, so that both ports lose their carrier, or plugs it in again.
    pub fn plug(&self, wire: u8, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        let command = |end| format!("link set {} {state}", name(wire, end));
        self.ns.apply("ip", &[command(0), command(1)])
    }
}

/// The device of one end, in the namespace of the wires.
fn name(wire: u8, end: End) -> String {
    format!("{}{wire}", ['a', 'b'][end])
}
