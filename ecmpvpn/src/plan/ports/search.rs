//! Local search for ports with an even spread in all four views at once.
//!
//! A tunnel's ports determine its member in each view. The search looks for N tunnels whose members are even in every
//! view, with no port used twice at one end. It starts from equal ports. In each step one tunnel takes a free port, or
//! swaps its port with another tunnel, so that the views become most even. A rare random step leads out of dead ends.
//! Few ports near the base port are tried first, then more. The random numbers are seeded by the request: the same
//! request gives the same ports.

use std::collections::{BTreeMap, BTreeSet};

use super::{End, LOWEST_PORT, PortPair, RESERVED_PORTS};
use crate::config::{MAX_MEMBERS, XmitHashPolicy};
use crate::plan::bond_hash::{self, OuterFlow};

/// The tries, in this order: number of candidate ports at each end beyond the number of tunnels, and steps for each
/// tunnel.
const TRIES: [(usize, usize); 8] =
    [(0, 24), (1, 24), (2, 24), (4, 24), (8, 16), (NEAR, 8), (NEAR + 24, 6), (NEAR + FAR, 4)];

/// Number of candidates beyond the number of tunnels that are simply the nearest ports.
const NEAR: usize = 16;

/// Number of candidates from further away, [`FAR_EACH`] of each 256 ports. All near ports share their upper byte. With
/// some addresses this makes the bytes of the hash add up to the same value, and no near port reaches certain members.
const FAR: usize = 96;
const FAR_EACH: usize = 4;

/// One step in this many takes random ports instead of the best ones.
const RANDOM_STEP: usize = 16;

/// The ports that one end may use, in the order of the search: from `base` upwards, then downwards.
fn allowed(base: u16, excluded: &BTreeSet<u16>) -> impl Iterator<Item = u16> {
    (base..=u16::MAX)
        .chain((LOWEST_PORT..base).rev())
        .filter(|port| !RESERVED_PORTS.contains(port) && !excluded.contains(port))
}

/// The candidates near `base`: [`NEAR`] more than `tunnels`, if there are as many.
pub(super) fn near(base: u16, tunnels: usize, excluded: &BTreeSet<u16>) -> Vec<u16> {
    allowed(base, excluded).take(tunnels + NEAR).collect()
}

/// The candidates that are tried after `near`.
fn far(base: u16, near: &[u16], excluded: &BTreeSet<u16>) -> Vec<u16> {
    let mut taken: BTreeMap<u16, usize> = near.iter().map(|port| (port >> 8, FAR_EACH)).collect();
    let far = allowed(base, excluded).skip(near.len()).filter(|port| {
        let taken = taken.entry(port >> 8).or_default();
        *taken += 1;
        *taken <= FAR_EACH
    });
    far.take(FAR).collect()
}

/// The most even pairs found, sorted. `ports` has the near candidates of each end, at least `tunnels` each.
pub(super) fn search(first: &End, second: &End, tunnels: usize, base: u16, mut ports: [Vec<u16>; 2]) -> Vec<PortPair> {
    let mut random = Random::new(first, second, tunnels, &ports);
    let mut best: Option<(u32, Vec<PortPair>)> = None;
    let mut tried = (0, 0);
    for (slack, steps) in TRIES {
        if slack > NEAR && ports[0].len().max(ports[1].len()) <= tunnels + NEAR {
            for (end, ports) in [first, second].into_iter().zip(&mut ports) {
                let far = far(base, ports, &end.excluded);
                ports.extend(far);
            }
        }
        let width = (ports[0].len().min(tunnels + slack), ports[1].len().min(tunnels + slack));
        if width == tried {
            continue;
        }
        tried = width;
        let window = [&ports[0][..width.0], &ports[1][..width.1]];
        let mut state = State::new(Members::new(first, second, window), window, tunnels);
        state.descend(tunnels * steps, &mut random);
        if best.as_ref().is_none_or(|(excess, _)| state.excess() < *excess) {
            best = Some((state.excess(), state.pairs(window)));
        }
        if best.as_ref().is_some_and(|(excess, _)| *excess == 0) {
            break;
        }
    }
    best.map(|(_, pairs)| pairs).unwrap_or_default()
}

/// The member of each pair in each of the four views. A view that does not depend on ports counts as one member.
struct Members {
    counts: [u8; 4],
    of_pair: Vec<[u8; 4]>,
    width: usize,
}

