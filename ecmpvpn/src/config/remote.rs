//! Addresses of remote endpoints that are configured by host name. They are checked like those in the configuration.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::Config;
use super::values::why_unusable;

impl Config {
    /// Sets the address that a peer's `remote_name` resolved to as destination of its outer packets.
    ///
    /// # Errors
    /// The address must not be used. The error is a phrase that continues the address. Nothing is changed then.
    pub fn set_remote(&mut self, peer: usize, address: IpAddr) -> Result<(), String> {
        if let Some(why) = self.against_remote(peer, address) {
            return Err(why);
        }
        self.peers[peer].remote_endpoint = address;
        Ok(())
    }

    /// Why `address` must not be used for the peer at position `at`. `None`: it may be used.
    pub fn against_remote(&self, at: usize, address: IpAddr) -> Option<String> {
        let peer = &self.peers[at];
        if let Some(why) = why_unusable(address) {
            return Some(format!("which {why}: have the name lead to the gateway's own unicast address"));
        }
        if address.is_ipv4() != peer.local_endpoint.is_ipv4() {
            return Some(format!("of another family than local_endpoint {}", peer.local_endpoint));
        }
        if self.peers.iter().any(|peer| peer.local_endpoint == address) {
            return Some("which is this site's own endpoint: have the name lead to the remote site".to_owned());
        }
        let prefixes = self.peers.iter().flat_map(|peer| &peer.prefixes).chain(&self.site.addresses);
        if let Some(net) = prefixes.copied().find(|net| net.contains(&address)) {
            return Some(format!("which lies in {net}: the tunnels' own packets would be steered into the tunnels"));
        }
        let mut tunnels = self.peers.iter().flat_map(|peer| &peer.tunnels);
        if let Some(net) = tunnels.find(|tunnel| IpNet::V4(tunnel.address).contains(&address)) {
            return Some(format!("which lies in {}, the net of {}", net.address, net.name));
        }
        let others = self.peers.iter().enumerate().filter(|(other, _)| *other != at);
        let taken: Vec<SocketAddr> = others
            .flat_map(|(_, other)| other.tunnels.iter().map(|t| SocketAddr::new(other.remote_endpoint, t.remote_port)))
            .collect();
        let ports: Vec<u16> = peer.tunnels.iter().map(|tunnel| tunnel.remote_port).collect();
        let twice = ports.iter().enumerate().find(|(position, port)| {
            ports[..*position].contains(port) || taken.contains(&SocketAddr::new(address, **port))
        });
        twice.map(|(_, port)| format!("where two tunnels go to port {port}: give each a remote_port of its own"))
    }
}
