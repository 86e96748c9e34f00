//! Decides which busy buckets move to which link, to relieve the fullest link. Pure.
//!
//! Source: the idea to move elephants is Hedera's (Al-Fares et al., NSDI 2010). Here the choice is by their rates, the
//! best fit first, and only if the two links become clearly more even. Full links are even however many flows share
//! each; then a flow moves to where it shares with fewer.

/// Links that differ by less than this share of the mean load are left alone. A balanced system makes no moves.
const MARGIN: f64 = 0.1;
/// The higher load of the two links must decrease by this share of what is moved. Otherwise the move only exchanges the
/// two links.
const GAIN: f64 = 0.25;
/// Utilisation difference below which no link is worth relieving.
const WORTH: f64 = 0.02;
/// A link with at least this utilisation is full: its flows share it.
const FULL: f64 = 0.8;
/// On a full link that fewer flows share, a flow must have this many times what it has now.
const LARGER_SHARE: f64 = 1.15;
/// Upper bound of the moves in one round. The next round sees their effect.
const MAX_MOVES: usize = 64;

/// A link and its load.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Utilisation: the share of its time that its bytes took. 1 is full.
    pub load: f64,
    /// Utilisation by one byte a second.
    pub cost: f64,
    /// Whether flows may be moved to it.
    pub open: bool,
}

/// A bucket with traffic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Busy {
    pub bucket: u32,
    /// Index of its link.
    pub link: usize,
    /// Bytes a second.
    pub rate: f64,
    /// Whether its packets must stay in order, so that it is never sprayed.
    pub ordered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    pub bucket: u32,
    /// Index of its present link.
    pub from: usize,
    /// Index of its new link.
    pub to: usize,
    /// Bytes a second.
    pub rate: f64,
}

/// The moves of one round. `busy` may be in any order. It must not have buckets that must stay.
pub fn moves(links: &[Link], busy: &[Busy]) -> Vec<Move> {
    let mut links = links.to_vec();
    let mut busy = busy.to_vec();
    let mut moves = Vec::new();
    while moves.len() < MAX_MOVES {
        let Some((at, to)) = best(&links, &busy) else { break };
        let Busy { bucket, link: from, rate, .. } = busy[at];
        links[from].load -= rate * links[from].cost;
        links[to].load += rate * links[to].cost;
        // A bucket moves once a round.
        busy.swap_remove(at);
        moves.push(Move { bucket, from, to, rate });
    }
    if moves.is_empty() { larger_share(&links, &busy).into_iter().collect() } else { moves }
}

/// The flows of a link, as if all were equally large.
#[derive(Clone, Copy, Debug)]
struct Sharers {
    /// Bytes a second of all.
    rate: f64,
    /// How many. Small ones hardly count: the square of the sum through the sum of squares (Jain et al., "A quantitative
    /// measure of fairness and discrimination", DEC-TR-301, 1984).
    count: f64,
}

/// The move that gives a flow of a full link the most, if it gives it clearly more.
fn larger_share(links: &[Link], busy: &[Busy]) -> Option<Move> {
    let sharers: Vec<Sharers> = (0..links.len())
        .map(|link| {
            let rates = || busy.iter().filter(|busy| busy.link == link).map(|busy| busy.rate);
            let (rate, squares) = (rates().sum::<f64>(), rates().map(|rate| rate * rate).sum::<f64>());
            Sharers { rate, count: if squares > 0.0 { rate * rate / squares } else { 0.0 } }
        })
        .collect();
    let full = || (0..links.len()).filter(|at| links[*at].load >= FULL && sharers[*at].count >= 1.0);
    let now = |at: usize| sharers[at].rate / sharers[at].count;
    let then = |at: usize| sharers[at].rate / (sharers[at].count + 1.0);
    let from = full().min_by(|a, b| now(*a).total_cmp(&now(*b)))?;
    let to = full().filter(|at| links[*at].open && *at != from).max_by(|a, b| then(*a).total_cmp(&then(*b)))?;
    if then(to) < LARGER_SHARE * now(from) {
        return None;
    }
    // A flow like the others: a small one would change nothing, and a large one has enough.
    let usual = |busy: &&Busy| (busy.rate - now(from)).abs();
    let of_link = busy.iter().filter(|busy| busy.link == from);
    let Busy { bucket, rate, .. } = *of_link.min_by(|a, b| usual(a).total_cmp(&usual(b)))?;
    Some(Move { bucket, from, to, rate })
}

