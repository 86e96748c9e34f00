//! The steering decision: which tunnel a packet takes. Pure: the maps are behind [`Tables`].

use crate::layout::{Bucket, Destination, Peer, Reason, Settings, Tunnel, settings_flags, tunnel_id};
use crate::packet::{Packet, Parsed, Transport, parse};
use crate::rendezvous;

/// What the decision looks up. `None` where there is no such entry.
pub trait Tables {
    /// What holds for all peers.
    fn settings(&self) -> Option<&Settings>;
    /// The peer whose prefix matches longest.
    fn peer_of(&self, destination: &Destination) -> Option<u32>;
    /// A peer by its number.
    fn peer(&self, peer: u32) -> Option<&Peer>;
    /// A tunnel by its id.
    fn tunnel(&self, id: u32) -> Option<&Tunnel>;
    /// A bucket by its place among all peers' buckets.
    fn bucket(&self, index: u32) -> Option<&Bucket>;

    /// The slot that ranks first in a peer's bucket among `live` ones, or [`rendezvous::NONE`].
    fn best(&self, peer: u32, within: u32, live: u32) -> u32 {
        best(self, peer, within, live)
    }
}

/// The tunnel that a packet takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steer {
    /// The tunnel's id.
    pub tunnel: u32,
    /// Its interface's index, never 0.
    pub ifindex: u32,
    /// The bucket, by its place among all peers' buckets.
    pub bucket: u32,
    /// Whether the bucket came to this tunnel just now, because its former one died or its home came back.
    pub failover: bool,
    /// The packet's transport header.
    pub transport: Transport,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to a tunnel.
    Steer(Steer),
    /// It is none of ours and goes on.
    NotSteered(Reason),
    /// It is a peer's and cannot be sent.
    Dropped(Reason),
}

/// Decides for the packet; notes in its bucket which tunnel it takes.
#[inline(always)]
pub fn decide<P: Packet + ?Sized, T: Tables + ?Sized>(packet: &P, tables: &T) -> Verdict {
    match try_decide(packet, tables) {
        Ok(steer) => Verdict::Steer(steer),
        Err(reason) if reason.is_drop() => Verdict::Dropped(reason),
        Err(reason) => Verdict::NotSteered(reason),
    }
}

#[inline(always)]
fn try_decide<P: Packet + ?Sized, T: Tables + ?Sized>(packet: &P, tables: &T) -> Result<Steer, Reason> {
    let Parsed { key, destination, transport } = parse(packet)?;
    let number = tables.peer_of(&destination).ok_or(Reason::NoPeer)?;
    let peer = tables.peer(number).ok_or(Reason::BadTable)?;
    let settings = tables.settings().ok_or(Reason::BadTable)?;
    let symmetric = settings.flags & settings_flags::SYMMETRIC != 0;
    let hash = key.hash(settings.seed, settings.hash_fields, symmetric);

    let within = hash as u32 & peer.bucket_mask;
    let index = peer.bucket_base.wrapping_add(within);
    let bucket = tables.bucket(index).ok_or(Reason::BadTable)?;
    let slot = by_hash(tables, number, peer, within, bucket)?;
    let id = tunnel_id(number, slot);
    let tunnel = tables.tunnel(id).filter(|tunnel| tunnel.ifindex != 0).ok_or(Reason::BadTable)?;

    let failover = u32::from(bucket.tunnel.get()) != slot;
    if failover {
        bucket.tunnel.set(slot as u8);
    }
    Ok(Steer { tunnel: id, ifindex: tunnel.ifindex, bucket: index, failover, transport })
}

/// Policy `hash`: the bucket's home, or while that is down the best of the live tunnels.
#[inline(always)]
fn by_hash<T: Tables + ?Sized>(
    tables: &T,
    number: u32,
    peer: &Peer,
    within: u32,
    bucket: &Bucket,
) -> Result<u32, Reason> {
    let live = peer.live.get();
    let home = u32::from(bucket.home.get());
    if live.checked_shr(home).unwrap_or(0) & 1 == 1 {
        return Ok(home);
    }
    match tables.best(number, within, live) {
        rendezvous::NONE => Err(Reason::NoLiveTunnel),
        slot => Ok(slot),
    }
}

/// What [`Tables::best`] does. BPF makes a function of its own of it, which the verifier looks at only once.
#[inline(always)]
pub fn best<T: Tables + ?Sized>(tables: &T, peer: u32, within: u32, live: u32) -> u32 {
    rendezvous::pick(within, live, |slot| tables.tunnel(tunnel_id(peer, slot)).map(Tunnel::candidate))
}
