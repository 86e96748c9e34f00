//! The results and their tables. Pure.

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Row as Line, Table, presets};

use crate::cut::Cut;

/// A way to carry the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A route to the first tunnel.
    OneTunnel,
    /// Kernel ECMP over tunnels that have the same port at both ends.
    UsualRecipe,
    /// Kernel ECMP over tunnels with planned ports.
    Ecmp,
    /// ecmpvpn.
    Ecmpvpn,
}

impl Way {
    /// The name in tables and progress.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneTunnel => "one tunnel",
            Self::UsualRecipe => "usual recipe: equal ports, ECMP",
            Self::Ecmp => "ECMP, planned ports",
            Self::Ecmpvpn => "ecmpvpn",
        }
    }
}

/// The result of one transfer.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// TCP connections at once.
    pub flows: usize,
    /// How long it ran before it was measured.
    pub lead: Duration,
    /// Goodput, Mbit/s.
    pub goodput: f64,
    /// Bytes that each tunnel's device sent at site A.
    pub tunnels: Vec<u64>,
    /// Bytes that each link's device sent at site A.
    pub links: Vec<u64>,
}

impl Transfer {
    /// Number of links that carried traffic. A link counts from a tenth of the fullest one, so that links with only
    /// probes do not count.
    pub fn links_used(&self) -> usize {
        let fullest = self.links.iter().copied().max().unwrap_or_default();
        self.links.iter().filter(|bytes| **bytes * 10 > fullest).count()
    }
}

/// The transfers of one way, by rising number of flows.
#[derive(Clone, Debug)]
pub struct Row {
    pub way: Way,
    pub transfers: Vec<Transfer>,
}

/// The results in the lab with the ports of the usual recipe.
#[derive(Clone, Debug)]
pub struct Usual {
    /// The link that each tunnel uses, from the links' counters.
    pub links: Vec<usize>,
    /// One of its tunnels.
    pub one_tunnel: Row,
    /// All of its tunnels.
    pub recipe: Row,
}

/// The results in the lab with planned ports.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The link that each tunnel uses, from the links' counters.
    pub links: Vec<usize>,
    /// The kernel's ECMP.
    pub ecmp: Row,
    /// ecmpvpn.
    pub ecmpvpn: Row,
    /// The result of a cut tunnel under each.
    pub cuts: [Cut; 2],
}

/// All results.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Description of the links.
    pub title: String,
    /// The first lab.
    pub usual: Usual,
    /// The second lab.
    pub planned: Planned,
}

impl Measured {
    /// The rows in the order of the tables.
    pub fn rows(&self) -> [&Row; 4] {
        [&self.usual.one_tunnel, &self.usual.recipe, &self.planned.ecmp, &self.planned.ecmpvpn]
    }

    /// A row's goodput divided by that of one tunnel, by the number of flows.
    pub fn ratios(&self, row: &Row) -> Vec<f64> {
        let pairs = row.transfers.iter().zip(&self.usual.one_tunnel.transfers);
        pairs.map(|(one, base)| one.goodput / base.goodput).collect()
    }

    /// The table of goodput, by way and number of flows.
    pub fn goodputs(&self) -> Table {
        let mut header = vec![Cell::new(format!("{}; Mbit/s", self.title))];
        header.extend(self.usual.one_tunnel.transfers.iter().map(|transfer| right_aligned(flows(transfer.flows))));
        let lines = self.rows().map(|row| {
            let mut line = vec![Cell::new(row.way.name())];
            let cells = row.transfers.iter().zip(self.ratios(row));
            line.extend(cells.map(|(one, ratio)| right_aligned(format!("{:.1}  {ratio:.2}x", one.goodput))));
            line
        });
        table(header, lines)
    }

    /// The table of bytes that each tunnel and each link sent in the transfers with the most flows.
    pub fn bytes(&self) -> Table {
        let most = self.usual.one_tunnel.transfers.last();
        let mut header =
            vec![Cell::new(format!("sent by site A, {}; MB", most.map_or_else(String::new, |one| flows(one.flows))))];
        let count = most.map_or(0, |one| one.tunnels.len());
        header.extend((0..count).map(|number| right_aligned(format!("wg{number}"))));
        header.extend((0..most.map_or(0, |one| one.links.len())).map(|number| right_aligned(format!("link {number}"))));
        let lines = self.rows().map(|row| {
            let mut line = vec![Cell::new(row.way.name())];
            let last = row.transfers.iter().last();
            let counts = last.into_iter().flat_map(|last| last.tunnels.iter().chain(&last.links));
            line.extend(counts.map(|bytes| right_aligned(megabytes(*bytes))));
            line
        });
        table(header, lines)
    }
}

/// A number of flows with the word `flow` or `flows`.
pub fn flows(count: usize) -> String {
    format!("{count} flow{}", if count == 1 { "" } else { "s" })
}

fn table(header: Vec<Cell>, lines: impl IntoIterator<Item = Vec<Cell>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(Line::from(header));
    for line in lines {
        table.add_row(Line::from(line));
    }
    table
}

fn right_aligned(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

fn megabytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let megabytes = bytes as f64 / 1e6;
    format!("{megabytes:.1}")
}
