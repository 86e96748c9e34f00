//! Carries out the events of the schedule.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::bounds::{self, Cost};
use crate::edit;
use crate::event::{Change, Event, Fault, SITES, Way};
use crate::exchange::{Broken, Exchange, Invariant};
use crate::hostile::Hostile;
use crate::judge::{Explanations, Window};
use crate::links::{Links, Turn};
use crate::ports;
use crate::sabotage;
use crate::stage::{BOND, Stage};

/// After this time, all packets that were on a link when its delay changed have arrived.
const PAST: Duration = Duration::from_millis(500);
/// A fault that ends later than planned by more than this counts as late.
const LATE: Duration = Duration::from_millis(50);

/// Carries out faults and records which interruptions they explain.
pub struct Actor<'a> {
    pub stage: &'a mut Stage,
    pub traffic: &'a Exchange,
    links: Links,
    /// Sites that were started and are not yet up, and whether nothing of them was left from before.
    starting: Vec<(usize, bool)>,
    /// Whether a link is unplugged at present.
    pulled: bool,
    pub explanations: Explanations,
    hostile: Hostile,
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
            hostile: Hostile::default(),
        }
    }

    /// What an event costs in this lab. Losing a link costs more if every tunnel uses it.
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
        // While another fault loses packets, the packets that this one needs may be lost too.
        let loses = |window: &Window| window.over.is_none() && matches!(window.cost, Cost::Interruptions { .. });
        if self.explanations.windows.iter().any(loses) { bounds::by_loss(cost) } else { cost }
    }

    /// Begins an event. Returns what went wrong with it.
    pub fn begin(&mut self, number: usize, event: &Event) -> Result<Option<Broken>> {
        let from = self.traffic.now();
        let cost = self.cost(event);
        self.explanations.windows.push(Window { event: number, from, over: None, cost });
        self.pulled |= is_pull(event);
        let wrong = self.perform(&event.fault)?;
        Ok(wrong.map(|description| Broken { at: self.traffic.now(), invariant: invariant(event), description }))
    }

    /// Ends an event.
    pub fn end(&mut self, number: usize, event: &Event) -> Result<()> {
        let over = self.traffic.now();
        self.undo(&event.fault)?;
        self.pulled &= !is_pull(event);
        if let Some(at) = self.explanations.windows.iter().position(|window| window.event == number) {
            // The event may have lasted longer than planned, because another action took long.
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
            Fault::Locks { site } => self.hostile.lock(&lab.sites[site])?,
            Fault::Flood { site, flood, rate } => self.hostile.flood(lab, site, flood, rate)?,
            Fault::Disturb { site, what } => {
                let number = lab.sites[1 - site].number;
                let prefixes = [format!("10.{number}.0.0/16"), format!("fd00:{number}::/48")];
                for command in what.commands([&prefixes[0], &prefixes[1]]) {
                    lab.sites[site].gateway.ip(&command)?;
                }
            }
            Fault::Sabotage { defect, site } => sabotage::begin(defect, self.stage, site)?,
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
            Fault::Reload { .. } | Fault::Disturb { .. } => {}
            Fault::Locks { site } => self.hostile.unlock(&lab.sites[site]),
            Fault::Flood { site, .. } => self.hostile.end_flood(site)?,
            Fault::Move { site } => self.readdress(site, false)?,
            Fault::Unaddress { site } => {
                let address = self.stage.addresses[site];
                // `run` may have restored the address already.
                lab.sites[site].gateway.ip(&format!("address replace {address}/24 dev {BOND}"))?;
                self.stage.uplink(site)?;
            }
            Fault::Sabotage { defect, site } => sabotage::end(defect, self.stage, site)?,
        }
        Ok(())
    }

    fn take_down(&mut self, sites: &[usize], crashed: bool) -> Result<Option<String>> {
        self.explanations.unwatched.push((self.traffic.now(), Duration::MAX));
        // The tunnels of all sites are forgotten first: moves that happen while the first of two sites is taken down
        // must not be checked.
        for site in sites {
            self.traffic.site_goes_down(*site);
        }
        for site in sites {
            let mut wrong = self.stage.take_down(*site, crashed)?;
            // An unplugged port differs from before.
            if wrong.is_none() && !self.pulled {
                wrong = self.stage.left_at(*site)?;
            }
            if let Some(wrong) = wrong {
                return Ok(Some(format!("{}: {wrong}", SITES[*site])));
            }
        }
        Ok(None)
    }

    fn start(&mut self, sites: &[usize], again: bool) -> Result<()> {
        for site in sites {
            self.stage.start(*site)?;
            self.starting.push((*site, again));
        }
        Ok(())
    }

    /// Returns the sites that have come up since the last call, and whether nothing of them was left from before.
    ///
    /// # Errors
    /// A site does not come up.
    pub fn attend(&mut self) -> Result<Vec<(usize, bool)>, Broken> {
        let mut up = Vec::new();
        for (site, again) in self.starting.clone() {
            let broken = |error: &anyhow::Error| {
                let description = format!("{} does not come up: {error:#}", SITES[site]);
                Broken { at: self.traffic.now(), invariant: Invariant::Recovery, description }
            };
            if self.stage.is_up(site, self.traffic).map_err(|error| broken(&error))? {
                up.push((site, again));
            }
        }
        self.starting.retain(|site| !up.contains(site));
        if !up.is_empty() && self.starting.is_empty() {
            self.watched();
        }
        Ok(up)
    }

    /// Ends the open spans of `unwatched`: the tunnels are watched again once the new `run` has heard from each of
    /// them.
    fn watched(&mut self) {
        let now = self.traffic.now();
        for (_, to) in self.explanations.unwatched.iter_mut().filter(|(_, to)| *to == Duration::MAX) {
            *to = now + bounds::NEW;
        }
    }

    /// Replaces the address on a gateway's bond with another one, or with its own again.
    fn readdress(&mut self, site: usize, moved: bool) -> Result<()> {
        let here = &self.stage.lab.sites[site];
        let from = self.stage.addresses[site];
        let [a, b, c, d] = here.endpoint.octets();
        let to = if moved { [a, b, c, d + 10].into() } else { here.endpoint };
        self.stage.addresses[site] = to;
        // When the first address of a network is deleted, the kernel also deletes the second one and the routes over
        // it.
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

    /// Removes the last tunnel from both configurations, or puts it back.
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

/// The invariant that is broken if an event cannot be carried out.
fn invariant(event: &Event) -> Invariant {
    if matches!(event.fault, Fault::Restart { .. } | Fault::PowerCut) {
        Invariant::Restored
    } else {
        Invariant::Recovery
    }
}
