//! The output of `ecmpvpn plan`. The JSON is a contract: fields are only ever added.

mod arrivals;
mod json;
mod peer;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use comfy_table::{Cell, CellAlignment, LineStyle, Row, Table, presets};

use crate::config::{self, Config};
use crate::plan::bond_hash::{Member, Unknown};
use crate::plan::ports::{self, End, LocalBond, PortError, Spread, View};

pub use arrivals::Setting;
pub use json::Json;
pub use peer::{Arrivals, Peer};

/// The plan of one site.
#[derive(Clone, Debug)]
pub struct Report {
    /// At least one.
    pub peers: Vec<Peer>,
    /// What `run` would change, one sentence each. `None`: there is no configuration, or it cannot be determined.
    pub changes: Option<Vec<String>>,
}

/// The text for a terminal.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, peer) in self.peers.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            peer.fmt(f)?;
        }
        match self.changes.as_deref() {
            None => Ok(()),
            Some([]) => write!(f, "\n\n`run` would change nothing"),
            Some(changes) => {
                write!(f, "\n\n`run` would change:")?;
                changes.iter().try_for_each(|change| write!(f, "\n  {change}"))
            }
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.here, end(&self.request.a))?;
        writeln!(f, "{} {}", self.there, end(&self.request.b))?;
        writeln!(f, "{}", self.table())?;
        let warning = if self.gains_nothing() { "WARNING: " } else { "" };
        write!(f, "{warning}{}", self.verdict())?;
        [self.arrival_verdict(), self.replan_text()].iter().flatten().try_for_each(|text| write!(f, "\n{text}"))
    }
}

impl Report {
    /// One sentence for each peer whose ports can be improved.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        self.peers.iter().filter_map(Peer::warning)
    }
}

impl Peer {
    /// Judges the tunnels to `peer`, one of `config`'s peers. `local` is the bond that leads there, if it is known.
    /// `in_use` has the UDP ports of sockets on this host; the tunnels' own ports may be among them.
    pub fn configured(
        config: &Config,
        peer: &config::Peer,
        local: Option<LocalBond>,
        in_use: &BTreeSet<u16>,
    ) -> Result<Self, PortError> {
        let (mut request, pairs) = ports::configured(config, peer, local);
        let own = |port: &u16| pairs.iter().any(|pair| pair.a == *port);
        request.a.excluded.extend(in_use.iter().filter(|port| !own(port)));
        let plan = ports::judge(&request, &pairs)?;
        let better = ports::better(&request, &plan)?;
        let names = peer.tunnels.iter().map(|tunnel| tunnel.name.to_string()).collect();
        Ok(Self {
            here: config.site.name.clone(),
            there: peer.name.clone(),
            request,
            names,
            plan,
            better,
            arrivals: None,
        })
    }

    /// Whether all tunnels, of several, leave one end by the same member of several.
    fn gains_nothing(&self) -> bool {
        let on_one = |view: &&View| {
            let tunnels = view.tunnels.len();
            view.members > 1 && tunnels > 1 && view.max_min().is_some_and(|(max, _)| max == tunnels)
        };
        let [out, _, back, _] = &self.plan.views;
        [out, back].iter().any(on_one)
    }

    /// The verdict, if tunnels share a member while another member has room, or other ports would be better.
    pub fn warning(&self) -> Option<String> {
        let shares = self.plan.views.iter().any(|view| !view.degraded && view.miss() > Some(0));
        (shares || self.better.is_some()).then(|| format!("the tunnels to {}: {}", self.there, self.verdict()))
    }

    fn table(&self) -> Table {
        let [out, out_less, back, back_less] = &self.plan.views;
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none())).set_header([
            "tunnel".to_owned(),
            format!("{} port", self.here),
            format!("{} port", self.there),
            format!("{} sends on\nmember {}", self.here, count(&self.request.a, out)),
            format!("one down:\nmember {}", count(&self.request.a, out_less)),
            format!("{} sends on\nmember {}", self.there, count(&self.request.b, back)),
            format!("one down:\nmember {}", count(&self.request.b, back_less)),
        ]);
        if let Some(arrivals) = &self.arrivals {
            let header = table.header().cloned().unwrap_or_default();
            let mut header: Vec<Cell> = header.cell_iter().cloned().collect();
            header.push(Cell::new(format!("{} receives on\nmember of {}", self.here, arrivals.measured.members())));
            header.push(Cell::new("measured,\npackets"));
            table.set_header(header);
        }
        for (at, (name, pair)) in self.names.iter().zip(&self.plan.pairs).enumerate() {
            let mut row = Row::from([Cell::new(name), right_aligned(pair.a), right_aligned(pair.b)]);
            for view in [out, out_less, back, back_less] {
                row.add_cell(right_aligned(member(view, at)));
            }
            if let Some((on, packets)) = self.arrival(at) {
                row.add_cell(right_aligned(on));
                row.add_cell(right_aligned(packets));
            }
            table.add_row(row);
        }
        let mut row = Row::from([Cell::new("tunnels a member"), Cell::new(""), Cell::new("")]);
        for view in [out, out_less, back, back_less] {
            row.add_cell(right_aligned(loads(view)));
        }
        if let Some(arrivals) = &self.arrivals {
            row.add_cell(right_aligned(listed(&arrivals.measured.loads())));
        }
        table.add_row(row);
        table
    }
}

fn right_aligned(value: impl fmt::Display) -> Cell {
    Cell::new(value).set_alignment(CellAlignment::Right)
}

fn end(end: &End) -> String {
    let bond = match (end.members, end.policy) {
        (_, None) => "bond not known".to_owned(),
        (1, _) => "1 member".to_owned(),
        (members, Some(policy)) => format!("{members} members, {}", policy.as_str()),
    };
    let rewritten = if end.rewritten { ", behind address translation" } else { "" };
    format!("{} ({bond}{rewritten})", end.address)
}

fn count(end: &End, view: &View) -> String {
    match end.policy {
        Some(_) => format!("of {}", view.members),
        None => "of ?".to_owned(),
    }
}

fn member(view: &View, tunnel: usize) -> String {
    match view.tunnels[tunnel] {
        Member::Index(index) => index.to_string(),
        Member::Unknown(Unknown::NoMember) => "-".to_owned(),
        Member::Unknown(_) => "?".to_owned(),
    }
}

fn loads(view: &View) -> String {
    match &view.spread {
        Spread::Known(loads) => listed(loads),
        Spread::OneOfThem(_) => format!("{} on one", view.tunnels.len()),
        Spread::Unknown(Unknown::NoMember) => "-".to_owned(),
        Spread::Unknown(_) => "?".to_owned(),
    }
}

/// The tunnels of each member. Of many members, how many have how many tunnels: a table must fit a terminal.
fn listed(loads: &[usize]) -> String {
    const FEW: usize = 8;
    if loads.len() <= FEW {
        return loads.iter().map(usize::to_string).collect::<Vec<_>>().join("/");
    }
    let mut members: BTreeMap<usize, usize> = BTreeMap::new();
    for load in loads {
        *members.entry(*load).or_default() += 1;
    }
    members.iter().map(|(load, members)| format!("{load} on {members}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests;
