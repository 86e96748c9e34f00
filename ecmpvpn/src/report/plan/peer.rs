//! The tunnels to one remote site, as `plan` reports them.

use crate::plan::measured::Measured;
use crate::plan::ports::replan::Replan;
use crate::plan::ports::{Better, PortPlan, Request};

/// The tunnels to one remote site. End A is this site.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Name of this site.
    pub here: String,
    /// Name of the remote site.
    pub there: String,
    pub request: Request,
    /// Names of the tunnels, in the order of the pairs.
    pub names: Vec<String>,
    /// The ports and their spread.
    pub plan: PortPlan,
    /// Ports with a more even spread.
    pub better: Option<Better>,
    /// Where the tunnels really arrive, if it was measured.
    pub arrivals: Option<Arrivals>,
}

/// The measured arrivals of the tunnels to one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrivals {
    pub measured: Measured,
    /// What the other site should change; `None` without `--replan-rx`.
    pub replan: Option<Replan>,
}