impl Members {
    fn new(first: &End, second: &End, window: [&[u16]; 2]) -> Self {
        let count = |from: &End, to: &End, less| {
            if from.spreads_by_ports(to) { from.members - less } else { 1 }
        };
        let counts =
            [count(first, second, 0), count(first, second, 1), count(second, first, 0), count(second, first, 1)];
        let hash = |from: &End, to: &End, sport, dport| {
            let flow = OuterFlow { src: from.address, dst: to.address, sport, dport, macs: None };
            // Only `layer3+4` reads ports. The other views have one member, so any hash will do.
            bond_hash::hash(XmitHashPolicy::Layer34, &flow).unwrap_or(0)
        };
        let mut of_pair = Vec::with_capacity(window[0].len() * window[1].len());
        for &a in window[0] {
            for &b in window[1] {
                let (there, back) = (hash(first, second, a, b), hash(second, first, b, a));
                let hashes = [there, there, back, back];
                of_pair.push(std::array::from_fn(|view| bond_hash::slot(hashes[view], counts[view])));
            }
        }
        Self { counts, of_pair, width: window[1].len() }
    }

    fn of(&self, (a, b): (usize, usize)) -> [u8; 4] {
        self.of_pair[a * self.width + b]
    }
}

/// The ports of a tunnel, by position in the window.
type Position = (usize, usize);

/// The present ports of the tunnels, and their spread.
struct State {
    members: Members,
    tunnels: Vec<Position>,
    /// Ports without a tunnel, at each end.
    free: [Vec<usize>; 2],
    loads: [[u32; MAX_MEMBERS as usize]; 4],
    /// The sum of the squares of all loads, and its value when every view is even. The sum is smallest exactly then.
    squares: u32,
    least: u32,
}

/// A change of one tunnel's ports.
#[derive(Clone, Copy)]
enum Move {
    /// To free ports, by position in the lists of free ports. `None`: this port stays.
    Relocate(Option<usize>, Option<usize>),
    /// The two tunnels exchange their ports at the second end.
    Swap(usize),
}

impl State {
    /// Starts with the nearest ports, the same at both ends if possible.
    fn new(members: Members, window: [&[u16]; 2], tunnels: usize) -> Self {
        let total = u32::try_from(tunnels).expect("at most MAX_TUNNELS_PER_PEER");
        let least = members.counts.iter().map(|&count| {
            let (even, extra) = (total / u32::from(count), total % u32::from(count));
            extra * (even + 1).pow(2) + (u32::from(count) - extra) * even.pow(2)
        });
        let mut state = Self {
            least: least.sum(),
            members,
            tunnels: (0..tunnels).map(|at| (at, at)).collect(),
            free: [(tunnels..window[0].len()).collect(), (tunnels..window[1].len()).collect()],
            loads: [[0; MAX_MEMBERS as usize]; 4],
            squares: 0,
        };
        for at in 0..tunnels {
            state.add((at, at));
        }
        state
    }

    /// 0 if and only if every view is even.
    fn excess(&self) -> u32 {
        self.squares - self.least
    }

    fn pairs(&self, window: [&[u16]; 2]) -> Vec<PortPair> {
        let mut pairs: Vec<_> =
            self.tunnels.iter().map(|&(a, b)| PortPair { a: window[0][a], b: window[1][b] }).collect();
        pairs.sort_unstable();
        pairs
    }

    /// What a tunnel at `at` would add to `squares`.
    fn cost(&self, at: Position) -> u32 {
        let members = self.members.of(at);
        (0..4).map(|view| 2 * self.loads[view][usize::from(members[view])] + 1).sum()
    }

    fn add(&mut self, at: Position) {
        self.squares += self.cost(at);
        for (view, member) in self.members.of(at).into_iter().enumerate() {
            self.loads[view][usize::from(member)] += 1;
        }
    }

    fn remove(&mut self, at: Position) {
        for (view, member) in self.members.of(at).into_iter().enumerate() {
            self.loads[view][usize::from(member)] -= 1;
        }
        self.squares -= self.cost(at);
    }

    fn make(&mut self, tunnel: usize, change: Move) {
        let mut at = self.tunnels[tunnel];
        self.remove(at);
        match change {
            Move::Relocate(first, second) => {
                if let Some(free) = first {
                    std::mem::swap(&mut at.0, &mut self.free[0][free]);
                }
                if let Some(free) = second {
                    std::mem::swap(&mut at.1, &mut self.free[1][free]);
                }
            }
            Move::Swap(other) => {
                let mut there = self.tunnels[other];
                self.remove(there);
                std::mem::swap(&mut at.1, &mut there.1);
                self.add(there);
                self.tunnels[other] = there;
            }
        }
        self.add(at);
        self.tunnels[tunnel] = at;
    }

