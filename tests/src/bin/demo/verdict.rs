//! Describes the results in words. Every sentence follows from the figures. Pure.

use crate::cut::Cut;
use crate::measured::{Measured, Row};
use crate::plan::MEMBERS;

/// A ratio below this counts as no gain.
const NOTHING: f64 = 1.1;
/// From this share of their capacity on, the links count as full.
const FULL: f64 = 0.95;
/// Columns of a line.
const WIDTH: usize = 100;

/// The sentences, in order.
pub fn of(measured: &Measured) -> [String; 5] {
    [
        one_tunnel(measured),
        usual_recipe(measured),
        planned_ports(measured),
        ecmpvpn(measured),
        cut(&measured.planned.cuts),
    ]
}

fn one_tunnel(measured: &Measured) -> String {
    let goodputs = measured.usual.one_tunnel.transfers.iter().map(|transfer| transfer.goodput);
    let best = goodputs.clone().fold(0.0, f64::max);
    let worst = goodputs.fold(f64::INFINITY, f64::min);
    let range = if best < worst * NOTHING { format!("{best:.1}") } else { format!("{worst:.1} to {best:.1}") };
    format!("One tunnel carries {range} Mbit/s: all its packets take one of the {MEMBERS} links.")
}

fn usual_recipe(measured: &Measured) -> String {
    let ratios = measured.ratios(&measured.usual.recipe);
    let best = ratios.iter().copied().fold(0.0, f64::max);
    let gain = if best < NOTHING { "gains nothing".to_owned() } else { format!("carries up to {best:.2} times that") };
    let all = measured.usual.links.len();
    let why = match distinct(&measured.usual.links).as_slice() {
        [one] => format!("with equal ports all {all} tunnels leave by link {one}"),
        some => format!("its {all} tunnels leave by {} of {MEMBERS} links", some.len()),
    };
    format!("The usual recipe {gain}: {why}.")
}

fn planned_ports(measured: &Measured) -> String {
    let (ecmp, all) = (&measured.planned.ecmp, measured.planned.links.len());
    let spread = match distinct(&measured.planned.links).len() {
        some if some == all => "Planned ports give each tunnel a link of its own".to_owned(),
        some => format!("The planned ports spread {all} tunnels over {some} links"),
    };
    // As many flows as there are links could fill all of them.
    let even = ecmp.transfers.iter().find(|transfer| transfer.flows == usize::from(MEMBERS));
    let blindness = even.map_or_else(String::new, |even| {
        let chance_of_all = chance_of_all() * 100.0;
        let met = even.links_used();
        format!(
            "; its hash ignores load: {MEMBERS} flows used {met} of {MEMBERS} links, and use all in {chance_of_all:.0}% of cases"
        )
    });
    format!("{spread}. Kernel ECMP then carries {}{blindness}.", times(measured, ecmp))
}

fn ecmpvpn(measured: &Measured) -> String {
    let row = &measured.planned.ecmpvpn;
    let ratios = measured.ratios(row);
    let filled = row.transfers.iter().zip(&ratios).filter(|(_, ratio)| **ratio >= FULL * f64::from(MEMBERS));
    let filled: Vec<String> = filled.map(|(transfer, _)| transfer.flows.to_string()).collect();
    let outcome = match filled.len() {
        0 => "the links are never full".to_owned(),
        all if all == ratios.len() => "all links are full each time".to_owned(),
        _ => format!("all links are full with {}", listed(&filled)),
    };
    let lone = row.transfers.iter().zip(&ratios).find(|(transfer, ratio)| transfer.flows == 1 && **ratio >= NOTHING);
    let lone = lone.map_or_else(String::new, |(transfer, _)| {
        let lead = transfer.lead.as_secs_f64();
        format!(". A lone flow, measured from {lead} s on, is spread over the links once it fills one")
    });
    format!("ecmpvpn puts flows where there is room, and carries {}: {outcome}{lone}.", times(measured, row))
}

fn cut([ecmp, ecmpvpn]: &[Cut; 2]) -> String {
    let became = |who: &str, cut: &Cut| match cut.gap {
        Some(gap) => format!("{who} carried the {} interrupted flows again after {} ms", cut.hit, gap.as_millis()),
        None => format!("{who} did not recover, and {} of {} flows stood still the whole time", cut.dead, cut.flows),
    };
    let (tunnel, seconds) = (&ecmp.tunnel, ecmp.open.as_secs());
    format!("{tunnel} cut for {seconds} s: {}; {}.", became("ECMP", ecmp), became("ecmpvpn", ecmpvpn))
}

/// `1.00, 2.00 and 3.00 times as much as one tunnel with 1, 3 and 12 flows`
fn times(measured: &Measured, row: &Row) -> String {
    let ratios: Vec<String> = measured.ratios(row).iter().map(|ratio| format!("{ratio:.2}")).collect();
    let counts: Vec<String> = row.transfers.iter().map(|transfer| transfer.flows.to_string()).collect();
    format!("{} times as much as one tunnel with {} flows", listed(&ratios), listed(&counts))
}

