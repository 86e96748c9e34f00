//! Does what the schedule says.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::bounds::{self, Cost};
use crate::edit;
use crate::exchange::{Broken, Exchange, Invariant};
use crate::judge::{Explanations, Window};
use crate::links::{Links, Turn};
use crate::ports;
use crate::schedule::{Change, Event, Fault, SITES, Way};
use crate::stage::{BOND, Stage};

/// Packets that were on a link when its delay changed are past it after this.
const PAST: Duration = Duration::from_millis(500);
/// A fault ends later than it should if it is by more than this.
const LATE: Duration = Duration::from_millis(50);

/// Carries faults out and notes what they explain.
pub struct Actor<'a> {
    pub stage: &'a mut Stage,
    pub traffic: &'a Exchange,
    links: Links,
    /// Sites that were started and are not yet up, and whether all of them is new.
    starting: Vec<(usize, bool)>,
    /// A link is out of its ports.
    pulled: bool,
    pub explanations: Explanations,
}

impl<'a> Actor<'a> {
    pub fn new(stage: &'a mut Stage, traffic: &'a Exchange) -> Self {
        Self {
            stage,
            traffic,
            links: Links::default(),
            starting: Vec::new(),
            pulled: false,
            explanations: Explanations::default(),
        }
    }

    /// What an event costs here: a link that no tunnel can do without costs more.
    fn cost(&self, event: &Event) -> Cost {
        let cost = match event.fault {
            Fault::Cut { link, way } if self.stage.spared(link, way.senders()) == 0 => {
                bounds::cost(&Event { fault: Fault::CutAll, ..*event })
            }
            Fault::Pull { link } if self.stage.spared(link, Way::Both.senders()) == 0 => {
                bounds::cost(&Event { fault: Fault::PullAll, ..*event })
            }
            _ => bounds::cost(event),
        };
        // Whatever is lost beside it may be what it needs.
        let loses = |window: &Window| window.over.is_none() && matches!(window.cost, Cost::Interruptions { .. });
        if self.explanations.windows.iter().any(loses) { bounds::by_loss(cost) } else { cost }
    }

    /// Begins an event; what of it went wrong that should not.
    pub fn begin(&mut self, number: usize, event: &Event) -> Result<Option<Broken>> {
        let from = self.traffic.now();
        let cost = self.cost(event);
        self.explanations.windows.push(Window { event: number, from, over: None, cost });
        self.pulled |= is_pull(event);
        let wrong = self.perform(&event.fault)?;
        Ok(wrong.map(|told| Broken { at: self.traffic.now(), invariant: invariant(event), told }))
    }

    /// Ends it.
    pub fn end(&mut self, number: usize, event: &Event) -> Result<()> {
        let over = self.traffic.now();
        self.undo(&event.fault)?;
        self.pulled &= !is_pull(event);
        if let Some(at) = self.explanations.windows.iter().position(|window| window.event == number) {
            // It may have lasted longer than it should: something else was being done.
            let lasted = over.saturating_sub(self.explanations.windows[at].from);
            let longer = self.cost(&Event { lasts: lasted.max(event.lasts), ..*event });
            let window = &mut self.explanations.windows[at];
            window.over = Some(over);
            if lasted > event.lasts + LATE {
                window.cost = longer;
            }
        }
        Ok(())
    }

