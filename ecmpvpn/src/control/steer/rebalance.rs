//! Decides which busy buckets move to which link, to relieve the fullest link. Pure.
//!
//! Source: the idea to move elephants is Hedera's (Al-Fares et al., NSDI 2010). Here the choice is by their rates, the
//! best fit first, and only if the two links become clearly more even.

/// Links that differ by less than this share of the mean load are left alone. A balanced system makes no moves.
const MARGIN: f64 = 0.1;
/// The higher load of the two links must decrease by this share of what is moved. Otherwise the move only exchanges the
/// two links.
const GAIN: f64 = 0.25;
/// Utilisation difference below which no link is worth relieving.
const WORTH: f64 = 0.02;
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
    moves
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
