//! The state of the links between the sites. Several faults may overlap on one link.

use std::time::Duration;

use anyhow::Result;
use lab::sites::Lab;
use lab::topology::Quality;

use crate::event::{LINKS, Way};

/// Delay of a link without a fault.
const DELAY: Duration = Duration::from_millis(2);
/// The smallest possible jitter. With jitter, [`Quality::discipline`] also sets a rate, so that netem keeps packets in
/// order even if the delay of the link changes.
const JITTER: Duration = Duration::from_micros(1);

/// A link without a fault.
pub const SOUND: Quality = Quality { delay: DELAY, jitter: JITTER, loss: 0.0 };

/// The faults in one direction of a link.
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

/// The faults of all links, by the sending site.
#[derive(Debug, Default)]
pub struct Links([[Wrong; LINKS as usize]; 2]);

#[derive(Clone, Copy, Debug)]
pub enum Turn {
    Cut(bool),
    Loss(u8),
    Delay(Option<Duration>),
}

impl Links {
    /// Changes one link, or all links, in one direction or both.
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

    /// Unplugs one link, or all links, or plugs them in again.
    pub fn plug(lab: &Lab, link: Option<u8>, plugged: bool) -> Result<()> {
        (0..LINKS)
            .filter(|number| link.is_none_or(|link| link == *number))
            .try_for_each(|n| lab.wires()?.plug(n, plugged))
    }
}
