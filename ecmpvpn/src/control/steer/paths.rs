//! Groups tunnels by the link that they use. Pure.

use ecmpvpn_common::layout::TunnelId;

/// A tunnel and the link that its outer packets use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub id: TunnelId,
    /// The bond member's interface index; `None`: the tunnel is taken to have its own link.
    pub member: Option<u32>,
}

/// One of a peer's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The tunnel whose load record stands for the link: the first one on that link, of any peer.
    pub link: TunnelId,
    /// The peer's tunnels on the link, one bit for each slot.
    pub tunnels: u32,
}

/// The tunnel whose load record stands for the link of `tunnel`.
pub fn link_of(tunnel: &Placed, all: &[Placed]) -> TunnelId {
    match tunnel.member {
        Some(_) => all.iter().filter(|other| other.member == tunnel.member).map(|other| other.id).min(),
        None => None,
    }
    .unwrap_or(tunnel.id)
}

/// A peer's links, in the order of their first tunnels.
pub fn of_peer(peer: u32, all: &[Placed]) -> Vec<Path> {
    let mut paths: Vec<Path> = Vec::new();
    for tunnel in all.iter().filter(|tunnel| tunnel.id.peer() == peer) {
        let link = link_of(tunnel, all);
        match paths.iter_mut().find(|path| path.link == link) {
            Some(path) => path.tunnels |= 1 << tunnel.id.slot(),
            None => paths.push(Path { link, tunnels: 1 << tunnel.id.slot() }),
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_share_links_across_peers() {
        let id = TunnelId::new;
        let placed = |id, member| Placed { id, member };
        let all = [
            placed(id(0, 0), Some(7)),
            placed(id(0, 1), Some(8)),
            placed(id(0, 2), Some(7)),
            placed(id(0, 3), None),
            placed(id(1, 0), Some(8)),
        ];
        assert_eq!(
            of_peer(0, &all),
            [
                Path { link: id(0, 0), tunnels: 0b101 },
                Path { link: id(0, 1), tunnels: 0b10 },
                Path { link: id(0, 3), tunnels: 0b1000 }
            ]
        );
        assert_eq!(of_peer(1, &all), [Path { link: id(0, 1), tunnels: 1 }]);
        assert_eq!(of_peer(2, &all), []);
    }
}