/// The bucket on the fullest link that can be relieved, and the link that takes it.
fn best(links: &[Link], busy: &[Busy]) -> Option<(usize, usize)> {
    let mean = links.iter().map(|link| link.load).sum::<f64>() / links.len().max(1) as f64;
    let mut order: Vec<usize> = (0..links.len()).collect();
    order.sort_by(|a, b| links[*b].load.total_cmp(&links[*a].load));
    let to = *order.iter().rev().find(|at| links[**at].open)?;
    // Try other links than the fullest too: a link with a single flow cannot be relieved.
    for from in order {
        if links[from].load - links[to].load < (MARGIN * mean).max(WORTH) {
            break;
        }
        let after = |busy: &Busy| {
            let left = links[from].load - busy.rate * links[from].cost;
            left.max(links[to].load + busy.rate * links[to].cost)
        };
        let candidates = busy.iter().enumerate().filter(|(_, busy)| busy.link == from && from != to);
        let gains =
            candidates.filter(|(_, busy)| after(busy) <= links[from].load - GAIN * busy.rate * links[from].cost);
        if let Some((_, at)) = gains.map(|(at, busy)| (after(busy), at)).min_by(|a, b| a.0.total_cmp(&b.0)) {
            return Some((at, to));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Links of 1 byte a second each, with flows of these rates on them.
    fn on(links: &[&[f64]]) -> (Vec<Link>, Vec<Busy>) {
        let mut busy = Vec::new();
        for (link, flows) in links.iter().enumerate() {
            for rate in *flows {
                busy.push(Busy { bucket: u32::try_from(busy.len()).unwrap(), link, rate: *rate, ordered: false });
            }
        }
        let links = links.iter().map(|flows| Link { load: flows.iter().sum(), cost: 1.0, open: true }).collect();
        (links, busy)
    }

    fn moves_of(links: &[&[f64]]) -> Vec<(u32, usize)> {
        let (links, busy) = on(links);
        moves(&links, &busy).iter().map(|m| (m.bucket, m.to)).collect()
    }

    #[test]
    fn two_flows_on_one_link_part_when_another_idles() {
        assert_eq!(moves_of(&[&[0.5, 0.5], &[1.0], &[]]).len(), 1);
        assert_eq!(moves_of(&[&[1.0], &[0.3, 0.3, 0.4], &[]]), [(3, 2)]);
    }

    #[test]
    fn a_balanced_system_makes_no_moves() {
        assert_eq!(moves_of(&[&[1.0], &[1.0], &[1.0]]), []);
        assert_eq!(moves_of(&[&[0.5, 0.5], &[1.0], &[1.0]]), []);
        assert_eq!(moves_of(&[&[0.25, 0.25, 0.25, 0.2], &[0.25; 4], &[0.3, 0.2, 0.25, 0.25]]), []);
        // More flows on one than on another, and no move that helps.
        assert_eq!(moves_of(&[&[1.0, 1.0], &[1.0], &[1.0]]), []);
        // Hardly any traffic.
        assert_eq!(moves_of(&[&[0.005, 0.005], &[]]), []);
        assert_eq!(moves_of(&[]), []);
    }

    #[test]
    fn a_flow_moves_to_the_full_link_that_fewer_share() {
        let moved = |links: &[&[f64]]| moves_of(links);
        assert_eq!(moved(&[&[0.2; 5], &[0.25; 4], &[0.33; 3]]), [(0, 2)]);
        assert_eq!(moved(&[&[0.25; 4], &[0.25; 4], &[0.25; 4]]), []);
        // One more than the others is as even as can be.
        assert_eq!(moved(&[&[0.2; 5], &[0.25; 4], &[0.25; 4]]), []);
        assert_eq!(moved(&[&[1.0 / 3.0; 3], &[0.5; 2]]), []);
        // A flow with many small ones beside it shares with about one other.
        let small = [&[0.7][..], &[0.015; 20]].concat();
        assert_eq!(moved(&[&small, &[0.5, 0.5], &[0.5, 0.5]]), []);
        assert_eq!(moved(&[&[0.05, 0.2, 0.2, 0.2, 0.3], &[0.98]]), [(1, 1)], "neither the small one nor the large one");
        // Where links are not full, flows have what they ask for.
        assert_eq!(moved(&[&[0.1; 5], &[0.25; 2]]), []);
    }

    #[test]
    fn an_elephant_alone_stays() {
        assert_eq!(moves_of(&[&[1.0], &[], &[]]), []);
    }

    #[test]
    fn links_of_unequal_rate_fill_alike() {
        let (mut links, _) = on(&[&[], &[]]);
        (links[0].cost, links[1].cost) = (1.0, 4.0);
        let busy: Vec<Busy> = (0..10).map(|bucket| Busy { bucket, link: 1, rate: 0.1, ordered: false }).collect();
        links[1].load = 4.0;
        let moves = moves(&links, &busy);
        let kept = 10 - moves.len();
        assert!((1..=3).contains(&kept), "{kept} stay on the slow link");
    }

    #[test]
    fn nothing_goes_to_a_link_that_is_closed() {
        let (mut links, busy) = on(&[&[0.5, 0.5], &[]]);
        links[1].open = false;
        assert_eq!(moves(&links, &busy), []);
    }

    #[test]
    fn moves_settle() {
        // Whatever the start, a few rounds end in a state that the next one leaves alone.
        let mut state = 7u64;
        for _ in 0..200 {
            let mut random = || {
                state = ecmpvpn_common::flow::mix(state);
                (state >> 11) as f64 / (1u64 << 53) as f64
            };
            let flows: Vec<Vec<f64>> = (0..4).map(|_| (0..8).map(|_| random() * 0.1).collect()).collect();
            let (mut links, mut busy) = on(&flows.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let mut rounds = 0;
            loop {
                let moves = moves(&links, &busy);
                if moves.is_empty() {
                    break;
                }
                for m in &moves {
                    links[m.from].load -= m.rate;
                    links[m.to].load += m.rate;
                    busy.iter_mut().find(|busy| busy.bucket == m.bucket).unwrap().link = m.to;
                }
                rounds += 1;
                assert!(rounds < 5);
            }
            let peak = links.iter().map(|link| link.load).fold(0.0, f64::max);
            let mean = links.iter().map(|link| link.load).sum::<f64>() / 4.0;
            assert!(peak / mean < 1.2, "{}", peak / mean);
        }
    }
}