    fn perform(&mut self, fault: &Fault) -> Result<Option<String>> {
        let lab = &self.stage.lab;
        match *fault {
            Fault::Cut { link, way } => self.links.turn(lab, Some(link), way, Turn::Cut(true))?,
            Fault::CutAll => self.links.turn(lab, None, Way::Both, Turn::Cut(true))?,
            Fault::Pull { link } => Links::plug(lab, Some(link), false)?,
            Fault::PullAll => Links::plug(lab, None, false)?,
            Fault::Loss { link, way, percent } => self.links.turn(lab, Some(link), way, Turn::Loss(percent))?,
            Fault::Delay { link, ms } => {
                let delay = Duration::from_millis(u64::from(ms));
                self.links.turn(lab, link, Way::Both, Turn::Delay(Some(delay)))?;
                let until = if link.is_some() { Duration::MAX } else { self.traffic.now() + PAST };
                self.traffic.state().unequal_until = until;
            }
            Fault::Kill { site } => {
                self.explanations.unwatched.push((self.traffic.now(), Duration::MAX));
                self.stage.kill(site)?;
            }
            Fault::Restart { site, crashed } => return self.take_down(&[site], crashed),
            Fault::PowerCut => return self.take_down(&[0, 1], true),
            Fault::Reload { site, change } => {
                self.explanations.unwatched.push((self.traffic.now(), Duration::MAX));
                let wrong = self.reload(site, change)?;
                self.watched();
                return Ok(wrong);
            }
            Fault::Move { site } => self.readdress(site, true)?,
            Fault::Unaddress { site } => {
                let address = self.stage.addresses[site];
                lab.sites[site].gateway.ip(&format!("address del {address}/24 dev {BOND}"))?;
            }
            Fault::Sabotage { defect, site } => defect.begin(self.stage, site)?,
        }
        Ok(None)
    }

    fn undo(&mut self, fault: &Fault) -> Result<()> {
        let lab = &self.stage.lab;
        match *fault {
            Fault::Cut { link, way } => self.links.turn(lab, Some(link), way, Turn::Cut(false))?,
            Fault::CutAll => self.links.turn(lab, None, Way::Both, Turn::Cut(false))?,
            Fault::Pull { link } => Links::plug(lab, Some(link), true)?,
            Fault::PullAll => Links::plug(lab, None, true)?,
            Fault::Loss { link, way, .. } => self.links.turn(lab, Some(link), way, Turn::Loss(0))?,
            Fault::Delay { link, .. } => {
                self.links.turn(lab, link, Way::Both, Turn::Delay(None))?;
                self.traffic.state().unequal_until = self.traffic.now() + PAST;
            }
            Fault::Kill { site } => self.start(&[site], false)?,
            Fault::Restart { site, .. } => self.start(&[site], true)?,
            Fault::PowerCut => self.start(&[0, 1], true)?,
            Fault::Reload { .. } => {}
            Fault::Move { site } => self.readdress(site, false)?,
            Fault::Unaddress { site } => {
                let address = self.stage.addresses[site];
                // `run` may have given it back already.
                lab.sites[site].gateway.ip(&format!("address replace {address}/24 dev {BOND}"))?;
                self.stage.uplink(site)?;
            }
            Fault::Sabotage { defect, site } => defect.end(self.stage, site)?,
        }
        Ok(())
    }

    fn take_down(&mut self, sites: &[usize], crashed: bool) -> Result<Option<String>> {
        self.explanations.unwatched.push((self.traffic.now(), Duration::MAX));
        // All of them before any: what moves while one is being taken down at both is nobody's.
        for site in sites {
            self.traffic.site_goes_down(*site);
        }
        for site in sites {
            let mut wrong = self.stage.take_down(*site, crashed)?;
            // A port whose plug is out is not as it was.
            if wrong.is_none() && !self.pulled {
                wrong = self.stage.left_at(*site)?;
            }
            if let Some(wrong) = wrong {
                return Ok(Some(format!("{}: {wrong}", SITES[*site])));
            }
        }
        Ok(None)
    }

    fn start(&mut self, sites: &[usize], anew: bool) -> Result<()> {
        for site in sites {
            self.stage.start(*site)?;
            self.starting.push((*site, anew));
        }
        Ok(())
    }

    /// Sites that are up since this was last called, and whether all of them is new; what of them went wrong.
    pub fn attend(&mut self) -> Result<Vec<(usize, bool)>, Broken> {
        let mut up = Vec::new();
        for (site, anew) in self.starting.clone() {
            let broken = |error: &anyhow::Error| {
                let told = format!("{} does not come up: {error:#}", SITES[site]);
                Broken { at: self.traffic.now(), invariant: Invariant::Recovery, told }
            };
            if self.stage.is_up(site, self.traffic).map_err(|error| broken(&error))? {
                up.push((site, anew));
            }
        }
        self.starting.retain(|site| !up.contains(site));
        if !up.is_empty() && self.starting.is_empty() {
            self.watched();
        }
        Ok(up)
    }

