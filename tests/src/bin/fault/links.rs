//! The links between the sites as faults leave them: several may lie over one another.

use std::time::Duration;

use anyhow::Result;
use lab::sites::Lab;
use lab::topology::Quality;

use crate::schedule::{LINKS, Way};

/// How long packets are on their way while nothing is wrong.
const DELAY: Duration = Duration::from_millis(2);
/// As little as there can be: with it packets on a link stay in order whatever becomes of its delay.
const JITTER: Duration = Duration::from_micros(1);

/// A link while nothing is wrong.
pub const SOUND: Quality = Quality { delay: DELAY, jitter: JITTER, loss: 0.0 };

/// What is wrong in one direction of a link.
#[derive(Clone, Copy, Debug, Default)]
struct Wrong {
    cut: bool,
    percent: u8,
    delay: Option<Duration>,
}

impl Wrong {
    fn quality(self) -> Quality {
        let loss = if self.cut { 100.0 } else { f64::from(self.percent) };
        Quality { loss, delay: self.delay.unwrap_or(DELAY), ..SOUND }
    }
}

/// All links, by the site that sends.
#[derive(Debug, Default)]
pub struct Links([[Wrong; LINKS as usize]; 2]);

/// A change of a link.
#[derive(Clone, Copy, Debug)]
pub enum Turn {
    Cut(bool),
    Loss(u8),
    Delay(Option<Duration>),
}

impl Links {
    /// Changes one link, or all, one way or both.
    pub fn turn(&mut self, lab: &Lab, link: Option<u8>, way: Way, turn: Turn) -> Result<()> {
        let mut changes = Vec::new();
        for number in (0..LINKS).filter(|number| link.is_none_or(|link| link == *number)) {
            for sender in way.senders() {
                let wrong = &mut self.0[*sender][usize::from(number)];
                match turn {
                    Turn::Cut(cut) => wrong.cut = cut,
                    Turn::Loss(percent) => wrong.percent = percent,
                    Turn::Delay(delay) => wrong.delay = delay,
                }
                changes.push((number, *sender, wrong.quality()));
            }
        }
        lab.wires()?.set_all(&changes)
    }

    /// Takes a link's plugs out, or all links', or puts them in again.
    pub fn plug(lab: &Lab, link: Option<u8>, plugged: bool) -> Result<()> {
        (0..LINKS)
            .filter(|number| link.is_none_or(|link| link == *number))
            .try_for_each(|n| lab.wires()?.plug(n, plugged))
    }
}