/// `a, b and c`
fn listed(words: &[String]) -> String {
    match words {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// The probability that as many flows as there are links use all of them, if each link is chosen at random.
fn chance_of_all() -> f64 {
    (1..=MEMBERS).map(|n| f64::from(n) / f64::from(MEMBERS)).product()
}

fn distinct(links: &[usize]) -> Vec<usize> {
    let mut links = links.to_vec();
    links.sort_unstable();
    links.dedup();
    links
}

/// Wraps a sentence into lines of at most [`WIDTH`] columns. All lines but the first are indented.
pub fn wrapped(sentence: &str) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in sentence.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > WIDTH {
            text.push_str("\n  ");
            column = 2;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::measured::{Planned, Transfer, Usual, Way};

    /// A way's goodput with 1, 3 and 12 flows. One link is used for each 10 Mbit/s.
    fn row(way: Way, goodputs: [f64; 3]) -> Row {
        let transfer = |(flows, goodput): (usize, f64)| {
            let links = [10.0, 20.0, 30.0].map(|full| if goodput >= full - 1.0 { 1_000_000 } else { 400 });
            let lead = Duration::from_secs(if flows == 1 { 3 } else { 2 });
            Transfer { flows, lead, goodput, tunnels: links.into(), links: links.into() }
        };
        Row { way, transfers: [1, 3, 12].into_iter().zip(goodputs).map(transfer).collect() }
    }

    fn measured() -> Measured {
        let cut = |dead, gap| Cut {
            tunnel: "wg1".to_owned(),
            open: Duration::from_millis(5_003),
            flows: 32,
            hit: 11,
            dead,
            gap,
        };
        Measured {
            title: "3 links".to_owned(),
            usual: Usual {
                links: vec![0, 0, 0],
                one_tunnel: row(Way::OneTunnel, [10.0, 9.9, 10.0]),
                recipe: row(Way::UsualRecipe, [10.0, 10.0, 9.8]),
            },
            planned: Planned {
                links: vec![2, 1, 0],
                ecmp: row(Way::Ecmp, [10.0, 19.8, 29.8]),
                ecmpvpn: row(Way::Ecmpvpn, [24.0, 29.7, 29.9]),
                cuts: [cut(11, None), cut(0, Some(Duration::from_millis(187)))],
            },
        }
    }

    #[test]
    fn the_usual_outcome_in_words() {
        let expected = [
            "One tunnel carries 10.0 Mbit/s: all its packets take one of the 3 links.",
            "The usual recipe gains nothing: with equal ports all 3 tunnels leave by link 0.",
            "Planned ports give each tunnel a link of its own. Kernel ECMP then carries 1.00, 2.00 and 2.98 times as \
             much as one tunnel with 1, 3 and 12 flows; its hash ignores load: 3 flows used 2 of 3 links, and use \
             all in 22% of cases.",
            "ecmpvpn puts flows where there is room, and carries 2.40, 3.00 and 2.99 times as much as one tunnel with \
             1, 3 and 12 flows: all links are full with 3 and 12. A lone flow, measured from 3 s on, is spread over \
             the links once it fills one.",
            "wg1 cut for 5 s: ECMP did not recover, and 11 of 32 flows stood still the whole time; ecmpvpn carried the \
             11 interrupted flows again after 187 ms.",
        ];
        assert_eq!(of(&measured()), expected);
    }

    #[test]
    fn what_turns_out_otherwise_is_said_so() {
        let mut measured = measured();
        measured.usual.one_tunnel = row(Way::OneTunnel, [8.0, 10.0, 10.0]);
        measured.usual.links = vec![1, 0, 1];
        measured.usual.recipe = row(Way::UsualRecipe, [8.0, 15.0, 20.0]);
        measured.planned.links = vec![2, 1, 2];
        measured.planned.ecmp = row(Way::Ecmp, [8.0, 30.0, 30.0]);
        measured.planned.ecmpvpn = row(Way::Ecmpvpn, [8.0, 20.0, 5.0]);
        measured.planned.cuts.swap(0, 1);
        let expected = [
            "One tunnel carries 8.0 to 10.0 Mbit/s: all its packets take one of the 3 links.",
            "The usual recipe carries up to 2.00 times that: its 3 tunnels leave by 2 of 3 links.",
            "The planned ports spread 3 tunnels over 2 links. Kernel ECMP then carries 1.00, 3.00 and 3.00 times as \
             much as one tunnel with 1, 3 and 12 flows; its hash ignores load: 3 flows used 3 of 3 links, and use \
             all in 22% of cases.",
            "ecmpvpn puts flows where there is room, and carries 1.00, 2.00 and 0.50 times as much as one tunnel with \
             1, 3 and 12 flows: the links are never full.",
            "wg1 cut for 5 s: ECMP carried the 11 interrupted flows again after 187 ms; ecmpvpn did not recover, and \
             11 of 32 flows stood still the whole time.",
        ];
        assert_eq!(of(&measured), expected);
    }

    #[test]
    fn lines_are_not_too_long_and_lose_no_word() {
        for sentence in of(&measured()) {
            let text = wrapped(&sentence);
            assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
            assert_eq!(text.split_whitespace().collect::<Vec<_>>().join(" "), sentence);
        }
    }
}