    /// Somebody watches again, once the new `run` has heard of each tunnel.
    fn watched(&mut self) {
        let now = self.traffic.now();
        for (_, to) in self.explanations.unwatched.iter_mut().filter(|(_, to)| *to == Duration::MAX) {
            *to = now + bounds::NEW;
        }
    }

    /// A gateway's bond gets another address in place of its own, or its own again.
    fn readdress(&mut self, site: usize, moved: bool) -> Result<()> {
        let here = &self.stage.lab.sites[site];
        let from = self.stage.addresses[site];
        let [a, b, c, d] = here.endpoint.octets();
        let to = if moved { [a, b, c, d + 10].into() } else { here.endpoint };
        self.stage.addresses[site] = to;
        // The second address of a net goes with the first one, and so does the route over it.
        let commands = [format!("address del {from}/24 dev {BOND}"), format!("address replace {to}/24 dev {BOND}")];
        here.gateway.apply("ip", &commands)?;
        self.stage.uplink(0)?;
        self.stage.uplink(1)
    }

    fn reload(&mut self, site: usize, change: Change) -> Result<Option<String>> {
        let other = 1 - site;
        let both = match change {
            Change::Nothing => false,
            Change::Weight { tunnel, weight } => {
                let name = format!("wg{tunnel}");
                self.stage.rewrite(site, |text| edit::set(text, &name, "weight", u16::from(weight)))?;
                false
            }
            Change::Prefix => {
                self.stage.rewrite(site, |text| Ok(edit::turn_prefix(text)))?;
                false
            }
            Change::Tunnel => {
                self.turn_tunnel()?;
                true
            }
            Change::Port { tunnel, draw } => {
                self.change_port(site, usize::from(tunnel), draw)?;
                true
            }
        };
        if let Some(wrong) = self.stage.reload(site)? {
            return Ok(Some(format!("at {}: {wrong}", SITES[site])));
        }
        if both && let Some(wrong) = self.stage.reload(other)? {
            return Ok(Some(format!("at {}: {wrong}", SITES[other])));
        }
        Ok(None)
    }

    /// The last tunnel goes from both configurations, or comes back.
    fn turn_tunnel(&mut self) -> Result<()> {
        let name = format!("wg{}", self.stage.ports.len() - 1);
        if let Some(taken) = self.stage.taken_out.take() {
            for (site, block) in taken.iter().enumerate() {
                self.stage.rewrite(site, |text| edit::put_in(text, block))?;
            }
            return Ok(());
        }
        let mut taken = [String::new(), String::new()];
        for (site, taken) in taken.iter_mut().enumerate() {
            self.stage.rewrite(site, |text| {
                let (rest, block) = edit::take_out(text, &name)?;
                *taken = block;
                Ok(rest)
            })?;
        }
        self.stage.taken_out = Some(taken);
        Ok(())
    }

    fn change_port(&mut self, site: usize, tunnel: usize, draw: u16) -> Result<()> {
        let endpoints = [self.stage.lab.sites[0].endpoint, self.stage.lab.sites[1].endpoint];
        let former = self.stage.ports[tunnel];
        let port = ports::other(endpoints, former, site, 30_000_u16.checked_add(draw).context("ports end")?);
        self.stage.ports[tunnel][site] = port;
        self.stage.expect_ports(former)?;
        let name = format!("wg{tunnel}");
        self.stage.rewrite(site, |text| edit::set(text, &name, "listen_port", port))?;
        self.stage.rewrite(1 - site, |text| edit::set(text, &name, "remote_port", port))
    }
}

fn is_pull(event: &Event) -> bool {
    matches!(event.fault, Fault::Pull { .. } | Fault::PullAll)
}

/// What breaks if an event cannot be carried out.
fn invariant(event: &Event) -> Invariant {
    if matches!(event.fault, Fault::Restart { .. } | Fault::PowerCut) {
        Invariant::Restored
    } else {
        Invariant::Recovery
    }
}