    fn make_random(&mut self, tunnel: usize, random: &mut Random) {
        let other = random.below(self.tunnels.len());
        if other != tunnel {
            self.make(tunnel, Move::Swap(other));
        }
        let mut any = |free: &Vec<usize>| Some(random.below(free.len() + 1)).filter(|at| *at < free.len());
        let change = Move::Relocate(any(&self.free[0]), any(&self.free[1]));
        self.make(tunnel, change);
    }

    /// Makes the views more even until they are perfect or the steps are used up. Ends in the most even state seen.
    fn descend(&mut self, steps: usize, random: &mut Random) {
        let mut best = (self.squares, self.tunnels.clone(), self.free.clone());
        for _ in 0..steps {
            if self.excess() == 0 {
                return;
            }
            let tunnel = random.below(self.tunnels.len());
            if random.below(RANDOM_STEP) == 0 {
                self.make_random(tunnel, random);
            } else {
                self.improve(tunnel, random);
            }
            if self.squares < best.0 {
                best = (self.squares, self.tunnels.clone(), self.free.clone());
            }
        }
        if self.squares > best.0 {
            for at in std::mem::replace(&mut self.tunnels, best.1) {
                self.remove(at);
            }
            for at in self.tunnels.clone() {
                self.add(at);
            }
            self.free = best.2;
        }
    }

    /// Makes the change of `tunnel` that makes the views most even; one at random if several are equally good. Does
    /// nothing if all changes make them less even.
    fn improve(&mut self, tunnel: usize, random: &mut Random) {
        let at = self.tunnels[tunnel];
        let before = self.squares;
        self.remove(at);
        let base = self.squares;
        let mut best = Best { squares: before, change: None, ties: 0 };
        for first in (0..self.free[0].len()).map(Some).chain([None]) {
            let a = first.map_or(at.0, |free| self.free[0][free]);
            for second in (0..self.free[1].len()).map(Some).chain([None]) {
                if first.is_some() || second.is_some() {
                    let b = second.map_or(at.1, |free| self.free[1][free]);
                    best.offer(base + self.cost((a, b)), Move::Relocate(first, second), random);
                }
            }
        }
        for other in (0..self.tunnels.len()).filter(|other| *other != tunnel) {
            let there = self.tunnels[other];
            let (new, new_there) = ((at.0, there.1), (there.0, at.1));
            self.remove(there);
            self.add(new_there);
            best.offer(self.squares + self.cost(new), Move::Swap(other), random);
            self.remove(new_there);
            self.add(there);
        }
        self.add(at);
        if let Some(change) = best.change {
            self.make(tunnel, change);
        }
    }
}

/// The best change seen. Each of several equal ones has the same chance.
struct Best {
    squares: u32,
    change: Option<Move>,
    ties: usize,
}

impl Best {
    fn offer(&mut self, squares: u32, change: Move, random: &mut Random) {
        if squares < self.squares {
            (self.squares, self.change, self.ties) = (squares, Some(change), 1);
        } else if squares == self.squares {
            self.ties += 1;
            if random.below(self.ties) == 0 {
                self.change = Some(change);
            }
        }
    }
}

/// `SplitMix64` (Steele, Lea, Flood 2014), seeded by the request.
pub(super) struct Random(u64);

impl Random {
    fn new(first: &End, second: &End, tunnels: usize, ports: &[Vec<u16>; 2]) -> Self {
        let mut seed = Self(tunnels as u64);
        for (end, ports) in [(first, &ports[0]), (second, &ports[1])] {
            let address = match end.address {
                std::net::IpAddr::V4(v4) => u128::from(v4.to_bits()),
                std::net::IpAddr::V6(v6) => v6.to_bits(),
            };
            let (high, low) = ((address >> 64) & u128::from(u64::MAX), address & u128::from(u64::MAX));
            for word in [low, high, u128::from(end.members), u128::from(ports[0])] {
                seed.0 ^= u64::try_from(word).expect("64 bits of an address");
                seed.next();
            }
        }
        seed
    }

    pub(super) fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }
}
