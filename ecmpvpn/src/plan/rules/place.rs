//! Which bit a rule has, and the steps from the rules in force to other rules.

use std::ops::Range;

use ecmpvpn_common::layout::MAX_RULES;

use super::Placed;
use crate::config::Rule;

/// There are more rules than bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there would be {count} rules and pins: at most {MAX_RULES} are possible; delete some first")]
pub struct TooManyRules {
    /// Number of requested rules.
    pub count: usize,
}

/// The first bits of `rules`: evenly distributed over all 64.
///
/// # Errors
/// There are more than [`MAX_RULES`] rules.
pub fn place(rules: &[Rule]) -> Result<Vec<Placed>, TooManyRules> {
    let count = fitting(rules)?;
    let bit = |at: u32| (2 * at + 1) * MAX_RULES / (2 * count);
    Ok((0..).zip(rules).map(|(at, rule)| Placed { bit: bit(at), rule: rule.clone() }).collect())
}

fn fitting(rules: &[Rule]) -> Result<u32, TooManyRules> {
    let too_many = TooManyRules { count: rules.len() };
    u32::try_from(rules.len()).ok().filter(|count| *count <= MAX_RULES).ok_or(too_many)
}

/// A rule between the state in force and the desired state.
#[derive(Clone)]
struct Item {
    placed: Placed,
    /// Its position among the desired rules. `None`: it will be removed.
    desired: Option<usize>,
}

/// The steps from the rules in force to `desired`, both in canonical form. Each element is the rules in force after a
/// step; the last one is `desired`. No step gives a bit that is in use to another rule. A rule that stays keeps its bit
/// if possible.
///
/// # Errors
/// There are more than [`MAX_RULES`] rules.
pub fn steps(from: &[Placed], desired: &[Rule]) -> Result<Vec<Vec<Placed>>, TooManyRules> {
    fitting(desired)?;
    let kept = kept_places(from, desired);
    let desired_at = |at: usize| kept.iter().position(|kept| *kept == Some(at));
    let mut now: Vec<Item> =
        (0..).zip(from).map(|(at, placed)| Item { placed: placed.clone(), desired: desired_at(at) }).collect();
    let mut steps = Vec::new();
    let added = kept.iter().filter(|kept| kept.is_none()).count();
    if from.len() + added > MAX_RULES as usize {
        now.retain(|item| item.desired.is_some());
        steps.push(in_force(&now));
    }
    let mut at = 0;
    for (position, rule) in desired.iter().enumerate() {
        if let Some(stays) = now.iter().position(|item| item.desired == Some(position)) {
            at = stays + 1;
            continue;
        }
        if gap(&now, at).is_empty() {
            make_room(&mut now, at, &mut steps);
        }
        let bit = chosen(&gap(&now, at), at == 0, at == now.len());
        now.insert(at, Item { placed: Placed { bit, rule: rule.clone() }, desired: Some(position) });
        at += 1;
    }
    now.retain(|item| item.desired.is_some());
    steps.push(in_force(&now));
    Ok(steps)
}

fn in_force(now: &[Item]) -> Vec<Placed> {
    now.iter().map(|item| item.placed.clone()).collect()
}

/// For each desired rule, the position of the same rule in force, if it is kept: a longest common subsequence.
fn kept_places(from: &[Placed], desired: &[Rule]) -> Vec<Option<usize>> {
    let mut longest = vec![vec![0u32; from.len() + 1]; desired.len() + 1];
    for (w, rule) in desired.iter().enumerate().rev() {
        for (f, placed) in from.iter().enumerate().rev() {
            let both = if placed.rule == *rule { longest[w + 1][f + 1] + 1 } else { 0 };
            longest[w][f] = both.max(longest[w + 1][f]).max(longest[w][f + 1]);
        }
    }
    let (mut kept, mut f) = (vec![None; desired.len()], 0);
    for (w, rule) in desired.iter().enumerate() {
        while f < from.len() && longest[w][f] == longest[w][f + 1] {
            f += 1;
        }
        if f < from.len() && from[f].rule == *rule && longest[w][f] == longest[w + 1][f + 1] + 1 {
            kept[w] = Some(f);
            f += 1;
        }
    }
    kept
}

/// The free bits between the rules before and after position `at`.
fn gap(now: &[Item], at: usize) -> Range<u32> {
    let low = at.checked_sub(1).map_or(0, |before| now[before].placed.bit + 1);
    low..now.get(at).map_or(MAX_RULES, |behind| behind.placed.bit)
}

/// The bit for a rule that is inserted into a gap. Before the first and after the last rule, most of the gap stays free
/// for later rules.
fn chosen(free: &Range<u32>, first: bool, last: bool) -> u32 {
    let length = free.end - free.start;
    match (first, last) {
        (true, false) => free.end - length.div_ceil(8),
        (false, true) => free.start + length.div_ceil(8) - 1,
        _ => free.start + (length - 1) / 2,
    }
}

/// Moves the rules next to position `at` towards the nearest free bit, one rule in each step.
fn make_room(now: &mut [Item], at: usize, steps: &mut Vec<Vec<Placed>>) {
    let run = |behind: bool| {
        let mut length = 0;
        loop {
            let position = if behind { at.checked_add(length) } else { at.checked_sub(length) };
            let position = position?;
            if !gap(now, position).is_empty() {
                return Some(length);
            }
            if behind && position == now.len() {
                return None;
            }
            length += 1;
        }
    };
    let (up, down) = (run(true), run(false));
    if down.is_none_or(|down| up.is_some_and(|up| up <= down)) {
        for item in (at..at + up.unwrap_or(0)).rev() {
            now[item].placed.bit += 1;
            steps.push(in_force(now));
        }
    } else {
        for item in at - down.unwrap_or(0)..at {
            now[item].placed.bit -= 1;
            steps.push(in_force(now));
        }
    }
}
