//! Which tunnels leave by one link. Pure.

/// A tunnel and the link that its outer packets leave by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The tunnel's id.
    pub id: u32,
    /// The peer's number.
    pub peer: u32,
    /// Its place among the peer's tunnels.
    pub slot: u32,
    /// The bond member's interface index; `None`: it is taken to have a link of its own.
    pub member: Option<u32>,
}

/// One of a peer's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Id of the tunnel whose load counts for all: the first of any peer's on that link.
    pub link: u32,
    /// The peer's tunnels on it, a bit a slot.
    pub tunnels: u32,
}

/// The id of the tunnel whose load counts for `tunnel`.
pub fn link_of(tunnel: &Placed, all: &[Placed]) -> u32 {
    match tunnel.member {
        Some(_) => all.iter().filter(|other| other.member == tunnel.member).map(|other| other.id).min(),
        None => None,
    }
    .unwrap_or(tunnel.id)
}

/// A peer's links, in the order of their first tunnels.
pub fn of_peer(peer: u32, all: &[Placed]) -> Vec<Path> {
    let mut paths: Vec<Path> = Vec::new();
    for tunnel in all.iter().filter(|tunnel| tunnel.peer == peer) {
        let link = link_of(tunnel, all);
        match paths.iter_mut().find(|path| path.link == link) {
            Some(path) => path.tunnels |= 1 << tunnel.slot,
            None => paths.push(Path { link, tunnels: 1 << tunnel.slot }),
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_share_links_across_peers() {
        let placed = |id: u32, member| Placed { id, peer: id / 32, slot: id % 32, member };
        let all = [placed(0, Some(7)), placed(1, Some(8)), placed(2, Some(7)), placed(3, None), placed(32, Some(8))];
        assert_eq!(
            of_peer(0, &all),
            [Path { link: 0, tunnels: 0b101 }, Path { link: 1, tunnels: 0b10 }, Path { link: 3, tunnels: 0b1000 }]
        );
        assert_eq!(of_peer(1, &all), [Path { link: 1, tunnels: 1 }]);
        assert_eq!(of_peer(2, &all), []);
    }
}
